"""Reward models: the same score alone and in a batch, whatever the padding; whole or refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from reward_folders import llama_classifier, value_head_state
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from rrhf_peft.modeling import TokenBudget
from rrhf_peft.records import UserError
from rrhf_peft.score.reward_model import (
    RewardModel,
    TokenRow,
    label_index,
    load_sequence_classifier,
    load_value_head_model,
)

CPU = {"revision": None, "dtype": torch.float32, "device": torch.device("cpu")}
#: Lengths from one to many; the EOS (2) and the padding token (0) inside and at the end.
ROWS = [
    [7],
    [9, 2],
    [5, 6, 7, 8, 2],
    [11] * 40,
    [3, 0, 4],
    [20, 2, 30, 2, 2],
    list(range(3, 60)),
    [8, 8],
    [5, 7],
    [9, 0],
    [6, 1],
]


def scores(model, rows=ROWS, **options):
    return RewardModel(model, **options).score([TokenRow(row) for row in rows])


@pytest.fixture(params=[None, 0, 2, -1], ids=["no pad token", "pad", "pad is EOS", "pad is -1"])
def llama(request, tmp_path, tiny_model_folder):
    llama_classifier(tmp_path, tiny_model_folder, pad=None if request.param == -1 else request.param)
    if request.param == -1:
        values = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**values, "pad_token_id": -1}))
    return tmp_path


def test_alone_and_in_a_batch_are_the_models_own_scores(llama):
    model = load_sequence_classifier(str(llama), **CPU)
    own = AutoModelForSequenceClassification.from_pretrained(llama).eval()
    with torch.no_grad():
        expected = [own(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    assert len(set(expected)) > 4
    for tokens in (1, 100, 10_000):
        assert scores(model, batch_tokens=tokens) == pytest.approx(expected, abs=1e-6)
    assert model.config.pad_token_id == own.config.pad_token_id


def test_the_order_of_the_rows_changes_nothing(llama):
    model = load_sequence_classifier(str(llama), **CPU)
    assert scores(model, ROWS[::-1]) == pytest.approx(scores(model)[::-1], abs=1e-6)


def test_labels(tmp_path, tiny_model_folder):
    llama_classifier(tmp_path, tiny_model_folder, labels=3)
    model = load_sequence_classifier(str(tmp_path), **CPU)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row])).logits for row in ROWS]).double()
    shares = logits.softmax(1)
    assert scores(model, label=2) == pytest.approx((shares[:, 2] / (1 - shares[:, 2])).log().tolist(), abs=1e-5)
    assert scores(model, values=[0.0, 1.0, 5.0]) == pytest.approx((shares[:, 1] + 5 * shares[:, 2]).tolist(), abs=1e-5)
    assert label_index(model, "LABEL_1", None, "m") == 1
    assert label_index(model, 0, None, "m") == 0
    for arguments, message in (
        ((None, None), "has 3 labels .* scoring.scorer.label"),
        (("good", None), "no label 'good'"),
        ((3, None), "no label 3"),
        ((None, [1.0]), "1 values for the 3 labels"),
    ):
        with pytest.raises(UserError, match=message):
            label_index(model, *arguments, "m")


def test_a_checkpoint_without_its_score_head_is_an_error_that_names_it(tiny_model_folder):
    with pytest.raises(UserError, match=r"lacks 1 .*score\.weight.*lm_head\.weight"):
        load_sequence_classifier(str(tiny_model_folder), **CPU)


def test_a_score_that_is_no_number_is_an_error(tmp_path, tiny_model_folder):
    llama_classifier(tmp_path, tiny_model_folder)
    model = load_sequence_classifier(str(tmp_path), **CPU)
    with torch.no_grad():
        model.score.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="weights are damaged"):
        scores(model)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "with config"])
def test_value_heads_are_read_at_the_last_token(tmp_path, tiny_model_folder, kind):
    config, backbone, state = value_head_state(tiny_model_folder)
    base = tmp_path / "base"
    config.save_pretrained(base)
    folder = base if kind == "with config" else tmp_path / "rm"
    folder.mkdir(exist_ok=True)
    if kind == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    else:
        torch.save(state, folder / "hf_ckpt.pt")
    model = load_value_head_model(str(folder), base=None if kind == "with config" else str(base), **CPU)
    with torch.no_grad():
        expected = [
            (backbone(input_ids=torch.tensor([row]))[0][0, -1] @ state["v_head.weight"][0]).item() for row in ROWS
        ]
    for tokens in (1, 10_000):
        assert scores(model, batch_tokens=tokens) == pytest.approx(expected, abs=1e-5)


def test_a_value_head_checkpoint_is_whole_or_an_error(tmp_path, tiny_model_folder):
    config, _, state = value_head_state(tiny_model_folder)
    config.save_pretrained(tmp_path)
    for missing in ("v_head.weight", "transformer.h.1.mlp.fc_in.weight"):
        torch.save({key: value for key, value in state.items() if key != missing}, tmp_path / "hf_ckpt.pt")
        with pytest.raises(UserError, match=rf"lacks 1 \({re.escape(missing)}\)"):
            load_value_head_model(str(tmp_path), base=None, **CPU)
    torch.save({**state, "v_head.bias": torch.zeros(1)}, tmp_path / "hf_ckpt.pt")
    with pytest.raises(UserError, match=r"has unknown 1 \(v_head.bias\)"):
        load_value_head_model(str(tmp_path), base=None, **CPU)
    torch.save({**state, "v_head.weight": torch.zeros(1, 16)}, tmp_path / "hf_ckpt.pt")
    with pytest.raises(UserError, match="do not fit the architecture"):
        load_value_head_model(str(tmp_path), base=None, **CPU)


def bfloat16_ties(model, head, rows):
    """(rewards in float32, what a bfloat16 head would say) of hidden states that a bfloat16 backbone computed."""
    backbone, inputs = model.base_model if head == "score" else model.transformer, []
    with torch.no_grad():
        for row in rows:
            hidden = backbone(input_ids=torch.tensor([row]))[0][0, -1]
            assert hidden.dtype == torch.bfloat16
            inputs.append(hidden)
    weight = getattr(model, head).weight
    exact = [(hidden.double() @ weight.double().T).item() for hidden in inputs]
    rounded = [(hidden @ weight.bfloat16().T).item() for hidden in inputs]
    return exact, rounded


@pytest.mark.parametrize("layout", ["sequence_classification", "value_head"])
def test_the_head_of_a_bfloat16_model_computes_in_float32(tmp_path, tiny_model_folder, layout):
    """Rewards between 8 and 16, where bfloat16 knows multiples of 1/16 only."""
    options = {**CPU, "dtype": torch.bfloat16}
    if layout == "value_head":
        config, _, state = value_head_state(tiny_model_folder)
        config.save_pretrained(tmp_path)
        torch.save(state, tmp_path / "hf_ckpt.pt")
        model, head = load_value_head_model(str(tmp_path), base=None, **options), "v_head"
    else:
        llama_classifier(tmp_path, tiny_model_folder)
        model, head = load_sequence_classifier(str(tmp_path), **options), "score"
    rows = [[5, 6, 7, n % 90 + 3, n // 90 + 3] for n in range(120)]
    first, _ = bfloat16_ties(model, head, rows[:1])
    with torch.no_grad():
        getattr(model, head).weight.mul_(12.0 / first[0])  # a reward of 12, and others around it
    exact, rounded = bfloat16_ties(model, head, rows)
    near = [index for index, value in enumerate(exact) if 8 < abs(value) < 16]
    assert len(near) > 10
    assert len({rounded[index] for index in near}) < len({exact[index] for index in near})
    rewards = scores(model, rows)
    assert rewards == pytest.approx(exact, abs=1e-5)
    assert len(set(rewards)) == len(set(exact))


class _Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_with_code_is_not_run(tmp_path, tiny_model_folder, capsys):
    config, _, _ = value_head_state(tiny_model_folder)
    config.save_pretrained(tmp_path)
    torch.save({"v_head.weight": _Harmful()}, tmp_path / "hf_ckpt.pt")
    with pytest.raises(UserError, match="nothing else is unpickled"):
        load_value_head_model(str(tmp_path), base=None, **CPU)
    assert "run" not in capsys.readouterr().out


def test_batches_halve_when_memory_ends_and_lose_nothing():
    sizes = []

    def compute(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [10 * index for index in batch]

    budget = TokenBudget(160)
    assert budget.map([10] * 20, compute) == [10 * index for index in range(20)]
    assert sizes[:3] == [16, 8, 4]
    assert max(sizes[3:]) == 2
    assert budget.halvings == 3
    with pytest.raises(UserError, match="a text of 10 tokens does not fit"):
        TokenBudget(10).map([10], lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("")))
