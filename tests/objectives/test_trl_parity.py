"""The siblings against TRL's own loss code, on the same log-probs, value and gradient, to 1e-5.

TRL computes its losses inside its trainers' methods. They are called here on trainers made without weights, with a
`model` that returns given log-probs or logits instead of computing them.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rrhf_peft.objectives import OBJECTIVES
from rrhf_peft.records import ResponseLogProbs

pytest.importorskip("trl")

#: Response lengths of four pairs, chosen and rejected; one of them a single token.
CHOSEN, REJECTED = [5, 1, 7, 4], [3, 6, 1, 4]
WIDTH, VOCABULARY = 9, 11


class Accelerator:
    """One process, on the CPU."""

    device = torch.device("cpu")

    def gather(self, values):
        return values

    gather_for_metrics = gather


def pairs_of(chosen, rejected):
    """Ranked groups of two from [B] sums; the chosen response stands second in every other group."""
    count = len(CHOSEN)
    sums, lengths, scores = [], [], []
    for i in range(count):
        pair = [(chosen[i], CHOSEN[i], 1.0), (rejected[i], REJECTED[i], 0.0)]
        for value, length, score in pair if i % 2 else pair[::-1]:
            sums.append(value)
            lengths.append(length)
            scores.append(score)
    group = torch.arange(count).repeat_interleave(2)
    lengths = torch.tensor(lengths)
    return ResponseLogProbs(torch.stack(sums), lengths, lengths + 1, group), torch.tensor(scores)


def masks(lengths):
    """Completion masks [B, WIDTH] of one-token prompts."""
    return torch.tensor([[0] + [1] * n + [0] * (WIDTH - 1 - n) for n in lengths])


def draw_token_log_probs(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    values = -3 * torch.rand(len(lengths), WIDTH - 1, generator=generator, dtype=torch.float64)
    return (values * masks(lengths)[:, 1:]).requires_grad_()


def outputs_of(token_log_probs):
    zeros = torch.zeros_like(token_log_probs)
    return SimpleNamespace(log_probs=token_log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trainer_without_weights(kind, **attributes):
    trainer = object.__new__(kind)
    defaults = {
        "model": SimpleNamespace(training=True),
        "accelerator": Accelerator(),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "label_smoothing": 0.0,
    }
    trainer.__dict__.update({**defaults, **attributes})
    return trainer


def compare(ours, theirs, inputs):
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5, rel=1e-5)
    mine = torch.autograd.grad(ours, inputs, retain_graph=True)
    other = torch.autograd.grad(theirs, inputs, retain_graph=True)
    for a, b in zip(mine, other, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "name", "beta", "options"),
    [
        ("sigmoid", "dpo", 0.1, {}),
        ("sigmoid", "dpo", 0.7, {"pairs": "best_worst"}),
        ("sigmoid", "odpo", 0.3, {"alpha": 0.0}),
        ("sigmoid", "plackett_luce", 0.3, {"length_penalty": 0.0}),
        ("sigmoid_norm", "plackett_luce", 0.3, {"length_penalty": 1.0}),
        ("nca_pair", "nca", 0.3, {"alpha": 1e-3}),
        ("sigmoid", "mpo", 0.3, {}),
        ("sigmoid", "info_nca", 0.3, {"alpha": 1e-3}),
        ("ipo", "ipo", 0.1, {}),
        ("ipo", "ipo", 0.6, {}),
        ("hinge", "hinge", 0.1, {"sft_weight": 0.0}),
        ("hinge", "hinge", 0.9, {"sft_weight": 0.0}),
    ],
    ids=str,
)
def test_dpo_trainer(loss_type, name, beta, options):
    from trl import DPOTrainer

    tokens = draw_token_log_probs([*CHOSEN, *REJECTED], 1)
    reference = draw_token_log_probs([*CHOSEN, *REJECTED], 2).detach().sum(1)
    trainer = trainer_without_weights(
        DPOTrainer,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
    )
    mask = masks([*CHOSEN, *REJECTED])
    batch = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[: len(CHOSEN)],
        "ref_rejected_logps": reference[len(CHOSEN) :],
    }
    theirs = trainer._compute_loss(lambda **_: outputs_of(tokens), batch, return_outputs=False)

    log_probs, scores = pairs_of(*tokens.sum(1).chunk(2))
    its_reference, _ = pairs_of(*reference.chunk(2))
    ours, metrics = OBJECTIVES[name](log_probs, scores, reference=its_reference, beta=beta, **options)
    compare(ours, theirs, [tokens])
    if name in ("dpo", "ipo", "hinge"):
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            mean = (metrics[key].total / metrics[key].weight).item()
            assert mean == pytest.approx(trainer._metrics["train"][key][0], abs=1e-5), key


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.6)])
def test_kto_trainer(loss_type, weights):
    """TRL's reference point comes from mismatched pairs; given that number, the losses agree."""
    from trl import KTOTrainer

    lengths = [*CHOSEN, *REJECTED]
    tokens = draw_token_log_probs(lengths, 3)
    mismatched = draw_token_log_probs(lengths, 4).detach()
    reference = draw_token_log_probs(lengths, 5).detach().sum(1)
    trainer = trainer_without_weights(
        KTOTrainer,
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=True,
        loss_type=loss_type,
        beta=0.2,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    mask = masks(lengths)
    batch = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.full_like(mask, 2),
        "KL_attention_mask": torch.ones_like(mask),
        "KL_completion_mask": mask,
        "label": torch.tensor([True] * len(CHOSEN) + [False] * len(REJECTED)),
        "ref_logps": reference,
        "ref_KL_logps": mismatched.sum(1) - 0.8,
    }

    def model(input_ids, **_):
        return outputs_of(mismatched if bool((input_ids == 2).all()) else tokens)

    theirs = trainer._compute_loss(model, batch, return_outputs=False)
    z0 = trainer._metrics["train"]["kl"][0]
    assert z0 == pytest.approx(0.8 if loss_type == "kto" else 0.0)

    log_probs, scores = pairs_of(*tokens.sum(1).chunk(2))
    its_reference, _ = pairs_of(*reference.chunk(2))
    for threshold in ("group_mean", 0.5):
        ours, metrics = OBJECTIVES["kto"](
            log_probs,
            scores,
            reference=its_reference,
            beta=0.2,
            desirable_weight=weights[0],
            undesirable_weight=weights[1],
            threshold=threshold,
            reference_point=z0,
        )
        compare(ours, theirs, [tokens])
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        mean = (metrics[key].total / metrics[key].weight).item()
        assert mean == pytest.approx(trainer._metrics["train"][key][0], abs=1e-5), key


