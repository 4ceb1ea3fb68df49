"""The committed document says what the committed results say, and its marked parts are filled."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import reproduce
import yaml
from reproduce_claims import all_claims
from reproduce_document import PARTS, document
from reproduce_figures import FIGURES, write_figures
from reproduce_rows import ROWS

from rrhf_peft.records import UserError

PAPER = Path(__file__).resolve().parents[2] / "recipes" / "paper"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads((PAPER / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def readme() -> str:
    return (PAPER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def numbers() -> str:
    return (PAPER / "paper_numbers.yaml").read_text(encoding="utf-8")


def test_the_document_is_made_from_the_results(readme: str, results: dict[str, Any], numbers: str) -> None:
    assert document(readme, results, numbers) == readme


def test_it_can_be_made_again_without_a_run(readme: str, tmp_path: Path) -> None:
    shutil.copy(PAPER / "results.json", tmp_path)
    assert reproduce.main(["--only-document", f"--document={tmp_path}"]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        path.name for path in (PAPER / "figures").iterdir()
    }


def test_another_result_makes_another_document(readme: str, results: dict[str, Any], numbers: str) -> None:
    changed = json.loads(json.dumps(results))
    changed["rows"]["dp"]["reward"] = [value - 0.1 for value in changed["rows"]["dp"]["reward"]]
    assert document(readme, changed, numbers) != readme


def test_the_results_are_those_of_three_seeds_or_more(results: dict[str, Any]) -> None:
    seeds = results["seeds"]
    assert len(set(seeds)) == len(seeds) >= 3
    assert results["prompts"] == {"train": 300, "held_out": 200}
    for section in ("rows", "candidates"):
        for name, numbers in results[section].items():
            assert all(len(values) == len(seeds) for values in numbers.values()), name
    assert set(results["seconds"]) == set(ROWS)
    assert sum(map(sum, results["seconds"].values())) / 2 < 40 * 60  # on two cores, as promised


def test_every_verdict_stands_in_the_document(readme: str, results: dict[str, Any]) -> None:
    part = re.search(r"<!-- begin: claims -->\n(.*?)\n<!-- end: claims -->", readme, flags=re.DOTALL)
    assert part is not None
    for claim in all_claims(results):
        assert f"| {claim.says} | **{claim.verdict}** |" in part.group(1)
    lines = part.group(1).splitlines()
    assert any(line.endswith("| holds | undecided |") for line in lines)  # what ranking itself does


def test_every_figure_of_the_paper_stands_in_the_document(readme: str, numbers: str) -> None:
    tables = yaml.safe_load(numbers)["tables"]
    for name, rows in tables.items():
        digits = 3 if name == "imdb" else 2
        for row in rows:
            for key in ("reward", "perplexity", "mean", "std", "max", "accuracy"):
                if isinstance(row.get(key), float):
                    shown = f"{row[key]:.{digits}f}".replace("-", "−")
                    assert any(shown in line and _title(row) in line for line in readme.splitlines()), (name, row, key)


def _title(row: dict[str, Any]) -> str:
    """What a row is called: the last part of its name, as all tables have it."""
    return str(row.get("setting") or row.get("model") or row.get("method") or row.get("rho"))


def test_a_single_seed_fills_every_table_and_plot(
    readme: str, results: dict[str, Any], numbers: str, tmp_path: Path
) -> None:
    one = first_seed(results)
    text = document(readme, one, numbers)
    for name in PARTS:
        part = re.search(rf"<!-- begin: {name} -->\n(.*?)\n<!-- end: {name} -->", text, flags=re.DOTALL)
        assert part is not None, name
        assert len(part.group(1)) > 100, name
        assert not re.search(r"\b(nan|inf)\b|±", part.group(1)), name
    assert "Measured with 1 seed (" in text
    assert {claim.verdict for claim in all_claims(one)} == {"undecided"}
    write_figures(one, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")
    }


def first_seed(results: dict[str, Any]) -> dict[str, Any]:
    def of_rows(rows: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
        return {name: {key: own[:1] for key, own in numbers.items()} for name, numbers in rows.items()}

    return {
        **results,
        "seeds": results["seeds"][:1],
        "seconds": {name: own[:1] for name, own in results["seconds"].items()},
        "provided": {name: own[:1] for name, own in results["provided"].items()},
        "online": {name: own[:1] for name, own in results["online"].items()},
        "rows": of_rows(results["rows"]),
        "candidates": of_rows(results["candidates"]),
    }


def test_every_figure_is_there_twice_and_shown(readme: str) -> None:
    assert set(re.findall(r"\(figures/(\w+)\.png\)", readme)) == set(FIGURES)
    for name in FIGURES:
        assert (PAPER / "figures" / f"{name}.png").stat().st_size > 5000
        assert (PAPER / "figures" / f"{name}.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_a_document_without_a_part_is_refused(readme: str, results: dict[str, Any], numbers: str) -> None:
    with pytest.raises(UserError, match="marked parts"):
        document(readme.replace("<!-- begin: claims -->", ""), results, numbers)
    with pytest.raises(UserError, match="end: claims"):
        document(readme.replace("<!-- end: claims -->", ""), results, numbers)
    assert all(f"<!-- begin: {name} -->" in readme for name in PARTS)


def test_links_lead_somewhere(readme: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (PAPER / target).exists(), target
