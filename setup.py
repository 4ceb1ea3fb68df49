"""The one step of a build that pyproject.toml cannot express: recipes/ goes into the package, as rrhf_peft/shipped."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = Path(__file__).resolve().parent / "recipes"
ENDINGS = (".yaml", ".jsonl", ".txt", ".md")


class BuildWithRecipes(build_py):
    """Copies the recipes after the modules; an editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in RECIPES.rglob("*"):
            if path.suffix in ENDINGS:
                copy = Path(self.build_lib, "rrhf_peft", "shipped", path.relative_to(RECIPES))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithRecipes})
