"""One training step, engine against plain, side by side: queries/s, share of the roofline, padding, memory, over k.

    python tests/bench/step_bench.py                           k = 6 at HH lengths, then 2 ... 32
    python tests/bench/step_bench.py --k 6 --repeat 7          one k, more repetitions
    python tests/bench/step_bench.py --csv b.csv --plot b.png  a file and a picture
    python tests/bench/step_bench.py --chunks 2 16 64          memory of groups that need many chunks
    python tests/bench/step_bench.py --trl ranked.jsonl        groups/s against TRL's DPOTrainer on all pairs

Both sides run in turn in one process, so the ratio holds when the machine's speed drifts; memory is
measured in a fresh process for each side, because a process's peak never falls. On a GPU both run
there in bfloat16 and memory is the allocator's peak.

The roofline is the speed of the model's own largest matrix product, measured between the steps, at the step's number of
tokens. The engine's share of it counts what the algorithm needs and nothing that is padded or computed twice: per token
4 operations for each frozen weight of a layer (forward, and back to its input) and 6 for each adapter weight; per
response token 4 for each weight of the head; and for each pair of a token and one that it sees, 12 per hidden value.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.plain_step import plain_loss
from logprobs.batches import as_batch

from rrhf_peft.logprobs import install
from rrhf_peft.objectives import rrhf

LONGEST = 192  # tokens of prompt and response: the paper's limit on HH

#: Lengths in Llama-2 tokens, the 5th to 95th percentile of Anthropic's HH harmless test set by tens.
HH_PROMPT_DECILES = [21, 26, 38, 69, 94, 122, 150, 187, 244, 378]
HH_RESPONSE_DECILES = [7, 12, 17, 23, 29, 38, 49, 64, 86, 138]


def hh_shaped_groups(count, k, vocabulary, seed=0):
    """Groups with HH-like lengths: overlong prompts lose their beginning, responses their end."""
    draw = random.Random(seed)
    groups = []
    for _ in range(count):
        responses = [draw.choice(HH_RESPONSE_DECILES) for _ in range(k)]
        prompt = min(draw.choice(HH_PROMPT_DECILES), LONGEST - 48)
        groups.append(
            (
                [draw.randrange(3, vocabulary) for _ in range(prompt)],
                [[draw.randrange(3, vocabulary) for _ in range(min(n, LONGEST - prompt))] for n in responses],
            )
        )
    return groups


def llama_30m(device):
    """About 30M parameters, 32k vocabulary, LoRA r=16 on every linear layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config)
    parameters = model.num_parameters()
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    if device == "cuda":
        model = model.to(device, torch.bfloat16)
    return model.train(), parameters


def large_group(k, vocabulary):
    """A prompt of 100 tokens with k responses of 60."""
    draw = random.Random(0)
    return [([draw.randrange(3, vocabulary) for _ in range(n)]) for n in [100, *[60] * k]]


def run_side(side, model, groups, scores, device):
    """One forward and backward over all groups as one micro-batch: seconds, loss, and the engine's rows."""
    model.zero_grad(set_to_none=True)
    _synchronise(device)
    start = time.perf_counter()
    chunks = []
    if side == "plain":
        with torch.device(device):
            loss = plain_loss(model, groups, scores)
        loss.backward()
        total = loss.item()
    else:
        batch = as_batch(groups, [score for group in scores for score in group])
        batch["input_ids"] = batch["input_ids"].to(device)
        engine = install(model, chunk_tokens=1024 if side == "chunks" else "auto")
        losses = []

        def loss_of(log_probs, responses):
            loss, _ = rrhf(log_probs, batch["scores"][responses])
            losses.append(loss * (int(log_probs.group[-1]) + 1) / len(groups))
            return losses[-1]

        for turn in engine.turns(model, batch, loss_of):
            turn().backward()
        total = sum(loss.item() for loss in losses)
        chunks = engine._chunks(batch)
    _synchronise(device)
    return time.perf_counter() - start, total, chunks


