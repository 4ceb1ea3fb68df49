"""Looking at data: one training example token by token, and a picture of scores by source and by length."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rrhf_peft.data.report import ranked_statistics
from rrhf_peft.plotting import HUES, WIDE, new_figure, shortened, styled
from rrhf_peft.records import RankedGroup, TokenizedGroup, UserError

#: Alternating styles, so that neighbouring tokens are told apart; dim where the loss does not look.
_PROMPT_STYLES = ("dim", "dim italic")
_RESPONSE_STYLES = ("black on bright_green", "black on bright_cyan")
_SPECIAL_STYLE = "bold magenta"

#: Responses of a group that are shown; of more, the best and the worst.
_RESPONSES_SHOWN = 8


def render_example(
    group: RankedGroup,
    tokenized: TokenizedGroup,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens_shown: int = 120,
) -> RenderableType:
    """The prompt and each response of one group: role, source, score, loss mask, and tokens between bars.

    Mask 0: the tokens are only conditioned on. Mask 1: their log-probs make the response's score.
    Sequences longer than `max_tokens_shown` show as many tokens of both ends together.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("who", width=20, overflow="fold")
    table.add_column("mask", justify="center")
    table.add_column("tokens", overflow="fold", ratio=1)
    table.add_row(
        _who("prompt", [f"{len(tokenized.prompt_ids):,} tokens", "shared"]),
        "0",
        _tokens(tokenized.prompt_ids, tokenizer, _PROMPT_STYLES, max_tokens_shown),
    )
    best = max(tokenized.scores)
    ends = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    shown = _shown(tokenized.scores)
    for index, ids in enumerate(tokenized.response_ids):
        if index not in shown:
            continue
        score = tokenized.scores[index]
        facts = [tokenized.sources[index], f"score {score:.4g}" + (" (best)" if score == best else "")]
        if ids[-1] not in ends:
            facts.append("cut: no end")
        table.add_row()
        table.add_row(
            _who(f"response {index + 1}", [*facts, f"{len(ids):,} tokens"]),
            "1",
            _tokens(ids, tokenizer, _RESPONSE_STYLES, max_tokens_shown),
        )
    origin = "".join(f", {name} {value}" for name, value in group.origin.items())
    title = Text(f"Example: group {tokenized.index}{_visible(origin)}", style="bold underline")
    read, kept = len(group.responses), len(tokenized.response_ids)
    count = f"{kept} responses to rank, {read} read"
    if len(shown) < kept:
        count += f"; shown are the best {len(shown) - len(shown) // 2} and the worst {len(shown) // 2}"
    return Group(title, Text(count), Text(), table)


def _shown(scores: Sequence[float]) -> set[int]:
    """Which responses are shown: all, or of many the best and the worst, the earlier of equal ones first."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    if len(order) <= _RESPONSES_SHOWN:
        return set(order)
    half = _RESPONSES_SHOWN // 2
    return {*order[:half], *order[-half:]}


def _who(role: str, facts: Sequence[str]) -> Text:
    return Text.assemble((role, "bold"), *(f"\n{_visible(fact)}" for fact in facts))


def _tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, styles: tuple[str, str], limit: int) -> Text:
    text = Text("|")
    special = set(tokenizer.all_special_ids)
    head = (limit + 1) // 2
    for index, token in enumerate(ids):
        if len(ids) > limit and head <= index < len(ids) - (limit - head):
            if index == head:
                text.append(f" ... {len(ids) - limit:,} more ... |", style="italic")
            continue
        text.append(_token(token, tokenizer), style=_SPECIAL_STYLE if token in special else styles[index % 2])
        text.append("|")
    return text


def _token(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """One token as text. SentencePiece marks a word's beginning with U+2581, which decoding one token loses."""
    piece = tokenizer.convert_ids_to_tokens(token)
    text = str(tokenizer.decode([token]))
    if isinstance(piece, str) and piece.startswith("\u2581"):
        text = piece.replace("\u2581", " ")
    return _visible(text)


