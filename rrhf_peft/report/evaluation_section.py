"""What the report says of an evaluation: the result in words, the table in the paper's form, plots and examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rrhf_peft.evaluate.folder import EvaluationFolder, PolicyNumbers, WinRow
from rrhf_peft.evaluate.plots import Plot, evaluation_plots
from rrhf_peft.evaluate.statistics import Interval
from rrhf_peft.plotting import WIDTH, Style
from rrhf_peft.report.blocks import Examples, Paragraph, Pictures, Section, Table, TableRow, picture
from rrhf_peft.report.examples import examples
from rrhf_peft.report.numbers import MISSING, count, duration, estimate, is_number, memory, number

_EXAMPLES = 8
_WIDE_PLOTS = {"reward_histogram"}

_CAPTIONS = {
    "reward": "Mean over prompts; the line is the bootstrap interval.",
    "reward_perplexity": "Up is better rewarded, left is more fluent. Reward that is bought with perplexity "
    "is over-optimisation.",
    "best_of_n": "Mean over prompts of the best of n responses' reward.",
    "wins": "Of answer pairs: response i to a prompt against the other's response i; every prompt weighs the same.",
    "reward_histogram": "Rewards of single responses; dashed lines are means.",
}


class _Column(NamedTuple):
    title: str
    meaning: str
    cell: Callable[[str, PolicyNumbers], str]


def _is_wide(plot: Plot) -> bool:
    """Whether it takes the page's whole width: a histogram of one or two policies is drawn for half of it."""
    return plot.name in _WIDE_PLOTS and bool(plot.figure.get_figwidth() > WIDTH)


def evaluation_section(
    name: str, evaluation: EvaluationFolder, look: Mapping[str, Style], anchor: str, *, title: str
) -> Section:
    """One evaluation, or the joined ones of all rounds."""
    blocks: list[Any] = [Paragraph(sentence) for sentence in in_words(evaluation)]
    blocks += [
        table
        for columns, heading in ((_paper_columns(evaluation), ""), (_text_columns(), "More about texts and order"))
        if (table := _table(evaluation, look, columns, heading)) is not None
    ]
    drawn = list(evaluation_plots(evaluation, look))
    for wide in (False, True):
        pictures = [
            picture(plot.figure, plot.description, _CAPTIONS.get(plot.name, ""), wide=wide)
            for plot in drawn
            if _is_wide(plot) is wide
        ]
        if pictures:
            blocks.append(Pictures(pictures))
    wanted = evaluation.settings.get("examples", _EXAMPLES)
    shown = examples(evaluation, look, wanted=wanted if isinstance(wanted, int) else _EXAMPLES)
    if shown:
        blocks.append(
            Paragraph(
                f"Side by side: {len(shown)} prompts at even distances through the list, with the first response of "
                f"each policy and its reward by {evaluation.headline}. They were not chosen by their looks.",
                small=True,
            )
        )
        blocks.append(Examples(shown))
    return Section(title, anchor, blocks)


def in_words(evaluation: EvaluationFolder) -> list[str]:
    """The result in a few sentences, of what was measured only."""
    label = evaluation.headline
    rewards = evaluation.rewards(label) if label is not None else {}
    if not rewards:
        return []
    first = next(iter(evaluation.policies))
    best = max(rewards, key=lambda name: rewards[name].mean)
    said = []
    prompts = _prompts(evaluation)
    on = f"On {prompts:,} held-out prompts, " if prompts else ""
    if len(rewards) == 1:
        said.append(f"{on}{best} has a mean reward of {_spoken(evaluation, best)} by {label}.")
    elif best == first:
        said.append(
            f"{on}no policy is rewarded higher by {label} than {first}, whose mean is {_spoken(evaluation, best)}."
        )
    else:
        than = f", against {_spoken(evaluation, first)} of {first}" if first in rewards else ""
        said.append(f"{on}{best} has the highest mean reward by {label}: {_spoken(evaluation, best)}{than}.")
        if first in rewards and label is not None:
            said.append(_apart(evaluation.difference(best, first, label)))
    for row in evaluation.wins:
        if row.policy == best:
            won, tied, lost = _shares(row)
            by = "" if row.by == label else f" by {row.by}"
            said.append(f"It wins {won} of the answer pairs against {row.against}{by}, ties {tied} and loses {lost}.")
    own, other = evaluation.policies[best].perplexity, evaluation.policies[first].perplexity
    if best != first and is_number(own) and is_number(other):
        said.append(f"The perplexity of its text is {number(own)}, that of {first}'s {number(other)}.")
    return [" ".join(part for part in said if part)]


def _apart(difference: Interval | None) -> str:
    """Of rewards on the same prompts: whether their difference may be chance."""
    if difference is None or not (is_number(difference.low) and is_number(difference.high)):
        return ""
    said = f"On the same prompts it has {number(difference.mean)} more ({number(difference.low)} to "
    said += f"{number(difference.high)})"
    return said + (": the difference may be chance." if difference.low <= 0 <= difference.high else ".")


def _spoken(evaluation: EvaluationFolder, name: str) -> str:
    assert evaluation.headline is not None
    value = evaluation.rewards(evaluation.headline)[name]
    if not (is_number(value.low) and is_number(value.high)):
        return number(value.mean)
    return f"{number(value.mean)} ({_confidence(evaluation)}interval {number(value.low)} to {number(value.high)})"


