"""One test over all exercises of the course.

In each lesson: the stub fails, the solution passes, also as a list, an array or a tensor, each
misconception fails and is diagnosed by its own name only, and there are cases that are drawn.
"""

import ast
import builtins
import dis
import importlib
import linecache
import numbers
import re

import numpy as np
import pytest
import torch

import rules
from llm_course.check import CheckFailed, Exercise

LESSONS = [lesson for lesson in rules.lessons() if lesson.number]
IMPORTS = (ast.Import, ast.ImportFrom)


def is_import(cell) -> bool:
    return bool(cell.tree.body) and all(isinstance(node, IMPORTS) for node in cell.tree.body)


def checks(cell) -> list:
    "(name of the exercise, function) of the calls `ex.check(fn)`, `ex.check_solution(fn)`."
    names = {"check", "check_solution"}
    calls = [node for node in cell.nodes(ast.Call) if getattr(node.func, "attr", "") in names]
    return [
        (call.func.value.id, ast.unparse(call.args[0]))
        for call in calls
        if isinstance(call.func.value, ast.Name) and call.args
    ]


def global_names(code) -> set:
    "The global names that compiled code reads, its inner functions included."
    loads = {"LOAD_GLOBAL", "LOAD_NAME"}
    names = {i.argval for i in dis.get_instructions(code) if i.opname in loads}
    inner = [global_names(c) for c in code.co_consts if hasattr(c, "co_code")]
    return names.union(*inner)


class Collected:
    """The exercises of one lesson, with their stubs and their solutions.

    They may use what the lesson exports, what it imports, and other folded cells of exercises; so
    they can be tried without running the lesson, and a learner can begin with them.
    """

    def __init__(self, lesson):
        module = f"llm_course.{lesson.module}" if lesson.module else "builtins"
        self.space = dict(vars(importlib.import_module(module)))
        self.stubs, self.solutions, self.unknown = {}, {}, {}
        cells = [cell for cell in lesson.code_cells if not cell.exported]
        for cell in cells:
            if is_import(cell) and not cell.skipped:
                exec(cell.source, self.space)
        for cell in cells:
            if defines_exercise(cell):
                self.define(cell)
            elif any(name in self.exercises for name, _ in checks(cell)):
                self.keep(cell)

    @property
    def exercises(self) -> dict:
        return {k: v for k, v in self.space.items() if isinstance(v, Exercise)}

    def define(self, cell) -> None:
        "Run a cell that makes exercises, and note the names in it that nothing here defines."
        code = compile(cell.source, cell.id, "exec")
        linecache.cache[cell.id] = (1, None, cell.source.splitlines(keepends=True), cell.id)
        try:
            exec(code, self.space)
        except NameError as error:
            self.unknown[cell.id] = {str(error)}
            return
        if unknown := global_names(code) - self.space.keys() - set(dir(builtins)):
            self.unknown[cell.id] = unknown

    def keep(self, cell) -> None:
        "Define a cell's functions without running its checks."
        body = [
            node
            for node in cell.tree.body
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        ]
        space = dict(self.space)
        linecache.cache[cell.id] = (1, None, cell.source.splitlines(keepends=True), cell.id)
        exec(compile(ast.Module(body, []), cell.id, "exec"), space)
        for exercise, function in checks(cell):
            (self.stubs if cell.skipped else self.solutions)[exercise] = eval(function, space)


def own_names(fn) -> set:
    "The name of a function, and what a lambda around it calls."
    return {fn.__name__} - {"<lambda>"} or set(fn.__code__.co_names) - {"_pattern"}


NO_DATA = {  # exercises without drawn cases, and why
    "ex_case": "its argument is the learner's own function",
}


def as_list(x):
    return x.tolist() if isinstance(x, (torch.Tensor, np.ndarray, np.generic)) else x


def as_array(x):
    return np.array(as_list(x))


def as_tensor(x):
    return torch.tensor(as_list(x), dtype=torch.float64 if is_float(as_list(x)) else None)


FORMS = [as_list, as_array, as_tensor]


def is_float(x) -> bool:
    "Is there a float in nested lists?"
    return any(map(is_float, x)) if isinstance(x, (list, tuple)) else isinstance(x, float)


def in_form(x, form):
    "The same answer, its numbers as lists, arrays or tensors (single ones without dimensions)."
    if isinstance(x, dict):
        return {key: in_form(value, form) for key, value in x.items()}
    if isinstance(x, (list, tuple)) and not all(isinstance(y, numbers.Number) for y in x):
        return type(x)(in_form(y, form) for y in x)
    small = isinstance(x, numbers.Number) and abs(x) < 2**53
    if small or isinstance(x, (list, tuple, torch.Tensor, np.ndarray, np.generic)):
        return form(x)
    return x


