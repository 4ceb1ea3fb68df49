"""From Python: what cannot be is said when the config or the trainer is made, and the log stays short."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rrhf_peft.objectives import OBJECTIVES
from rrhf_peft.records import ResponseLogProbs, TokenizedGroup, UserError
from rrhf_peft.train.config import RRHFConfig
from rrhf_peft.train.trainer import MOST_SOURCES, RRHFTrainer, source_metrics


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "dpoo"}, r"there is no 'dpoo'; did you mean '[ioc]?dpo'\?"),
        ({"objective_options": {"rank_wieght": 2.0}}, r"no option 'rank_wieght'; did you mean 'rank_weight'\?"),
        ({"objective": "dpo", "objective_options": {"reference": None}}, "dpo has no option 'reference'"),
        ({"objective_options": {"variant": "papper"}}, r"variant 'papper' of rrhf cannot be: .*'paper'"),
        ({"objective": "dpo", "objective_options": {"beta": -1.0}}, "beta -1.0 of dpo cannot be: .*greater than 0"),
        ({"objective_options": {"margin": "wide"}}, "margin 'wide' of rrhf cannot be"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_when_the_config_is_made(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        RRHFConfig(str(tmp_path), **fields)


def test_an_objective_added_in_python_needs_no_recipe_section(tmp_path, monkeypatch):
    def best_minus_worst(log_probs, scores, *, reference=None, scale=1.0):
        raise NotImplementedError

    monkeypatch.setitem(OBJECTIVES, "best_minus_worst", best_minus_worst)
    RRHFConfig(str(tmp_path), objective="best_minus_worst", objective_options={"scale": 2.0})
    with pytest.raises(UserError, match=r"no option 'scael'; did you mean 'scale'\?"):
        RRHFConfig(str(tmp_path), objective="best_minus_worst", objective_options={"scael": 2.0})


@pytest.mark.parametrize("short", ["rows", "tokens"])
def test_short_scores_are_refused_when_the_trainer_is_made(tmp_path, tiny_model_folder, short):
    data = {
        "rows": [{"prompt": "say:", "responses": ["one", "two", "three"], "scores": [1.0, 2.0]}],
        "tokens": [TokenizedGroup([5, 6], [[7], [8], [9]], [1.0, 2.0], ["a", "b", "c"], 0)],
    }[short]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with pytest.raises(UserError, match=r"(scores has 2 entries for 3 responses|3 responses, 2 scores)"):
        RRHFTrainer(model, RRHFConfig(str(tmp_path), use_cpu=True), data)


def test_many_sources_are_few_metrics():
    """36 responses that nobody named: the most frequent are logged, the rest together, and nothing is counted twice."""
    sums, tokens = torch.arange(-36.0, 0.0), torch.full((36,), 2)
    log_probs = ResponseLogProbs(sums, tokens, tokens, torch.zeros(36, dtype=torch.int64))
    names = [f"response-{i}" for i in range(36)]
    metrics = source_metrics(log_probs, torch.arange(36), names)
    assert len(metrics) == MOST_SOURCES + 1
    assert sum(mean.weight for mean in metrics.values()) == 36
    assert sum(mean.total for mean in metrics.values()) == sums.sum() / 2
    assert len(source_metrics(log_probs, torch.arange(36) % 3, names[:3])) == 3
