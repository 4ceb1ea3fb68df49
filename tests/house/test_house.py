"""Promises about the repository itself: pins, names, sizes, targets, licence."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from rrhf_peft import __version__

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[2]


def requirements_of(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """Every distribution that installing `name[extras]` here brings along."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in (extras or {""}) | {""}
        )
        if wanted:
            needed = canonicalize_name(requirement.name)
            yield needed
            yield from requirements_of(needed, frozenset(requirement.extras), seen)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), line
            if requirement.marker is None or requirement.marker.evaluate():
                found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return found


def test_everything_that_is_installed_is_pinned() -> None:
    needed = set(requirements_of("rrhf-peft", frozenset({"dev"}), set())) - {"rrhf-peft"}
    of_the_torch_wheel = re.compile(r"nvidia-|cuda-|triton")
    assert len(needed) > 80
    assert sorted(name for name in needed - pins().keys() if not of_the_torch_wheel.match(name)) == []


def test_pins_without_a_marker_run_on_every_python_that_is_promised() -> None:
    """Else pip looks for a way out among hundreds of versions, for many minutes."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None:
            try:
                metadata = importlib.metadata.metadata(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                continue  # another platform's
            assert SpecifierSet(metadata["Requires-Python"] or "").contains("3.10"), line


def test_pins_name_no_place_and_no_build() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"[+@]|://|(^|\s)/", text)


def test_the_changelog_knows_this_version() -> None:
    assert re.search(rf"^## \[{re.escape(__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)


def test_the_licence_is_whole() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert licence.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in licence
    assert all(f"\n   {number}. " in licence for number in range(1, 10))


SOURCES = sorted((ROOT / "rrhf_peft").rglob("*.py"))


def test_files_say_what_they_are() -> None:
    vague = re.compile(r"(utils?|common|helpers?|misc)\.py")
    assert [path.name for path in SOURCES if vague.fullmatch(path.name)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_docstring_first(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith('"""')


def test_make_lists_its_targets_and_knows_them() -> None:
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"make (\w+)", listed)
    assert {"demo", "test", "check", "bench"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


def test_make_refuses_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check of an old one exits with
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_ci_script_is_sound_bash_and_runs_checks_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
    assert [line for line in script.read_text().splitlines() if re.match(r"(\w+=\w+ )?make ", line)] == [
        "make check",
        "make test",
        "DOCS_NOTEBOOKS=off make docs  # the tests run the notebooks",
    ]


def run_ci(folder: Path, *, apt_get: str) -> tuple[int, str, list[str]]:
    """Run a copy of the CI script where make, apt-get and id are ours; what it exits with, says, and made."""
    tools, work = folder / "bin", folder / "work"
    tools.mkdir()
    (work / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", work / ".ci" / "run")
    log = folder / "log"
    for name, body in {
        "make": f'echo "make $1 $RRHF_REQUIRE_BROWSER" >> {log}',
        "apt-get": apt_get,
        "id": "echo 0",
    }.items():
        (tools / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {folder / "calls"}\n{body}\n')
        (tools / name).chmod(0o755)
    for name in ("bash", "dirname", "env", "chmod"):
        (tools / name).symlink_to(str(shutil.which(name)))
    environment = {"PATH": str(tools), "CI": "true"}
    done = subprocess.run(
        ["bash", str(work / ".ci" / "run")], env=environment, capture_output=True, text=True, check=False
    )
    made = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stderr, made


def test_ci_installs_the_browser_or_fails_with_a_word(tmp_path: Path) -> None:
    for folder in ("installs", "fails", "pretends"):
        (tmp_path / folder).mkdir()
    chromium = tmp_path / "installs" / "bin" / "chromium"
    installs = f'if [ "$1" = install ]; then echo "#!/bin/bash" > {chromium}; chmod +x {chromium}; fi'
    assert run_ci(tmp_path / "installs", apt_get=installs) == (0, "", ["make check 1", "make test 1", "make docs 1"])
    for name, apt_get in (("fails", "exit 100"), ("pretends", "exit 0")):
        code, stderr, made = run_ci(tmp_path / name, apt_get=apt_get)
        assert (code, made) == (1, [])
        assert "chromium is not installed, and apt-get could not install it" in stderr


@pytest.mark.parametrize(("variables", "outcome"), [({}, "skipped"), ({"CI": "true"}, "errors"),
                                                    ({"RRHF_REQUIRE_BROWSER": "1"}, "errors")])  # fmt: skip
def test_a_missing_browser_is_a_failure_where_it_is_asked_for(
    variables: dict[str, str], outcome: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("RRHF_REQUIRE_BROWSER", raising=False)
    for name, value in {**variables, "PATH": ""}.items():
        monkeypatch.setenv(name, value)
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("def test_page(chromium): pass")
    assert pytester.inline_run("-p", "no:xdist").ret == (0 if outcome == "skipped" else 1)


def test_commits_are_checked_with_what_make_check_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    tools = {Path(hook["entry"].split()[0]).name for hook in hooks}
    checked = subprocess.run(["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert tools == {"ruff", "mypy", "lint-imports"}
    for tool in tools:
        assert f"bin/{tool}" in checked
        assert (Path(sys.executable).parent / tool).exists()
