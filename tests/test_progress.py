"""What a learner has passed is kept on the learner's machine, and by nobody else's doing."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rules
from llm_course import progress
from llm_course.check import CheckFailed, Exercise

ROOT = Path(__file__).resolve().parent.parent
TITLE = "draw a word"
PASS = f"""
import sys
from llm_course.check import Exercise
Exercise({TITLE!r}, abs, [(-1,), (2,)]).check(abs)
Exercise(sys.argv[1], abs, [(-1,), (2,)]).check(abs)
"""


@pytest.fixture
def record(tmp_path, monkeypatch):
    path = tmp_path / "llm-course" / "progress.json"
    monkeypatch.setenv("LLM_COURSE_PROGRESS", str(path))
    monkeypatch.setattr(progress, "_SAID", set())
    return path


def own(title=TITLE):
    return Exercise(title, abs, [(-1,), (2,)])


def test_only_a_right_answer_of_the_learner_counts(record, capsys):
    own().check_solution(abs)
    with pytest.raises(CheckFailed):
        own().check(lambda x: x)
    own().check(lambda x: ...)
    assert not record.exists()
    own("an exercise that no lesson has").check(abs)
    assert not record.exists()
    own().check(abs)
    assert list(progress.read_progress(record)) == [TITLE]
    assert "00_start: all 1 exercises passed" in capsys.readouterr().out


def test_an_update_of_the_course_keeps_the_record(record, monkeypatch):
    own().check(abs)
    first = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps(first | {"from later": [1]}), encoding="utf-8")
    monkeypatch.setattr(progress.llm_course, "__version__", "99.0")
    own().check(abs)
    own("entropy").check(abs)
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["from later"] == [1] and found["passed"][TITLE] == first["passed"][TITLE]


def test_a_damaged_record_is_left_alone(record, capsys):
    record.parent.mkdir()
    record.write_text("half a rec", encoding="utf-8")
    own().check(abs)
    own().check(abs)
    assert capsys.readouterr().out.count("not kept") == 1
    assert record.read_text(encoding="utf-8") == "half a rec"


@pytest.mark.skipif(os.name == "nt", reason="needs a folder that is read-only")
def test_a_folder_that_cannot_be_written_is_said_once(record, monkeypatch, capsys):
    monkeypatch.setenv("LLM_COURSE_PROGRESS", "/proc/llm-course/progress.json")
    own().check(abs)
    own().check(abs)
    said = capsys.readouterr().out
    assert said.count("not kept") == 1 and said.count("✓") == 2


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    "As on a learner's machine, with another home."
    for name in progress._MACHINES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLM_COURSE_PROGRESS", "")
    for name in ("XDG_DATA_HOME", "APPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", progress._MACHINES)
def test_programs_that_solve_exercises_leave_no_record(name, at_home, monkeypatch):
    "As nbdev_test, pytest and a build server do."
    monkeypatch.setenv(name, "true")
    own().check(abs)
    assert not list(at_home.rglob("*"))


def test_two_notebooks_may_write_at_the_same_moment(at_home):
    titles = list(progress.course_exercises())[1:3]
    environment = {k: v for k, v in os.environ.items() if k not in progress._MACHINES}
    environment |= {"PYTHONPATH": str(ROOT)}
    people = [
        subprocess.Popen([sys.executable, "-c", PASS, title], env=environment) for title in titles
    ]
    assert [p.wait(60) for p in people] == [0, 0]
    (path,) = at_home.rglob("progress.json")
    assert set(progress.read_progress(path)) == {TITLE, *titles}


def test_titles_are_unique():
    "A title is an exercise's name in the record."
    found = []
    for lesson in rules.lessons():
        for cell in lesson.code_cells:
            if not cell.exported and "code-fold: true" in cell.directives:
                found += progress.exercise_titles(cell.source).values()
    assert len(found) == len(set(found)) == len(progress.course_exercises()) > 100


def test_nothing_of_it_goes_through_a_network():
    "The modules that keep and show it import nothing that could send it."
    for name in ("progress", "certificate"):
        source = (ROOT / "llm_course" / f"{name}.py").read_text(encoding="utf-8")
        nodes = ast.walk(ast.parse(source))
        nodes = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {a.name for n in nodes for a in n.names} | {getattr(n, "module", "") for n in nodes}
        assert names.isdisjoint({"socket", "urllib", "urllib.request", "requests", "http.client"})


def test_the_command_makes_a_page_and_checks_it(record, tmp_path):
    from typer.testing import CliRunner

    from llm_course.cli import app

    def call(*words):
        return CliRunner().invoke(app, ["progress", *map(str, words)])

    assert "Nothing yet" in call().output
    own().check(abs)
    assert "00_start" in call().output
    page = tmp_path / "mine.html"
    assert call("--certificate", page, "--name", "Ada").exit_code == 0
    assert "agree: Ada, 1 exercises" in call("--verify", page).output
    page.write_text(page.read_text(encoding="utf-8").replace("Ada", "Bob"), encoding="utf-8")
    refused = call("--verify", page)
    assert refused.exit_code == 2 and "hash" in refused.output
