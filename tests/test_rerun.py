"Any cell may be run again, and any lesson from the top again: nothing that was left behind hurts."

import subprocess
import sys
from pathlib import Path

import pytest

import rules

RUNNER = Path(__file__).resolve().parent.parent / "tools" / "rerun.py"
LESSONS = [lesson.path for lesson in rules.lessons() if lesson.number]


def run(path: Path, seconds: float = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RUNNER), str(path)]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=seconds, cwd=path.parent
    )


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_runs_twice(path):
    result = run(path)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    "source, when",
    [("n = globals().get('n', 0) + 1\nassert n != 2", "pass 2"), ("if 1: raise OSError", "pass 1")]
    + [("n = globals().get('n', 0) + 1\nassert n != 3", "run again at once")],
)
def test_a_cell_that_runs_only_once_is_caught(source, when, tmp_path):
    import nbformat

    path = tmp_path / "lesson.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, path)
    result = run(path)
    assert result.returncode != 0 and when in result.stderr