def loss_of_pairs(kind, logits, ids, **attributes):
    """The mean of TRL's loss over batches of one pair: its fine-tuning part is a mean over a batch's tokens."""
    trainer = trainer_without_weights(kind, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **attributes)
    losses = []
    for i, sizes in enumerate(zip(CHOSEN, REJECTED, strict=True)):
        batch = {}
        for side, n in zip(("chosen", "rejected"), sizes, strict=True):
            row = ids[side][i, : n + 1]
            batch[f"{side}_input_ids"] = row[None]
            batch[f"{side}_attention_mask"] = torch.ones_like(row)[None]
            batch[f"{side}_labels"] = torch.cat([torch.tensor([-100]), row[1:]])[None]
        longest = max(sizes) + 1
        both = torch.stack([logits["chosen"][i, :longest], logits["rejected"][i, :longest]])
        loss, _ = trainer.get_batch_loss_metrics(lambda *_, out=both, **__: SimpleNamespace(logits=out), batch)
        losses.append(loss)
    return torch.stack(losses).mean()


def logits_and_ids():
    generator = torch.Generator().manual_seed(7)
    shape = (len(CHOSEN), WIDTH, VOCABULARY)
    logits = {side: torch.randn(shape, generator=generator).requires_grad_() for side in ("chosen", "rejected")}
    ids = {side: torch.randint(1, VOCABULARY, shape[:2], generator=generator) for side in logits}
    return logits, ids


def sums_of(logits, ids, lengths):
    values = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (values * masks(lengths)[:, 1:]).sum(1)