def algorithmic_flops(model, groups):
    """Operations that the engine's step cannot do without, as the top of this file counts them."""
    config = model.get_base_model().config
    layers = model.get_base_model().model.layers
    adapter = sum(p.numel() for p in layers.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in layers.parameters()) - adapter
    tokens = sum(len(prompt) + sum(map(len, responses)) for prompt, responses in groups)
    scored = sum(len(response) for _, responses in groups for response in responses)
    seen = sum(
        len(prompt) * (len(prompt) + 1) / 2 + sum(len(r) * len(prompt) + len(r) * (len(r) + 1) / 2 for r in responses)
        for prompt, responses in groups
    )
    return (
        tokens * (4 * frozen + 6 * adapter)
        + scored * 4 * config.hidden_size * config.vocab_size
        + seen * 12 * config.hidden_size * config.num_hidden_layers
    )


def matmul_speed(model, tokens, device):
    """Operations per second of the largest product of a layer, at this number of tokens: the best of five."""
    weight = model.get_base_model().model.layers[0].mlp.gate_proj.weight
    hidden = torch.randn(tokens, weight.shape[1], device=device, dtype=weight.dtype)
    best = 0.0
    for _ in range(5):
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(4):
            hidden @ weight.t()
        _synchronise(device)
        best = max(best, 4 * 2 * tokens * weight.numel() / (time.perf_counter() - start))
    return best


def _synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def measure_memory(side, k, count):
    """Peak bytes of a step over those of the idle process, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", side, "--k", str(k), "--groups", str(count)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def memory_of(side, k, count, device):
    model, _ = llama_30m(device)
    groups = hh_shaped_groups(count, k, 32000)
    if side == "chunks":
        prompt, *responses = large_group(k, 32000)
        groups, count = [(prompt, responses)], 1
    scores = [[float(i) for i in range(k)]] * count
    warm_up = hh_shaped_groups(1, 2, 32000, seed=9)
    run_side(side, model, [([3, 4], [[5], [6]])] if side == "plain" else warm_up[:1], [[0.0, 1.0]], device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
        run_side(side, model, groups, scores, device)
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (Linux)
        idle = _status("VmRSS")
        run_side(side, model, groups, scores, device)
        peak = _status("VmHWM")
    print(json.dumps(peak - idle))


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, nargs="*", default=[6, 2, 4, 8, 16, 32])
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--trl", type=Path, help="a ranked file with prompt, responses and scores")
    parser.add_argument("--count", type=int, default=32, help="groups of that file")
    parser.add_argument("--memory-of", choices=["plain", "engine", "chunks"])
    parser.add_argument("--chunks", type=int, nargs="*", help="groups of this many responses, in chunks of 1024 tokens")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.memory_of:
        memory_of(arguments.memory_of, arguments.k[0], arguments.groups, device)
        return

    for k in arguments.chunks or ():
        print(f"k = {k}: {measure_memory('chunks', k, 1) / 2**20:.0f} MiB", flush=True)
    if arguments.chunks:
        return

    if arguments.trl:
        against_trl(arguments.trl, arguments.count, batch_size=4)
        return

    model, parameters = llama_30m(device)
    print(f"{parameters / 1e6:.1f}M parameters, LoRA r=16, {device}, {torch.get_num_threads()} threads")
    print(f"{arguments.groups} groups a step, median of {arguments.repeat}; memory is what a step adds")
    print("| k | plain q/s | engine q/s | ratio | roofline | padding | plain MiB | engine MiB | share |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for k in arguments.k:
        groups = hh_shaped_groups(arguments.groups, k, 32000)
        scores = [[float(i) for i in range(k)]] * arguments.groups
        times = {"plain": [], "engine": []}
        losses, shares, chunks = {}, [], []
        flops = algorithmic_flops(model, groups)
        tokens = sum(len(prompt) + sum(map(len, responses)) for prompt, responses in groups)
        for repeat in range(arguments.repeat + 1):
            for side, seconds in times.items():
                taken, losses[side], chunks = run_side(side, model, groups, scores, device)
                if repeat:  # the first of each is the warm-up
                    seconds.append(taken)
            shares.append(flops / times["engine"][-1] / matmul_speed(model, tokens, device) if repeat else 0.0)
        padding = sum(rows.num_padded for rows in chunks) / sum(rows.token.numel() for rows in chunks)
        assert abs(losses["plain"] - losses["engine"]) < (1e-4 if device == "cpu" else 5e-2) * abs(losses["plain"])
        ratios = [plain / engine for plain, engine in zip(times["plain"], times["engine"], strict=True)]
        memory = {side: measure_memory(side, k, arguments.groups) for side in times}
        rates = {side: arguments.groups / statistics.median(seconds) for side, seconds in times.items()}
        rows.append(
            {
                "k": k,
                "plain_queries_per_second": rates["plain"],
                "engine_queries_per_second": rates["engine"],
                "ratio": statistics.median(ratios),
                "roofline": statistics.median(shares[1:]),
                "padding": padding,
                "plain_mib": memory["plain"] / 2**20,
                "engine_mib": memory["engine"] / 2**20,
            }
        )
        print(
            f"| {k} | {rates['plain']:.2f} | {rates['engine']:.2f} | {rows[-1]['ratio']:.2f} "
            f"| {rows[-1]['roofline']:.2f} | {padding:.1%} "
            f"| {memory['plain'] / 2**20:.0f} | {memory['engine'] / 2**20:.0f} "
            f"| {memory['engine'] / memory['plain']:.2f} |",
            flush=True,
        )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if arguments.plot:
        draw(sorted(rows, key=lambda row: row["k"]), arguments.plot)


def draw(rows, path):
    """Queries per second and memory over k, both sides."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, unit, title in zip(
        axes, ("queries_per_second", "mib"), ("queries per second", "MiB a step"), strict=True
    ):
        for side in ("plain", "engine"):
            axis.plot([row["k"] for row in rows], [row[f"{side}_{unit}"] for row in rows], marker="o", label=side)
        axis.set(xlabel="responses per prompt", ylabel=title, xscale="log", yscale="log")
        axis.legend()
    figure.savefig(path, dpi=150)