def _confidence(evaluation: EvaluationFolder) -> str:
    share = evaluation.settings.get("confidence", math.nan)
    return f"{100 * share:g}% " if is_number(share) else ""


def _prompts(evaluation: EvaluationFolder) -> int | None:
    first = next(iter(evaluation.policies))
    assert evaluation.headline is not None
    rows = evaluation.scored_rows(first, evaluation.headline)
    return len(rows) if rows else None


def _shares(row: WinRow) -> tuple[str, str, str]:
    total = row.win + row.tie + row.lose
    won, tied, lost = (f"{100 * value / total:.0f}%" for value in (row.win, row.tie, row.lose))
    return won, tied, lost


def _table(evaluation: EvaluationFolder, look: Mapping[str, Style], columns: list[_Column], title: str) -> Table | None:
    """Columns without a single number are left out; None where no column is left."""
    cells = {column: [column.cell(name, own) for name, own in evaluation.policies.items()] for column in columns}
    kept = [column for column in columns if any(cell != MISSING for cell in cells[column])]
    if not kept:
        return None
    rows = [
        TableRow([name, *(cells[column][place] for column in kept)], look[name].color)
        for place, name in enumerate(evaluation.policies)
    ]
    legend = [(column.title, column.meaning) for column in kept if column.meaning]
    return Table(["policy", *(column.title for column in kept)], rows, legend, title)


def _paper_columns(evaluation: EvaluationFolder) -> list[_Column]:
    interval = f"in brackets the {_confidence(evaluation)}bootstrap interval"
    columns = [
        _Column(f"reward, {label}", f"mean over prompts, {interval}", _reward_cell(label))
        for label in evaluation.labels()
    ]
    columns += [
        _Column("perplexity", "of the policy's answers under the judge model", lambda _, own: number(own.perplexity)),
        _Column(
            "pair accuracy",
            "share of labelled pairs that the policy's own log-prob per token orders right",
            lambda _, own: estimate(_pair_accuracy(own)),
        ),
    ]
    for against, by in dict.fromkeys((row.against, row.by) for row in evaluation.wins):
        columns.append(
            _Column(
                f"win / tie / lose v. {against}",
                f"of answer pairs, every prompt weighing the same, by {by}",
                _wins_cell(evaluation, against, by, lambda row: " / ".join(_shares(row))),
            )
        )
        columns.append(
            _Column(
                f"win rate at equal length v. {against}",
                f"by {by}; a tie counts half",
                _wins_cell(evaluation, against, by, lambda row: _percent(row.length_controlled_win_rate)),
            )
        )
    return [
        *columns,
        _Column("words", "mean length of an answer", lambda _, own: number(own.words, ".1f")),
        _Column("training", "wall time", lambda _, own: duration(own.train.seconds if own.train is not None else None)),
        _Column(
            "peak memory",
            "of training",
            lambda _, own: memory(own.train.peak_memory_gib if own.train is not None else None),
        ),
    ]


def _text_columns() -> list[_Column]:
    return [
        _Column("responses", "", lambda _, own: count(own.responses)),
        _Column("tokens", "mean length of an answer", lambda _, own: number(own.tokens, ".1f")),
        _Column("unfinished", "answers cut at the limit", lambda _, own: _percent(own.unfinished)),
        _Column("distinct-1", "different words over all words", lambda _, own: number(own.distinct_1, ".3f")),
        _Column("distinct-2", "different pairs of words over all", lambda _, own: number(own.distinct_2, ".3f")),
        _Column("repetition", "within an answer", lambda _, own: number(own.repetition, ".3f")),
        _Column(
            "reference perplexity",
            "of reference answers under the policy",
            lambda _, own: number(own.reference_perplexity),
        ),
        _Column(
            "Kendall's tau",
            "between labelled scores and the policy's log-probs",
            lambda _, own: number(own.preference.kendall_tau if own.preference is not None else None),
        ),
        _Column(
            "best found",
            "groups whose best response the policy finds likeliest",
            lambda _, own: _percent(own.preference.best_hit_rate if own.preference is not None else None),
        ),
        _Column(
            "labelled pairs", "", lambda _, own: count(own.preference.pairs if own.preference is not None else None)
        ),
    ]


def _reward_cell(label: str) -> Callable[[str, PolicyNumbers], str]:
    def cell(_: str, own: PolicyNumbers) -> str:
        return estimate(own.rewards[label].interval() if label in own.rewards else None)

    return cell


def _wins_cell(
    evaluation: EvaluationFolder, against: str, by: str, say: Callable[[WinRow], str]
) -> Callable[[str, PolicyNumbers], str]:
    rows = {row.policy: row for row in evaluation.wins if (row.against, row.by) == (against, by)}

    def cell(name: str, _: PolicyNumbers) -> str:
        return say(rows[name]) if name in rows else MISSING

    return cell


def _pair_accuracy(own: PolicyNumbers) -> Any:
    if own.preference is None or own.preference.pair_accuracy is None:
        return None
    return own.preference.pair_accuracy.interval()


def _percent(share: float | None) -> str:
    return MISSING if not is_number(share) or share is None else f"{100 * share:.0f}%"
