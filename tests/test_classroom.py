"""What a class gets: no solution leaks, and the checks still say which mistake was made."""

import ast
import dis
import json
import re
from pathlib import Path

import pytest

import rules
from llm_course import classroom, handout, progress
from llm_course.check import CheckFailed, Exercise

ROOT = Path(__file__).resolve().parent.parent
LESSONS = [lesson for lesson in rules.lessons() if lesson.number]
WITH = [p for p in LESSONS if p.name in set(progress.course_exercises().values())]
EVERY = pytest.mark.parametrize("lesson", WITH, ids=lambda lesson: lesson.name)


@pytest.fixture(scope="module")
def copies():
    "File name -> what a class gets."
    return handout.read_lessons(progress.lessons_folder(), solutions=False)


def lines(source: str) -> set:
    "Lines of code that say something; how they are indented does not matter."
    found = {line.strip() for line in source.splitlines() if not line.startswith("#|")}
    return {line for line in found if len(line) > 24}


def secrets(lesson) -> tuple:
    "(lines of solutions and checks that stand nowhere else in a lesson, the cells they are in)"
    held = [c for c in lesson.code_cells if not c.exported and "code-fold: true" in c.directives]
    held = [c for c in held if "Exercise(" in c.source or "check_solution(" in c.source]
    open_ = [cell.source for cell in lesson.cells if cell not in held]
    told = set().union(*map(lines, open_)) if open_ else set()
    return set().union(*(lines(cell.source) for cell in held)) - told, held


@EVERY
def test_no_solution_leaks(lesson, copies):
    "Nothing of a solution, a reference or a mistake is in the copy: source, outputs or metadata."
    hidden, held = secrets(lesson)
    copy = copies[lesson.path.name].decode("utf-8")
    texts = [json.dumps(line, ensure_ascii=False)[1:-1] for line in hidden]
    leaked = [text for text in texts if text in copy]
    assert held and len(hidden) > 3 and not leaked
    defined = {n.name for c in held for n in c.tree.body if isinstance(n, ast.FunctionDef)}
    loaded = set()
    for cell in json.loads(copy)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and " = class_exercise(" not in source:
            loaded |= {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
    solved = {name for name in defined if name.startswith("solved_")}
    assert solved.isdisjoint(loaded), "a cell uses a solution"


@EVERY
def test_nothing_that_the_copy_imports_for_exercises_holds_them(lesson, copies):
    "The lines that a stub and a check import lead to modules without a solution."
    hidden, _ = secrets(lesson)
    own = ROOT / "llm_course" / (lesson.module.replace(".", "/") + ".py")
    modules = {"llm_course.classroom", "llm_course.check", "llm_course.progress"}
    for cell in json.loads(copies[lesson.path.name])["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and (" = class_exercise(" in source or ".check(" in source):
            nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
            modules |= {n.module for n in nodes if (n.module or "").startswith("llm_course")}
    for module in modules:
        path = ROOT / (module.replace(".", "/") + ".py")
        if path != own and path.exists():  # what a lesson teaches stands in its own module
            assert not hidden & lines(path.read_text(encoding="utf-8")), module


@EVERY
def test_the_exercises_of_the_copy_still_diagnose(lesson, copies):
    "Each exercise that a copy fetches names a mistake by its name."
    space = {}
    for cell in json.loads(copies[lesson.path.name])["cells"]:
        source = "".join(cell["source"])
        if " = class_exercise(" in source:
            exec(source, space)
    found = {name: x for name, x in space.items() if isinstance(x, Exercise)}
    titles = [t for t, where in progress.course_exercises().items() if where == lesson.name]
    assert sorted(x.name for x in found.values()) == sorted(titles)
    for exercise in found.values():
        mistake, programs = next(iter(exercise.misconceptions.items()))
        program = programs[0] if isinstance(programs, (list, tuple)) else programs
        with pytest.raises(CheckFailed) as failed:
            exercise.check(program)
        assert failed.value.diagnosis == mistake
        assert exercise.diagnose(exercise.reference) is None


def operands(code, kinds: set) -> set:
    "The names that instructions of these kinds have, those of inner functions included."
    inner = [operands(c, kinds) for c in code.co_consts if hasattr(c, "co_code")]
    own = {i.argval for i in dis.get_instructions(code) if i.opname in kinds}
    return own.union(*inner)


def names(cells) -> tuple:
    "(names that code cells make for others, names that they read and do not make themselves)"
    made, read = set(), set()
    for source in cells:
        plain = re.sub(r"^[%!].*$", "", source, flags=re.M)
        code = compile(plain, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        made |= operands(code, {"STORE_NAME", "STORE_GLOBAL"})
        read |= operands(code, {"LOAD_NAME", "LOAD_GLOBAL"})
    return made, read


@EVERY
def test_the_copy_makes_every_name_that_it_uses(lesson, copies):
    "What a dropped cell made, no cell that is left needs."
    cells = json.loads(copies[lesson.path.name])["cells"]
    copy = [classroom.source_of(c) for c in cells if c["cell_type"] == "code"]
    made, read = names(copy)
    original, _ = names(cell.source for cell in lesson.code_cells)
    assert not (read & original) - made


def test_solution_is_refused(capsys):
    classroom.class_exercise("00_start", "ex_draw").solution()
    said = capsys.readouterr().out
    assert "ask your teacher" in said and "return" not in said


def test_a_copy_that_leaks_would_be_caught(copies):
    lesson = next(x for x in WITH if x.name == "31_model.attention")
    hidden, held = secrets(lesson)
    spoilt = copies[lesson.path.name].decode() + json.dumps(held[0].source)
    texts = [json.dumps(line, ensure_ascii=False)[1:-1] for line in hidden]
    assert any(text in spoilt for text in texts)
    assert not re.search(r"check_solution|misconceptions=", copies[lesson.path.name].decode())
