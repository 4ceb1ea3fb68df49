"""The documentation site: Markdown pages, executed notebooks, the API from docstrings, a recipe's keys from its schema.

`make docs` builds it strictly. DOCS_NOTEBOOKS=off leaves the notebooks unexecuted, for those who have run them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import rrhf_peft
from rrhf_peft.recipe import Recipe

project, release, copyright = "rrhf-peft", rrhf_peft.__version__, "the authors of rrhf-peft"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rrhf-peft"
html_theme_options = {
    "source_view_link": "",
    "light_css_variables": {"color-brand-primary": "#1f5f8b", "color-brand-content": "#1f5f8b"},
    "dark_css_variables": {"color-brand-primary": "#7fb8dc", "color-brand-content": "#7fb8dc"},
}
html_show_copyright = False
default_role = "code"  # docstrings write names in single back quotes
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["mystnb.unknown_mime_type"]
nb_execution_mode = "off" if os.environ.get("DOCS_NOTEBOOKS") == "off" else "cache"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True
napoleon_use_rtype = False


def bars_are_bars(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """|y| is a length, and no substitution of reStructuredText."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def links_between(app: Any, document: str, source: list[str]) -> None:
    """Notebooks stand in `made` here: links from them and to them, right in the repository, are so on the site too."""
    if document.startswith("made/"):
        source[0] = source[0].replace("](../docs/", "](../")
    source[0] = source[0].replace("](../notebooks/", "](made/")


def setup(app: Any) -> None:
    """Bring in what is written elsewhere, before anything is read."""
    app.connect("source-read", links_between)
    # MathJax comes from its own server: only pages with formulas, those of notebooks, ask for it.
    app.connect("builder-inited", lambda app: app.set_html_assets_policy("per_page"), priority=999)
    app.connect("autodoc-process-docstring", bars_are_bars)
    shutil.rmtree(HERE / "made", ignore_errors=True)
    (HERE / "made").mkdir()
    for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, HERE / "made" / notebook.name)
    (HERE / "made" / "recipe_keys.md").write_text("\n".join(recipe_keys()), encoding="utf-8")


def recipe_keys() -> Iterator[str]:
    """A page with every section of a recipe, and every key with its type, default and meaning."""
    yield "# Every key of a recipe\n"
    yield "From the schema that `rrhf-peft schema` prints. `adapter` takes the fields of `peft.LoraConfig` and"
    yield "`training` those of `transformers.TrainingArguments`, under their names there and with their meaning.\n"
    yield "| section | what it describes |\n|---|---|"
    sections = list(Recipe.model_fields.items())
    for name, field in sections:
        yield f"| `{name}` | {cell(field.description or next(iter(models(field.annotation)), Recipe).__doc__)} |"
    seen: set[type[BaseModel]] = set()
    for name, field in sections:
        for model in models(field.annotation):
            if model not in seen:
                seen.add(model)
                yield from table(name, model)
                inner = [one for part in model.model_fields.values() for one in models(part.annotation)]
                for other in dict.fromkeys(inner):
                    if other not in seen:
                        seen.add(other)
                        yield from table(name, other)


def table(section: str, model: type[BaseModel]) -> Iterator[str]:
    """One section's keys."""
    yield f"\n## {section}: {model.__name__}\n\n{cell(model.__doc__)}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for key, field in model.model_fields.items():
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        shown = "a section" if isinstance(default, BaseModel) else default
        kind = re.sub(r"\b[a-z_]+(\.[a-z_]+)*\.(?=[A-Z])|typing\.", "", str(field.annotation))
        kind = re.sub(r"<class '(\w+)'>", r"\1", kind)
        yield f"| `{key}` | `{cell(kind)[:80]}` | `{cell(shown)[:60]}` | {cell(field.description)} |"


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in an annotation, through unions, lists and dicts."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models(inner)


def cell(text: object) -> str:
    """Text for a cell of a table: one line, no bars, no markup of its own."""
    line = " ".join(str("" if text is None else text).split())
    return line.replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")