def _visible(text: str) -> str:
    """Line breaks and other characters without a shape as escapes, so that data cannot steer the terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


# ---- The picture ----

#: Sources with a box of their own; in the order of the statistics, the best mean of max first.
_SOURCES_DRAWN = 24
#: Points drawn against length; more hide each other. Evenly spaced over the data.
_POINTS_DRAWN = 5000

#: What a picture says of who drew it, by the kinds that can say it.
_MADE_BY = "rrhf-peft inspect"
_METADATA = {"png": {"Software": _MADE_BY}, "pdf": {"Creator": _MADE_BY}, "svg": {"Creator": _MADE_BY}}


@styled
def plot_scores(groups: Sequence[RankedGroup], path: str | os.PathLike[str]) -> None:
    """Draw the groups' scores and write the picture; the ending of `path` names its type (.png, .pdf, .svg).

    Left: a box per source (quartiles, whiskers to 1.5 of their range, a dot at the mean, a grey number of
    responses). Right: every response's score against its length in characters, with the mean score of ten
    equally filled ranges of length.

    Raises:
        UserError: matplotlib is not installed, there is no response, `path` cannot be written, or it is a file that
            this program did not draw.
    """
    path = Path(path)
    _refuse_other_files(path)
    statistics = ranked_statistics(groups)
    names = list(statistics.sources)[:_SOURCES_DRAWN]
    figure = new_figure(WIDE, max(4.5, 1.6 + 0.3 * len(names)))
    kind = path.suffix.lower().removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        known = ", ".join(f".{name}" for name in sorted(figure.canvas.get_supported_filetypes()))
        raise UserError(f"{path}: cannot tell what kind of picture this is to be. Known endings: {known}.")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_sources(left, groups, names, len(statistics.sources))
    _draw_lengths(right, groups, statistics.length_correlation)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, format=kind, metadata=_METADATA.get(kind))
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}). Choose a writable place.") from None


def _refuse_other_files(path: Path) -> None:
    """A picture may replace the one that an earlier look has drawn, and nothing else."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: is not a file that a picture could replace. Choose another name.")
    if path.is_file() and _MADE_BY.encode() not in path.read_bytes():
        raise UserError(f"{path}: is there already, and rrhf-peft did not draw it. Choose another name, or remove it.")


def _draw_sources(axes: Any, groups: Sequence[RankedGroup], names: list[str], total: int) -> None:
    scores: dict[str, list[float]] = {name: [] for name in names}
    for group in groups:
        for source, score in zip(group.sources, group.known_scores, strict=True):
            if source in scores:
                scores[source].append(score)
    axes.boxplot(
        list(scores.values()),
        orientation="horizontal",
        showmeans=True,
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": "#dbe7f3", "edgecolor": HUES[0]},
        medianprops={"color": "#1f3f63", "linewidth": 2},
        meanprops={"marker": "o", "markerfacecolor": HUES[1], "markeredgecolor": "none", "markersize": 5},
        whiskerprops={"color": HUES[0]},
        capprops={"color": HUES[0]},
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": HUES[0], "alpha": 0.3},
    )
    short = shortened(names, 32)
    axes.set_yticks(range(1, len(names) + 1), [f"{short[name]}  ({len(values):,})" for name, values in scores.items()])
    axes.invert_yaxis()
    axes.set_xlabel("score")
    shown = f"the best {len(names)} of {total:,} sources" if total > len(names) else "each source"
    axes.set_title(f"Scores of {shown}: quartiles, mean as a dot")
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")


def _draw_lengths(axes: Any, groups: Sequence[RankedGroup], correlation: float | None) -> None:
    lengths = np.array([len(response) for group in groups for response in group.responses])
    scores = np.array([score for group in groups for score in group.known_scores])
    drawn = np.unique(np.linspace(0, len(scores) - 1, min(len(scores), _POINTS_DRAWN)).astype(int))
    axes.scatter(lengths[drawn], scores[drawn], s=8, alpha=0.25, color=HUES[0], edgecolors="none")
    parts = [part for part in np.array_split(np.argsort(lengths, kind="stable"), 10) if len(part)]
    middles = [(np.median(lengths[part]), np.mean(scores[part])) for part in parts]
    axes.plot(*zip(*middles, strict=True), color=HUES[1], marker="o", markersize=4)
    axes.set_xscale("symlog", linthresh=10)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("characters")
    axes.set_ylabel("score")
    within = "undefined" if correlation is None else f"{correlation:+.2f}"
    axes.set_title(f"Score by length, mean as a line\n(rank correlation in groups {within})")
