"""The `objective:` section: one class per loss, told apart by `name`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from rrhf_peft.recipe.section import Section


def takes_from_base(init_lora_weights: object) -> bool:
    """Whether this initialisation moves a part of the base weights into the adapter.

    With such an adapter switched off, neither the base nor the starting policy is left.
    """
    return str(init_lora_weights).lower().startswith(("pissa", "olora", "loftq", "corda", "lora_ga"))


class RRHFObjective(Section):
    """The RRHF loss (arXiv 2304.05302), Eq. 1-5."""

    name: Literal["rrhf"] = "rrhf"
    variant: Literal["balanced", "paper", "released"] = Field(
        "balanced",
        description="balanced: Eq. 1-2 and a mean SFT loss. paper: Eq. 1-5 to the letter. released: the released "
        "code's arithmetic, which divides by the padded length.",
    )
    rank_weight: float = Field(1.0, ge=0, description="Weight of the ranking loss.")
    sft_weight: float = Field(1.0, ge=0, description="Weight of the fine-tuning loss on the best response.")
    length_penalty: float = Field(1.0, ge=0, description="Exponent a of |y| in Eq. 1.")
    margin: float = Field(0.0, description="Added inside the hinge of Eq. 2.")
    min_score_gap: float = Field(0.0, ge=0, description="Only pairs whose scores differ by more than this count.")
    pair_function: Literal["hinge", "logistic"] = Field(
        "hinge", description="hinge: max(0, d). logistic: log(1 + exp(d))."
    )
    pair_reduction: Literal["sum", "mean"] = Field("sum", description="Over the ordered pairs of a group.")
    sft_reduction: Literal["sum", "mean"] | None = Field(
        None, description="Over the best response's tokens. Unset: sum for paper, mean for balanced."
    )
    tied_best: Literal["first", "mean"] = Field(
        "first", description="Fine-tuning target when several responses share the best score."
    )


class SFTObjective(Section):
    """Fine-tuning on the best response only."""

    name: Literal["sft"]
    sft_reduction: Literal["sum", "mean"] = Field("mean", description="Over the best response's tokens.")
    tied_best: Literal["first", "mean"] = Field("first", description="Target when several share the best score.")


class _RankedObjective(Section):
    """What every objective on ordered pairs can be told."""

    pairs: Literal["all", "best_worst", "best_vs_rest"] = Field(
        "all", description="Which ordered pairs of a group: all, the best with the worst, or the best with each other."
    )
    min_score_gap: float = Field(0.0, ge=0, description="Only pairs whose scores differ by more than this count.")


class _WithReference(Section):
    """Objectives that cannot do without a reference policy."""

    reference: Literal["auto", "adapter_off", "cached"] = Field(
        "auto",
        description="Reference log-probs. adapter_off: the base, by a second forward pass with the adapter off. "
        "cached: the policy that training starts from, by one pass over the data before it. auto: adapter_off for a "
        "new adapter, else cached.",
    )


class _MayHaveReference(Section):
    """Objectives with and without a reference policy."""

    reference: Literal["none", "auto", "adapter_off", "cached"] = Field(
        "none", description="none: log-probs themselves are compared. Otherwise log-ratios; choices as for dpo."
    )


class DPOObjective(_RankedObjective, _WithReference):
    """Direct preference optimization (arXiv 2305.18290), Eq. 7."""

    name: Literal["dpo"]
    beta: float = Field(0.1, gt=0, description="How hard the policy is held to the reference.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs thought to be labelled wrongly.")


class IPOObjective(_RankedObjective, _WithReference):
    """Identity preference optimization (arXiv 2310.12036), Eq. 17."""

    name: Literal["ipo"]
    beta: float = Field(0.1, gt=0, description="tau: the difference of log-ratios is drawn to 1 / (2 beta).")
    average_log_prob: bool = Field(True, description="Log-ratios per token, as TRL does; false: sums, as the paper.")


class ODPOObjective(_RankedObjective, _WithReference):
    """DPO with an offset from the score gap (arXiv 2402.10571)."""

    name: Literal["odpo"]
    beta: float = Field(0.1, gt=0, description="How hard the policy is held to the reference.")
    alpha: float = Field(1.0, ge=0, description="How much the score gap counts; 0 is dpo.")
    offset: Literal["log", "linear"] = Field("log", description="alpha * log(gap), or alpha * gap.")


class SimPOObjective(_RankedObjective):
    """Simple preference optimization (arXiv 2405.14734), Eq. 6."""

    name: Literal["simpo"]
    beta: float = Field(2.0, gt=0, description="Scales the mean log-prob per token.")
    gamma: float = Field(0.5, description="Margin between two rewards (TRL's simpo_gamma).")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs thought to be labelled wrongly.")


class ORPOObjective(_RankedObjective):
    """Odds ratio preference optimization (arXiv 2403.07691), Eq. 6."""

    name: Literal["orpo"]
    beta: float = Field(0.1, ge=0, description="lambda: weight of the odds ratio loss beside the fine-tuning loss.")
    tied_best: Literal["first", "mean"] = Field("first", description="Target when several share the best score.")


class _WithFineTuning(Section):
    """A ranking loss beside a weighted fine-tuning loss on the best response."""

    sft_weight: float = Field(1.0, ge=0, description="Weight of the fine-tuning loss on the best response.")
    sft_reduction: Literal["sum", "mean"] = Field("mean", description="Over the best response's tokens.")
    tied_best: Literal["first", "mean"] = Field("first", description="Target when several share the best score.")


class CPOObjective(_RankedObjective, _WithFineTuning):
    """Contrastive preference optimization (arXiv 2401.08417), Eq. 3; `sft_weight` is TRL's cpo_alpha."""

    name: Literal["cpo"]
    beta: float = Field(0.1, gt=0, description="Scales the difference of summed log-probs.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs thought to be labelled wrongly.")


