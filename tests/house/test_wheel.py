"""What a user installs: a wheel that holds everything, and works in a folder without the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from house.recipe_checks import ROOT

#: The console script, once per line of stdin, with the package taken from PYTHONPATH.
PROGRAM = """
import sys
from rrhf_peft import cli
print(cli.__file__)
for line in sys.stdin:
    try:
        cli.app(line.split(), prog_name="rrhf-peft")
    except SystemExit as end:
        assert not end.code, line
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of the wheel, built from the files that git knows."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        if (ROOT / name).is_file():
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "clone" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "clone")], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def rrhf(site: Path, folder: Path, *commands: str) -> str:
    """What the commands print, given in that folder with nothing of the clone in reach."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder, env=environment, input="\n".join(commands), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
    assert done.stdout.startswith(str(site))
    return done.stdout


def test_the_wheel_holds_the_package_its_recipes_and_data(site: Path) -> None:
    for path in [*(ROOT / "rrhf_peft").rglob("*.*"), *(ROOT / "recipes").rglob("*.yaml")]:
        if path.suffix == ".pyc" or "shipped" in path.parts:
            continue
        inside = path.relative_to(ROOT)
        if inside.parts[0] == "recipes":
            inside = Path("rrhf_peft", "shipped", *inside.parts[1:])
        assert (site / inside).is_file(), inside
    assert (site / "rrhf_peft" / "shipped" / "example" / "ranked.jsonl").is_file()
    assert not list((site / "rrhf_peft" / "shipped").rglob("*.py"))
    entry_points = next(site.glob("*.dist-info/entry_points.txt")).read_text()
    assert "rrhf-peft = rrhf_peft.cli:main" in entry_points


def test_recipes_are_listed_and_copied_outside_the_clone(site: Path, tmp_path: Path) -> None:
    said = rrhf(site, tmp_path, "recipes list", "recipes copy qlora_7b")
    assert "accelerate/ddp" in said
    assert (tmp_path / "recipes/qlora_7b.yaml").read_bytes() == (ROOT / "recipes/qlora_7b.yaml").read_bytes()
