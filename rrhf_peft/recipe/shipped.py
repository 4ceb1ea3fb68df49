"""The recipes that come with the package: listed, and copied with all that they extend."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from rrhf_peft.recipe.messages import did_you_mean
from rrhf_peft.records import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
#: In the wheel, setup.py puts them into the package; in a clone they stand beside it.
FOLDER = next((folder for folder in (_PACKAGE / "shipped", _PACKAGE.parent / "recipes") if folder.is_dir()), None)

#: Beside the recipes, read by `make reproduce` and `make study`.
NO_RECIPES = ("paper/paper_numbers.yaml", "study/protocol.yaml")


def shipped_recipes() -> dict[str, str]:
    """Name -> first sentence of its header, for every recipe and launch config: `sampling/dp`, `accelerate/ddp`."""
    return {_name(path): _first_sentence(path) for path in _files() if path.suffix == ".yaml"}


def copy_recipes(name: str, target: Path) -> list[Path]:
    """Copy a recipe with what it extends, a folder of recipes, or `all`, below `target`; returns the files.

    Raises:
        UserError: there is none with that name, or a file of that name is there and differs. Nothing is written then.
    """
    wanted = name.removesuffix("/").removesuffix(".yaml")
    known = {_name(path): path for path in _files()}
    chosen = [path for key, path in known.items() if wanted in ("all", key) or key.startswith(f"{wanted}/")]
    if not chosen:
        listed = "`rrhf-peft recipes list` lists them"
        raise UserError(f"no shipped recipe is called {name!r}{did_you_mean(wanted, known)}; {listed}.")
    for path in chosen:  # grows as it is walked
        chosen += [base for base in _extended(path) if base not in chosen]
    copies = {path: target / path.relative_to(_folder()) for path in chosen}
    for path, copy in copies.items():
        if copy.exists() and not (copy.is_file() and copy.read_bytes() == path.read_bytes()):
            raise UserError(
                f"{copy}: is there already and differs from the shipped one. Name another folder to copy to."
            )
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return list(copies.values())


def _folder() -> Path:
    if FOLDER is None:
        raise UserError("this installation has no recipes in it. Install rrhf-peft again, from its wheel or a clone.")
    return FOLDER


def _files() -> list[Path]:
    folder = _folder()
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    kinds = (".yaml", ".jsonl", ".txt")
    return sorted(path for name, path in files.items() if path.suffix in kinds and name not in NO_RECIPES)


def _name(path: Path) -> str:
    return path.relative_to(_folder()).as_posix().removesuffix(".yaml")


def _first_sentence(path: Path) -> str:
    header = re.match(r"((#.*\n)+?)(#?\n|\w)", path.read_text(encoding="utf-8"))
    text = " ".join(re.sub(r"^# ?", "", line) for line in header[1].splitlines()) if header else ""
    return re.split(r"(?<=[a-z0-9)]\.) (?=[A-Z])", " ".join(text.split()))[0]


def _extended(path: Path) -> list[Path]:
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.suffix == ".yaml" else None
    name = values.get("extends") if isinstance(values, dict) else None
    return [(path.parent / name).resolve()] if name else []
