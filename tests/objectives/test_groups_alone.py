"""Which objectives the engine may take group by group: those whose loss is the mean of the groups' own losses."""

from __future__ import annotations

import pytest
from objectives.random_groups import random_log_probs

from rrhf_peft.objectives import COUPLES_GROUPS, NEEDS_REFERENCE, OBJECTIVES
from rrhf_peft.records import ResponseLogProbs


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_loss_is_the_mean_of_its_groups_losses_unless_it_is_said_to_couple_them(name: str) -> None:
    sizes = [3, 5, 2, 4]
    log_probs, scores = random_log_probs(11, sizes)
    reference, _ = random_log_probs(12, sizes)
    options = {"reference": reference} if name in NEEDS_REFERENCE else {}
    whole, _ = OBJECTIVES[name](log_probs, scores, **options)
    alone = []
    for g in range(len(sizes)):
        mine = (log_probs.group == g).nonzero()[:, 0]

        def part(values: ResponseLogProbs, mine=mine) -> ResponseLogProbs:
            return ResponseLogProbs(*(value[mine] for value in values))._replace(group=mine * 0)

        options = {"reference": part(reference)} if options else {}
        alone.append(OBJECTIVES[name](part(log_probs), scores[mine], **options)[0].item())
    mean = sum(alone) / len(alone)
    if name in COUPLES_GROUPS:
        assert whole.item() != pytest.approx(mean, rel=1e-3)
    else:
        assert whole.item() == pytest.approx(mean, rel=1e-5)
