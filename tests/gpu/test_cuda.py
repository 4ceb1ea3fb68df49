"""What only a GPU can show: 16-bit heads, FlexAttention, 4-bit kernels, peak memory. Run with `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from logprobs.batches import as_batch, random_groups
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rrhf_peft.logprobs import install, prove
from rrhf_peft.modeling import attach_adapter, load_base_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCABULARY = 3000


def llama(attention="sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).to("cuda", dtype).eval()


def batch(seed=0, sizes=(3, 6, 2)):
    return as_batch(random_groups(seed, sizes, VOCABULARY, longest_prompt=200, longest_response=90), device="cuda")


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_layout_agrees_with_the_models_own_logits(attention, dtype):
    model = llama(attention, dtype)
    engine = install(model, layout="shared", chunk_tokens=700)
    proof = prove(model, engine, batch(), fall_back=False)
    assert proof.layout == "shared"


def test_bfloat16_head_accumulates_in_float32():
    from rrhf_peft.logprobs.head import Head, token_log_probs

    torch.manual_seed(1)
    head = torch.nn.Linear(256, VOCABULARY, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(VOCABULARY, (64,), device="cuda")
    exact = torch.log_softmax(hidden.double() @ head.weight.double().t(), -1).gather(-1, targets[:, None])[:, 0]
    for trained in (False, True):
        head.weight.requires_grad_(trained)
        values = token_log_probs(hidden, targets, Head(head))
        assert values.dtype == torch.float32
        assert (values.double() - exact).abs().max() < 1e-4


def test_peak_memory_does_not_grow_with_k():
    model = get_peft_model(llama(dtype=torch.bfloat16), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    engine = install(model, chunk_tokens=1024)
    peaks = []
    for k in (4, 32):
        made = as_batch([([5] * 100, [[7] * 80 for _ in range(k)])], device="cuda")
        torch.cuda.reset_peak_memory_stats()
        engine.log_probs(model, made).sum.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.2 * peaks[0]


def test_nf4_base_trains(tiny_model_folder):
    model = attach_adapter(load_base_model(str(tiny_model_folder), quantization="nf4"), {"r": 8})
    engine = install(model)
    made = as_batch(random_groups(0, (3, 2), 250), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = -engine.log_probs(model, made).sum.mean()
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
