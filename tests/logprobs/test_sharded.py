"""FSDP2 on two processes with batches of different sizes: nobody waits for ever, and gradients are exact."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from logprobs.batches import as_batch, random_groups
from logprobs.test_engine import VOCABULARY, gradients, relative_error, small_llama, with_lora
from oracles.log_probs import float64_copy, response_sums

from rrhf_peft.logprobs import head, install, prove

TESTS = Path(__file__).resolve().parents[1]
LAYERS = 5
LORA = {"target_modules": ["q_proj", "down_proj", "lm_head"]}


def groups_of(rank):
    """The second process has many times the first one's tokens."""
    return random_groups(3, [2], VOCABULARY, longest_response=3) if rank == 0 else random_groups(4, [5, 6], VOCABULARY)


def work(folder, chunk_tokens, param_dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    head._SLICE_ELEMENTS["cpu"] = 5 * VOCABULARY  # five tokens: a vocabulary of 128k beside 2**24 elements, made small
    model = with_lora(small_llama(num_hidden_layers=LAYERS), **LORA)
    groups = groups_of(rank)
    dtype = getattr(torch, param_dtype) if param_dtype else None
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype), "reshard_after_forward": True}
    inner = model.get_base_model()
    for module in [*inner.model.layers, inner.lm_head, model]:
        fully_shard(module, **policy)
    calls = []
    call = head._slice_log_probs
    head._slice_log_probs = lambda *arguments: calls.append(len(arguments[0])) or call(*arguments)
    engine = install(model, chunk_tokens=chunk_tokens, same_chunks_everywhere=True)
    proof = prove(model, engine, as_batch(groups))
    sums = engine.log_probs(model, as_batch(groups)).sum.detach()
    calls.clear()
    gathered = gathered_layers(inner.model.layers)
    shares = []
    turns = engine.turns(model, as_batch(groups), lambda own, which: shares.append(own.sum) or own.sum.square().sum())
    for turn in turns:
        (2 * turn()).backward()  # FSDP takes the mean over two processes
    got = {name: p.grad.full_tensor().double() for name, p in model.named_parameters() if p.requires_grad}
    if rank == 0:
        torch.save(got, folder / "gradients.pt")
    torch.save(sums, folder / f"sums-{rank}.pt")
    seen = {"calls": calls, "layout": proof.layout, "dtype": str(shares[0].dtype), "rejected": proof.rejected}
    seen |= {"turns": len(turns), "gathered": gathered}
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def gathered_layers(layers):
    """How many layers' whole weights are in memory as each layer's backward pass ends, filled as the model runs."""
    counts = []

    def count(*_):
        states = [layer._get_fsdp_state()._fsdp_param_group for layer in layers]
        counts.append(sum(state.is_unsharded for state in states))

    for layer in layers:
        layer.self_attn.q_proj.register_full_backward_hook(count)
    return counts


def launch(folder, chunk_tokens, param_dtype=""):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    shared = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_PORT": port}
    command = [sys.executable, "-m", "logprobs.test_sharded", str(folder), str(chunk_tokens), param_dtype]
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "MASTER_ADDR": "127.0.0.1", "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)], outputs


@pytest.mark.parametrize(
    "chunk_tokens", [pytest.param(100_000, marks=pytest.mark.slow, id="one-chunk"), pytest.param(60, id="chunks")]
)
def test_different_numbers_of_head_slices(tmp_path, chunk_tokens):
    seen, _ = launch(tmp_path, chunk_tokens)
    assert len(seen[0]["calls"]) == len(seen[1]["calls"]) > 2
    assert sum(seen[0]["calls"]) < sum(seen[1]["calls"])
    assert seen[0]["turns"] == seen[1]["turns"]
    assert (seen[0]["turns"] == 1) == (chunk_tokens == 100_000)
    model = with_lora(small_llama(num_hidden_layers=LAYERS), **LORA)
    twin = float64_copy(model)
    every = [groups_of(rank) for rank in range(2)]
    for rank, groups in enumerate(every):
        assert torch.allclose(torch.load(tmp_path / f"sums-{rank}.pt").double(), response_sums(twin, groups), atol=2e-4)
    expected = gradients(twin, sum(response_sums(twin, groups).square().sum() for groups in every))
    assert relative_error(torch.load(tmp_path / "gradients.pt"), expected) < 1e-5
    for process in seen:  # one that is under way, and the one that is fetched meanwhile
        assert len(process["gathered"]) == LAYERS * process["turns"]
        assert 1 <= max(process["gathered"]) <= 2


def test_bfloat16_shards_give_float32_sums_and_bfloat16_tolerance(tmp_path):
    """The sharded weights are float32 and no autocast is on: only what they compute tells that it is bfloat16."""
    seen, _ = launch(tmp_path, 100_000, "bfloat16")
    for process in seen:
        assert process["dtype"] == "torch.float32"
        assert (process["layout"], process["rejected"]) == ("shared", [])
    sums = torch.cat([torch.load(tmp_path / f"sums-{rank}.pt") for rank in range(2)])
    assert (sums.to(torch.bfloat16).float() != sums).any()


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