class KTOObjective(_WithReference):
    """Kahneman-Tversky optimization (arXiv 2402.01306), Eq. 7."""

    name: Literal["kto"]
    beta: float = Field(0.1, gt=0, description="How hard the policy is held to the reference.")
    desirable_weight: float = Field(1.0, ge=0, description="lambda_D.")
    undesirable_weight: float = Field(1.0, ge=0, description="lambda_U.")
    threshold: Literal["group_mean"] | float = Field(
        "group_mean", description="Scores above are desirable, those below not: a number, or each group's mean."
    )
    reference_point: Literal["batch", "group"] | Annotated[float, Field(ge=0)] = Field(
        "batch", description="z0: mean log-ratio of the micro-batch or of the group, at least 0; or a number of nats."
    )


class HingeObjective(_RankedObjective, _WithFineTuning, _MayHaveReference):
    """SLiC-HF (arXiv 2305.10425); with a reference and sft_weight 0, TRL's hinge form of DPO."""

    name: Literal["hinge"]
    beta: float = Field(1.0, gt=0, description="Scales log-probs, or log-ratios, before they are compared.")
    margin: float = Field(1.0, ge=0, description="delta inside the hinge.")
    length_penalty: float = Field(0.0, ge=0, description="Log-probs are divided by |y| to this power.")


class PlackettLuceObjective(_MayHaveReference):
    """The likelihood of the whole ranking (DPO's appendix A.3, LiPO's list-MLE)."""

    name: Literal["plackett_luce"]
    beta: float = Field(1.0, gt=0, description="Scales log-probs, or log-ratios, before they are compared.")
    length_penalty: float = Field(1.0, ge=0, description="Log-probs are divided by |y| to this power.")
    top_k: int | None = Field(None, ge=1, description="Only the first this many ranks. Unset: all.")


class PROObjective(_WithFineTuning):
    """Preference ranking optimization (arXiv 2306.17492)."""

    name: Literal["pro"]
    temperature: Literal["score_gap", "none"] = Field(
        "score_gap", description="score_gap: a contrast counts by its difference in score. none: all alike."
    )
    sft_weight: float = Field(0.05, ge=0, description="Weight of the fine-tuning loss, times (k - 1)^2.")
    sft_reduction: Literal["sum", "mean"] = Field("sum", description="Over the best response's tokens.")


ObjectiveSection = Annotated[
    RRHFObjective
    | SFTObjective
    | DPOObjective
    | IPOObjective
    | ODPOObjective
    | SimPOObjective
    | ORPOObjective
    | CPOObjective
    | KTOObjective
    | HingeObjective
    | PlackettLuceObjective
    | PROObjective,
    Field(discriminator="name"),
]

#: What `objective.name` may be.
OBJECTIVE_NAMES = frozenset(
    section.model_fields["name"].annotation.__args__[0] for section in get_args(get_args(ObjectiveSection)[0])
)


def reference_contradictions(
    objective: Section, *, adapter: bool, init_lora_weights: Any, online: bool
) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and how to fix it) for a reference policy that cannot be had.

    Args:
        objective: the section.
        adapter: whether an adapter is trained, a new one or one that is there already.
        init_lora_weights: of a new adapter.
        online: whether training makes new responses.
    """
    reference = getattr(objective, "reference", "none")
    if reference == "adapter_off" and not adapter:
        yield "objective.reference", "adapter_off needs an adapter, and all weights are trained; use cached"
    if reference == "adapter_off" and takes_from_base(init_lora_weights):
        yield (
            "objective.reference",
            f"adapter.init_lora_weights {init_lora_weights} moves a part of the base into the adapter, so that with "
            "the adapter off another model is left; use cached",
        )
    if reference == "cached" and online:
        yield "objective.reference", "online training makes new responses, which no cache holds; use adapter_off"