@pytest.mark.parametrize(
    ("attributes", "name", "options"),
    [
        ({"loss_type": "sigmoid", "cpo_alpha": 1.0}, "cpo", {}),
        ({"loss_type": "sigmoid", "cpo_alpha": 0.3, "label_smoothing": 0.2, "beta": 0.5}, "cpo", {"sft_weight": 0.3}),
        ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 2.0}, "simpo", {"gamma": 0.5}),
        ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.4, "beta": 2.5}, "simpo", {"gamma": 1.4}),
        ({"loss_type": "hinge", "cpo_alpha": 1.0}, "hinge", {}),
        ({"loss_type": "hinge", "cpo_alpha": 0.0, "beta": 0.6}, "hinge", {"sft_weight": 0.0}),
    ],
    ids=str,
)
def test_cpo_trainer(attributes, name, options):
    from trl.experimental.cpo import CPOTrainer

    logits, ids = logits_and_ids()
    attributes = {"beta": 0.1, "alpha": 0.0, "simpo_gamma": 0.5, **attributes}
    theirs = loss_of_pairs(CPOTrainer, logits, ids, **attributes)
    log_probs, scores = pairs_of(
        sums_of(logits["chosen"], ids["chosen"], CHOSEN), sums_of(logits["rejected"], ids["rejected"], REJECTED)
    )
    if attributes.get("label_smoothing"):
        options = {**options, "label_smoothing": attributes["label_smoothing"]}
    ours, _ = OBJECTIVES[name](log_probs, scores, beta=attributes["beta"], **options)
    compare(ours, theirs, list(logits.values()))


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_orpo_trainer(beta):
    """Prompts of one token, so that TRL's fine-tuning part, which takes the prompt in, is the response's."""
    from trl.experimental.orpo import ORPOTrainer

    logits, ids = logits_and_ids()
    theirs = loss_of_pairs(ORPOTrainer, logits, ids, beta=beta)
    log_probs, scores = pairs_of(
        sums_of(logits["chosen"], ids["chosen"], CHOSEN), sums_of(logits["rejected"], ids["rejected"], REJECTED)
    )
    ours, _ = OBJECTIVES["orpo"](log_probs, scores, beta=beta)
    compare(ours, theirs, list(logits.values()))


def test_three_steps_beside_the_real_dpo_trainer(tiny_model_folder, tmp_path):
    """The same pairs, model and optimizer: tokens, log-probs, reference and update agree, not the formula alone."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from rrhf_peft.records import TokenizedGroup
    from rrhf_peft.train.config import RRHFConfig
    from rrhf_peft.train.trainer import RRHFTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    rows = [
        {"prompt": "say it:", "chosen": " yes", "rejected": " no, never"},
        {"prompt": "the cat sat on", "chosen": " the mat and slept", "rejected": " it"},
        {"prompt": "one two", "chosen": " three", "rejected": " tree"},
        {"prompt": "a", "chosen": " b", "rejected": " z z z z"},
    ]
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    theirs = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        args=DPOConfig(str(tmp_path / "trl"), beta=0.5, precompute_ref_log_probs=True, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs.train()

    del settings["gradient_checkpointing"]
    groups = [
        TokenizedGroup(
            tokenizer(row["prompt"])["input_ids"],
            [tokenizer(row[side])["input_ids"] + [tokenizer.eos_token_id] for side in ("rejected", "chosen")],
            [0.0, 1.0],
            ["a", "a"],
            index,
        )
        for index, row in enumerate(rows)
    ]
    ours = RRHFTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        args=RRHFConfig(str(tmp_path / "ours"), objective="dpo", objective_options={"beta": 0.5}, **settings),
        train_dataset=groups,
        processing_class=tokenizer,
    )
    ours.train()
    curves = [[line for line in trainer.state.log_history if "loss" in line] for trainer in (ours, theirs)]
    assert len(curves[0]) == len(curves[1]) == 3
    assert curves[0][2]["loss"] < 0.6
    for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        got, expected = ([line[name] for line in curve] for curve in curves)
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5), name