def defines_exercise(cell) -> bool:
    "A folded cell that makes an exercise which has misconceptions, and is not part of a module."
    calls = [node for node in cell.nodes(ast.Call) if getattr(node.func, "id", "") == "Exercise"]
    return bool(calls) and not cell.exported and "code-fold: true" in cell.directives


@pytest.fixture(scope="module", params=LESSONS, ids=lambda lesson: lesson.name)
def lesson(request):
    return Collected(request.param)


def each(lesson):
    if not lesson.exercises:
        pytest.skip("this lesson has no exercises")
    return lesson.exercises.items()


def test_exercises_stand_alone(lesson):
    assert not lesson.unknown, f"names that are neither exported nor imported: {lesson.unknown}"


def test_each_has_stub_and_solution(lesson):
    for name, exercise in each(lesson):
        assert name in lesson.stubs, (
            f"{name}: no cell with '#| eval: false' ends in {name}.check(...)"
        )
        assert name in lesson.solutions, (
            f"{name}: no solution cell ends in {name}.check_solution(...)"
        )
        assert exercise.hints and exercise.misconceptions, f"{name} needs hints and misconceptions"


def test_stubs_fail(lesson, capsys):
    for name, exercise in each(lesson):
        assert exercise.diagnose(lesson.stubs[name]), f"the stub of {name} passes"
        assert exercise.diagnose(lesson.stubs[name]).diagnosis is None
        exercise.check(lesson.stubs[name])  # says "not started", and lets the notebook run on
        assert "✓" not in capsys.readouterr().out


def test_solutions_pass(lesson, capsys):
    for name, exercise in each(lesson):
        exercise.check_solution(lesson.solutions[name])
        said = capsys.readouterr().out
        assert "reference solution" in said and "✓" not in said  # a tick is a learner's own


def test_printed_solutions_are_solutions(lesson, capsys):
    "What `solution()` prints is a program, without switches for the mistakes, and it passes."
    for name, exercise in each(lesson):
        exercise.solution()
        printed = capsys.readouterr().out
        space = dict(lesson.space)
        exec(printed, space)
        answer = space[ast.parse(printed).body[-1].name]
        assert exercise.diagnose(answer) is None, f"{name}: {printed}"


def test_solutions_do_not_replace_an_answer(lesson):
    "After Run All, the learner's function is still the learner's."
    for name, exercise in each(lesson):
        stub, solution = lesson.stubs[name], lesson.solutions[name]
        assert own_names(stub).isdisjoint(own_names(solution)), f"{name}: the same name twice"


def test_misconceptions_are_told_apart(lesson):
    "Each wrong program fails under its own name, and under no other."
    for name, exercise in each(lesson):
        assert not exercise.verify(), f"{name}: {exercise.verify()}"
        programs = next(iter(exercise.misconceptions.values()))
        with pytest.raises(CheckFailed) as failure:
            exercise.check(programs[0] if isinstance(programs, list) else programs)
        assert failure.value.diagnosis in str(failure.value), name


def test_cases_are_drawn(lesson):
    "No answer can be learnt by heart: every exercise on data has cases that nobody wrote down."
    for name, exercise in each(lesson):
        if name in NO_DATA:
            continue
        assert exercise.more, f"{name} needs more=...: random cases, bounds, ties, empty inputs"
        assert len(exercise.cases) > 3 and exercise._hidden, f"{name}: too few cases"


def answers_in(form, solution):
    "A solution that answers in another form."
    return lambda *case: in_form(solution(*case), form)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_right_answers_in_other_forms_pass(lesson, form):
    for name, exercise in each(lesson):
        if not exercise.form:
            problem = exercise.diagnose(answers_in(form, lesson.solutions[name]))
            assert problem is None, f"{name}: right, as {form.__name__}, and rejected: {problem}"


def test_each_lesson_has_exercises():
    "Engine rooms may have none; the museum asks its riddles in another way."
    road = [lesson for lesson in LESSONS if not lesson.is_engine_room]
    without = [x.name for x in road if not any(defines_exercise(cell) for cell in x.code_cells)]
    assert len(road) > 40 and without == ["89_museum"], f"lessons without an exercise: {without}"


def test_an_exercise_that_cannot_tell_mistakes_apart_is_caught():
    bad = Exercise(
        "double", lambda x: 2 * x, cases=[(0,)], misconceptions={"squared": lambda x: x * x}
    )
    assert bad.diagnose(bad.misconceptions["squared"]) is None  # 0 is doubled and squared alike
    good = Exercise(
        "double", lambda x: 2 * x, cases=[(3,)], misconceptions={"squared": lambda x: x * x}
    )
    assert re.search("squared", str(good.diagnose(good.misconceptions["squared"])))
