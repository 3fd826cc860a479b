"""What is generated agrees with what it is generated from.

The tools run on a copy, so a failing test changes nothing. To mend the checkout, run the same tool.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import readme

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def copy(tmp_path):
    "The parts of the checkout that nbdev reads and writes."
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.safetensors")
    for name in ("nbs", "llm_course"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore, symlinks=True)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    return tmp_path


def files(folder: Path, pattern: str) -> dict:
    "Name -> text of the files that match."
    found = [p for p in folder.rglob(pattern) if ".ipynb_checkpoints" not in p.parts]
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in found}


def run(tool: str, folder: Path) -> None:
    "Run one of nbdev's commands in a folder."
    command = Path(sys.executable).parent / tool
    subprocess.run([str(command)], cwd=folder, check=True)


def changed(before: dict, after: dict) -> list:
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def test_nbdev_export_changes_nothing(copy):
    before = files(copy / "llm_course", "*.py")
    run("nbdev_export", copy)
    found = changed(before, files(copy / "llm_course", "*.py"))
    assert not found, f"run nbdev_export and commit what it changes: {found}"
    assert not (copy / "pyproject.toml").exists()


def test_nbdev_clean_changes_nothing(copy):
    before = files(copy / "nbs", "*.ipynb")
    run("nbdev_clean", copy)
    found = changed(before, files(copy / "nbs", "*.ipynb"))
    assert not found, f"run nbdev_clean and commit what it changes: {found}"


def test_nbdev_clean_would_notice(copy):
    path = copy / "nbs" / "00a_core.ipynb"
    text = path.read_text(encoding="utf-8")
    spoilt = text.replace('"execution_count": null', '"execution_count": 7', 1)
    path.write_text(spoilt, encoding="utf-8")
    run("nbdev_clean", copy)
    assert spoilt != text and path.read_text(encoding="utf-8") == text


def test_readme_is_made_from_the_index():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme.make(), "run make readme and commit README.md"
