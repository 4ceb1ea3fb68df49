"""What people's ranks say so far, and the files that carry them on: to `score`, to Argilla, to Label Studio."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from rrhf_peft.files import replace_text
from rrhf_peft.rank.answers import Answers
from rrhf_peft.records import RankedGroup
from rrhf_peft.score.people import Ranks, agreement, is_handed_out, merged_scores, sheet_rows, texts_of, write_sheet

#: What is written beside the answers; annotators' ranks are `ranks-NAME.jsonl`.
GROUPS, SHEET, RECIPE, AGREEMENT = "groups.jsonl", "sheet.jsonl", "score.yaml", "agreement.json"
ARGILLA, LABEL_STUDIO, LABEL_STUDIO_CONFIG = "argilla.json", "label_studio.json", "label_studio.xml"


def figures(
    groups: Sequence[RankedGroup],
    counts: Mapping[str, Mapping[str, int]],
    ranks: Mapping[str, Ranks],
    shared: int,
    compared: tuple[str, str] | None,
) -> dict[str, Any]:
    """Progress, agreement and, of two policies, wins, as the overview shows them.

    Agreement is among the annotators, and between their merged order and each order that the data brought along: the
    raw scores of a reward model or a judge, or the scores.
    """
    sizes, people = [len(group.responses) for group in groups], list(ranks.values())
    merged = [_as_ranks(merged_scores(people, sizes))]
    rows = [("annotators", agreement(people, sizes))]
    rows += [
        (f"annotators together, and {name}", agreement([*merged, order], sizes))
        for name, order in _orders_of_data(groups).items()
    ]
    return {
        "groups": len(groups),
        "shared": min(shared, len(groups)),
        "annotators": [{"name": name, **count} for name, count in counts.items()],
        "agreement": [{"between": name, **_without(asdict(row), "answered")} for name, row in rows],
        "wins": _wins(groups, ranks, merged[0], compared) if compared is not None else None,
    }


def _orders_of_data(groups: Sequence[RankedGroup]) -> dict[str, Ranks]:
    """Name of a score -> its order of the responses."""
    names = dict.fromkeys(name for group in groups for name in group.columns.get("raw_scores", {}))
    kept = [name for name in names if name != "input"] or list(names)
    return {name: _as_ranks([group.columns.get("raw_scores", {}).get(name, []) for group in groups]) for name in kept}


def _as_ranks(scores: Sequence[Sequence[float | None]]) -> Ranks:
    ranked = ({index: -score for index, score in enumerate(row) if score is not None} for row in scores)
    return {number: row for number, row in enumerate(ranked) if row}


def _wins(
    groups: Sequence[RankedGroup], ranks: Mapping[str, Ranks], merged: Ranks, compared: tuple[str, str]
) -> dict[str, Any]:
    """How often the first policy wins, ties and loses: by annotator, and by all together, each pair once."""

    def count(order: Ranks) -> dict[str, int]:
        signs = [(row[0] < row[1]) - (row[0] > row[1]) for row in order.values() if len(row) == 2]
        return {"win": signs.count(1), "tie": signs.count(0), "lose": signs.count(-1)}

    rows = [{"by": name, **count(order)} for name, order in ranks.items()]
    return {"a": compared[0], "b": compared[1], "rows": [*rows, {"by": "together", **count(merged)}]}


def write_results(
    folder: Path, groups: Sequence[RankedGroup], answers: Answers, shared: int, compared: tuple[str, str] | None
) -> list[str]:
    """Write the answers so far as files into the folder of the ranking; their names.

    - a sheet for each annotator, and a recipe with which `rrhf-peft score` makes ranked data of them;
    - Argilla's records (SDK 2: `dataset.records.from_json`), ties as equal ranks;
    - Label Studio's tasks with annotations, one bucket for each rank, and the labelling configuration.

    Raises:
        UserError: the disk takes no more.
    """
    ranks, texts = answers.ranks(), texts_of(groups)
    notes = answers.notes()
    if not is_handed_out(folder / SHEET, texts, seed=0):
        write_sheet(folder / SHEET, texts, seed=0)
    contents: dict[str, str] = {}
    for name, given in ranks.items():
        rows = sheet_rows(texts, 0, given)
        for row in rows:
            row["note"] = notes.get((name, int(row["group"][1:]) - 1), ("", ""))[1]
        contents[f"ranks-{name}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with_ranks = [str(folder / f"ranks-{name}.jsonl") for name, given in ranks.items() if given]
    scorer = {"name": "human", "sheet": str(folder / SHEET), "annotations": with_ranks}
    scoring = {"input": str(folder / GROUPS), "output": str(folder / "scored.jsonl"), "scorer": scorer}
    contents[RECIPE] = "# rrhf-peft score, with the ranks of people\n" + yaml.safe_dump(
        {"scoring": scoring}, sort_keys=False, allow_unicode=True
    )
    contents[AGREEMENT] = _json(figures(groups, answers.counts(), ranks, shared, compared))
    contents[ARGILLA] = _json(_argilla_records(texts, ranks, notes))
    contents[LABEL_STUDIO] = _json(_label_studio_tasks(texts, ranks, notes))
    contents[LABEL_STUDIO_CONFIG] = _label_studio_config(max(len(responses) for _, responses in texts))
    for name, content in contents.items():
        replace_text(folder / name, content)
    return [SHEET, *contents]


def _argilla_records(
    texts: Sequence[tuple[str, Sequence[str]]], ranks: Mapping[str, Ranks], notes: Mapping[tuple[str, int], Any]
) -> list[dict[str, Any]]:
    """Records with the fields prompt, response-1 ... response-K and answers to a `RankingQuestion` of these K values.

    The server takes submitted answers with a rank from 1 to K for all K values only: responses that a group does not
    have are ranked K. Users are UUIDs made from the annotators' names.
    """
    most = max(len(responses) for _, responses in texts)
    users = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, f"rrhf-peft:{name}")) for name in ranks}
    records = []
    for number, (prompt, responses) in enumerate(texts):
        names = [f"response-{index + 1}" for index in range(most)]
        submitted = [
            {
                "value": [
                    {"value": names[index], "rank": int(given[number].get(index, most))} for index in range(most)
                ],
                "user_id": users[name],
                "status": "submitted",
            }
            for name, given in ranks.items()
            if number in given
        ]
        said = [
            {"value": notes[name, number][1], "user_id": users[name], "status": "submitted"}
            for name, given in ranks.items()
            if number in given and notes[name, number][1]
        ]
        answers = {name: values for name, values in (("ranking", submitted), ("note", said)) if values}
        fields = {"prompt": prompt, **dict(zip(names, responses, strict=False))}
        records.append({"id": f"group-{number}", "fields": fields, "metadata": {}, "suggestions": {}, "vectors": {},
                        "responses": answers})  # fmt: skip
    return records


def _label_studio_tasks(
    texts: Sequence[tuple[str, Sequence[str]]], ranks: Mapping[str, Ranks], notes: Mapping[tuple[str, int], Any]
) -> list[dict[str, Any]]:
    """Tasks for `_label_studio_config`; `data.annotators` names who made each of the annotations."""
    tasks: list[dict[str, Any]] = []
    for number, (prompt, responses) in enumerate(texts):
        items = [
            {"id": f"response-{index + 1}", "title": f"Response {index + 1}", "body": text}
            for index, text in enumerate(responses)
        ]
        answered = [name for name in ranks if (name, number) in notes]
        annotations = []
        for name in answered:
            state, note = notes[name, number]
            result: list[dict[str, Any]] = []
            if state == "ranked":
                buckets: dict[str, list[str]] = {}
                for index, rank in sorted(ranks[name][number].items(), key=lambda item: item[1]):
                    buckets.setdefault(f"rank-{int(rank)}", []).append(items[index]["id"])
                result.append(_label_studio_result("rank", "responses", "ranker", {"ranker": buckets}))
            if note:
                result.append(_label_studio_result("note", "prompt", "textarea", {"text": [note]}))
            annotations.append({"result": result, "was_cancelled": state == "skipped"})
        data = {"prompt": prompt, "items": items, "annotators": answered}
        tasks.append({"data": data, "annotations": annotations})
    return tasks


def _label_studio_result(name: str, to_name: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"{name}-{to_name}", "from_name": name, "to_name": to_name, "type": kind, "value": value}


def _label_studio_config(most: int) -> str:
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Text", name="prompt", value="$prompt")
    ElementTree.SubElement(view, "List", name="responses", value="$items", title="Responses")
    ranker = ElementTree.SubElement(view, "Ranker", name="rank", toName="responses")
    for rank in range(1, most + 1):
        title = f"{rank}, the best" if rank == 1 else str(rank)
        ElementTree.SubElement(ranker, "Bucket", name=f"rank-{rank}", title=title)
    ElementTree.SubElement(view, "TextArea", name="note", toName="prompt", placeholder="Note")
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _json(values: Any) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
