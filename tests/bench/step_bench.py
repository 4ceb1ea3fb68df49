"""One training step, engine against plain, side by side: queries/s, peak memory, both against k.

    python tests/bench/step_bench.py                    k = 6 at HH lengths, then k = 2 ... 32
    python tests/bench/step_bench.py --k 6 --repeat 7   one k, more repetitions
    python tests/bench/step_bench.py --chunks 16 64 128 memory of groups that need many chunks, a process for each k

Both sides run in turn in one process, so the ratio holds when the machine's speed drifts; memory is
measured in a fresh process for each side, because a process's peak never falls. On a GPU both run
there in bfloat16 and memory is the allocator's peak.
"""

from __future__ import annotations

import argparse
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
    """One forward and backward over all groups, as one micro-batch; returns seconds and the loss."""
    model.zero_grad(set_to_none=True)
    _synchronise(device)
    start = time.perf_counter()
    if side == "plain":
        with torch.device(device):
            loss = plain_loss(model, groups, scores)
    else:
        batch = as_batch(groups, [score for group in scores for score in group], device)
        batch["scores"] = batch["scores"].to(device)
        engine = install(model, chunk_tokens=1024 if side == "chunks" else "auto")
        loss, _ = rrhf(engine.log_probs(model, batch), batch["scores"])
    loss.backward()
    _synchronise(device)
    return time.perf_counter() - start, loss.item()


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
    parser.add_argument("--json", type=Path)
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

    model, parameters = llama_30m(device)
    print(f"{parameters / 1e6:.1f}M parameters, LoRA r=16, {device}, {torch.get_num_threads()} threads")
    print(f"{arguments.groups} groups a step, median of {arguments.repeat}; memory is what a step adds")
    print("| k | plain q/s | engine q/s | ratio | plain MiB | engine MiB | share |\n|---|---|---|---|---|---|---|")
    rows = []
    for k in arguments.k:
        groups = hh_shaped_groups(arguments.groups, k, 32000)
        scores = [[float(i) for i in range(k)]] * arguments.groups
        times = {"plain": [], "engine": []}
        losses = {}
        for repeat in range(arguments.repeat + 1):
            for side, seconds in times.items():
                taken, losses[side] = run_side(side, model, groups, scores, device)
                if repeat:  # the first of each is the warm-up
                    seconds.append(taken)
        assert abs(losses["plain"] - losses["engine"]) < (1e-4 if device == "cpu" else 5e-2) * abs(losses["plain"])
        ratios = [plain / engine for plain, engine in zip(times["plain"], times["engine"], strict=True)]
        memory = {side: measure_memory(side, k, arguments.groups) for side in times}
        rates = {side: arguments.groups / statistics.median(seconds) for side, seconds in times.items()}
        rows.append({"k": k, "rates": rates, "ratio": statistics.median(ratios), "memory": memory})
        print(
            f"| {k} | {rates['plain']:.2f} | {rates['engine']:.2f} | {rows[-1]['ratio']:.2f} "
            f"| {memory['plain'] / 2**20:.0f} | {memory['engine'] / 2**20:.0f} "
            f"| {memory['engine'] / memory['plain']:.2f} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