def against_trl(path, count, batch_size):
    """Groups/s of DPO on the first groups of a ranked file: TRL's trainer on all pairs, and this package's."""
    import tempfile

    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from rrhf_peft.train.config import RRHFConfig
    from rrhf_peft.train.trainer import RRHFTrainer

    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    pairs = [
        {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
        for row in rows
        for chosen, better in zip(row["responses"], row["scores"], strict=True)
        for rejected, worse in zip(row["responses"], row["scores"], strict=True)
        if better > worse
    ]
    rates = {}
    for side in ("engine", "trl"):
        model, _ = llama_30m("cpu")
        base = model.unload()
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(rows, folder))
            common = {"output_dir": f"{folder}/run", "num_train_epochs": 1, "use_cpu": True, "report_to": "none"}
            common |= {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000, "bf16": False}
            if side == "engine":
                arguments = RRHFConfig(
                    **common, objective="dpo", per_device_train_batch_size=batch_size, max_tokens=512
                )
                trainer = RRHFTrainer(
                    base,
                    arguments,
                    train_dataset=Dataset.from_list(rows),
                    processing_class=tokenizer,
                    peft_config=peft_config,
                )
            else:
                arguments = DPOConfig(
                    **common,
                    per_device_train_batch_size=batch_size * len(pairs) // len(rows),
                    max_length=512,
                    gradient_checkpointing=False,
                )
                trainer = DPOTrainer(
                    base,
                    args=arguments,
                    train_dataset=Dataset.from_list(pairs),
                    processing_class=tokenizer,
                    peft_config=peft_config,
                )
            start = time.perf_counter()
            trainer.train()
            rates[side] = len(rows) / (time.perf_counter() - start)
        print(f"{side}: {rates[side]:.2f} groups/s ({len(rows)} groups, {len(pairs)} pairs)", flush=True)
    print(f"ratio {rates['engine'] / rates['trl']:.1f}")


def _tokenizer_folder(rows, folder):
    """A byte-pair tokenizer of these very texts, saved: about as many tokens to a text as a large model's has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator((text for row in rows for text in (row["prompt"], *row["responses"])), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(f"{folder}/tokenizer")
    return f"{folder}/tokenizer"


if __name__ == "__main__":
    main()
