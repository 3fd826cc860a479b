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


def test_a_lesson_that_trains_for_too_long_is_caught(tmp_path):
    import nbformat

    source = """
import torch
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.train.loop import TrainConfig, train
batch = torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), None
train(GPT(GPTConfig(10, 8, 8, 1, 1)), iter([batch] * 3), TrainConfig(steps=3), watch=None)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, tmp_path / "lesson.ipynb")
    code = f"import sys; sys.path.insert(0, {str(RUNNER.parent)!r}); import rerun; " \
        f"from pathlib import Path; print(rerun.run_twice(Path({str(tmp_path / 'lesson.ipynb')!r}), %d))"
    n = 6 * 3 * 16 * (2 * 10 * 8 + 4 * 8 * 8 + 2 * 4 * 8 * 8)  # steps, tokens, parameters
    for most, found in ((n, ""), (n - 1, "trains for 0 billion operations, at most 0")):
        result = subprocess.run([sys.executable, "-c", code % most], capture_output=True, text=True)
        assert result.stdout.strip() == found, result.stderr[-2000:]
