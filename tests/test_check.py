"""The engine of the exercises: right answers in any form pass, misbehaving ones hurt nothing."""

import asyncio
import builtins
import collections
import math
import os
import random
import signal
import sys
import threading
import time
import warnings

import mutate
import numpy as np
import pytest
import rules
import torch

from llm_course.answers import answers_agree, find_relation, plain_answer
from llm_course.check import CheckFailed, Exercise

RIGHT = [0.25, 0.75]


def exercise(answer, cases=((0,),), **options) -> Exercise:
    "An exercise whose right answer is the same in each case."
    return Exercise("an exercise", lambda x: answer, [tuple(c) for c in cases], **options)


def reply(ex, fn) -> str:
    "What the check says: what it prints, or why it fails."
    found = ex.diagnose(fn)
    return str(found) if found else "✓"


# --- Values first, types after --------------------------------------------------------------------

FORMS = {
    "0-d tensor for a number": (0.5, lambda x: torch.tensor(0.5)),
    "a number for a 0-d tensor": (torch.tensor(0.5), lambda x: 0.5),
    "numpy scalar": (0.5, lambda x: np.float32(0.5)),
    "shape (1,) for a scalar": (0.5, lambda x: torch.tensor([0.5])),
    "a list of one for a scalar": (3, lambda x: [3]),
    "list for tuple": ((1, 2), lambda x: [1, 2]),
    "tensor for list": (RIGHT, lambda x: torch.tensor(RIGHT)),
    "list for tensor": (torch.tensor(RIGHT), lambda x: RIGHT),
    "array for tensor": (torch.tensor(RIGHT), lambda x: np.array(RIGHT)),
    "rows of tensors": (torch.eye(2), lambda x: [torch.tensor([1.0, 0]), torch.tensor([0.0, 1])]),
    "range": ([0, 1, 2], lambda x: range(3)),
    "generator": ([0, 1, 2], lambda x: (i for i in range(3))),
    "map": (["a", "b"], lambda x: map(str, "ab")),
    "keys": ([1, 2], lambda x: {1: 3, 2: 4}.keys()),
    "values": ([3, 4], lambda x: {1: 3, 2: 4}.values()),
    "items": ([(1, 3), (2, 4)], lambda x: {1: 3, 2: 4}.items()),
    "0/1 for booleans": ([True, False], lambda x: [1, 0]),
    "booleans for 0/1": (torch.tensor([1, 0]), lambda x: torch.tensor([True, False])),
    "bfloat16": (torch.tensor(RIGHT), lambda x: torch.tensor(RIGHT).bfloat16()),
    "with gradient": (0.5, lambda x: torch.tensor(0.5, requires_grad=True)),
    "tuple of parts": ((torch.eye(2), [1, 2]), lambda x: [np.eye(2), (1, 2)]),
    "deque": ([1, 2], lambda x: collections.deque([1, 2])),
    "empty": ([], lambda x: torch.tensor([])),
    "complex without imaginary part": (0.5, lambda x: 0.5 + 0j),
}


@pytest.mark.parametrize("name", FORMS)
def test_right_answers_in_other_forms_pass(name):
    right, fn = FORMS[name]
    assert reply(exercise(right), fn) == "✓"


def test_a_mistake_keeps_its_name_in_another_form():
    ex = exercise(RIGHT, misconceptions={"the parts are swapped": lambda x: RIGHT[::-1]})
    for fn in (lambda x: torch.tensor(RIGHT[::-1]), lambda x: tuple(RIGHT[::-1])):
        assert ex.diagnose(fn).diagnosis == "the parts are swapped"


@pytest.mark.parametrize(
    "form, right, answer, says",
    [
        ("tensor", torch.ones(3), [1.0, 1, 1], "a tensor of shape (3,) is asked for, this is a list"),
        ("list", [1, 2], (1, 2), "a list of 2 is asked for, this is a tuple of 2"),
        ("number", 0.5, torch.tensor(0.5), "a number is asked for, this is a tensor of shape ()"),
    ],
)
def test_a_type_that_is_asked_for_is_said_after_the_values(form, right, answer, says):
    ex = exercise(right, form=form)
    assert f"the numbers are right; {says}" in reply(ex, lambda x: answer)
    assert reply(ex, lambda x: right) == "✓"


WRONG = {
    "the imaginary part counts": (1.0, 1 + 2j),
    "infinity": (math.inf, 1.0),
    "nan": (1.0, math.nan),
    "text for a number": (3, "3"),
    "bytes for text": ("a", b"a"),
    "another shape": ([1, 2], [[1], [2]]),
    "a millionth as nought": (1e-6, 0.0),
    "a small gradient as nought": (torch.tensor([1e-7, 2e-7]), torch.zeros(2)),
    "a large integer, one more": (1_000_000, 1_000_001),
    "a set for a list": ([1, 2], {1, 2}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_fail(name):
    right, answer = WRONG[name]
    assert not answers_agree(right, answer)
    assert reply(exercise(right), lambda x: answer).startswith("✗")


# --- Names ----------------------------------------------------------------------------------------


def test_an_exception_is_the_same_mistake_only_with_type_message_and_place():
    def crash(x):
        raise RuntimeError("shape mismatch")

    def other(x):
        raise RuntimeError("another one")

    ex = exercise(1, misconceptions={"shapes do not fit": crash})
    assert ex.diagnose(crash).diagnosis == "shapes do not fit"
    assert ex.diagnose(other).diagnosis is None
    inside = exercise(1, misconceptions={"views": lambda x: torch.zeros(2, 3).view(5)})
    assert inside.diagnose(lambda x: torch.zeros(2, 3).view(5)).diagnosis == "views"
    assert inside.diagnose(lambda x: torch.zeros(2, 3).view(4)).diagnosis is None


def test_two_mistakes_with_equal_numbers_are_both_possible():
    ex = Exercise(
        "double", lambda x: 2 * x, [(2,)],
        misconceptions={"squared plus two": lambda x: x * x + 2, "tripled": lambda x: 3 * x},
    )
    found = ex.diagnose(lambda x: 6)
    assert found.diagnosis is None and found.possible == ("squared plus two", "tripled")
    assert "squared plus two; or: tripled" in str(found)
    assert any("apart" in words for words in ex.verify())


def test_a_crash_in_a_few_cases_takes_no_name_away():
    cases = [([1, 2],), ([3],), ([4, 4, 8],), ([],)]
    wrong = {"divided by one more": lambda xs: sum(xs) / (len(xs) + 1)}
    ex = Exercise("mean", lambda xs: sum(xs) / max(1, len(xs)), cases, misconceptions=wrong)
    assert ex.diagnose(lambda xs: sum(xs) / (len(xs) + 1) + 0 * xs[0]).diagnosis
    assert ex.diagnose(lambda xs: xs[9]).diagnosis is None
    assert ex.diagnose(lambda xs: sum(xs) / len(xs)).diagnosis is None  # right where it answers


def test_tensors_are_drawn_and_always_the_same():
    drawn = [
        Exercise("sum", torch.sum, [(torch.ones(2),)], more=lambda rng: [(rng.tensor(2, 3),)])
        for _ in range(2)
    ]
    first, second = (ex.cases[1][0] for ex in drawn)
    assert first.shape == (2, 3) and torch.equal(first, second)


def test_several_programs_may_have_one_name():
    ex = Exercise(
        "the middle", lambda xs: xs[1:-1], [([1, 2, 3],), ([4, 5],)],
        misconceptions={"an end is left": [lambda xs: xs[1:], lambda xs: xs[:-1]]},
    )
    assert not ex.verify()
    assert ex.diagnose(lambda xs: xs[:-1]).diagnosis == "an end is left"


# --- Relations that need no table -----------------------------------------------------------------

NUMBERS = [[3.0, 1.5, 2.25], [0.7, 4.1], [5.3, 0.2, 0.9, 1.0]]
SHARES = [np.exp(x) / np.exp(x).sum() for x in NUMBERS]
MATRICES = [np.arange(6.0).reshape(2, 3) ** 2, np.arange(4.0).reshape(2, 2) ** 1.5]
A = np.array
RELATIONS = [
    ("sign", NUMBERS, lambda w: -A(w)),
    ("transposed", MATRICES, lambda w: w.T),
    ("shape is not", NUMBERS, lambda w: A(w)[:, None]),
    ("half", NUMBERS, lambda w: A(w) / 2),
    ("twice", NUMBERS, lambda w: A(w) * 2),
    ("ln 2", NUMBERS, lambda w: A(w) / math.log(2)),
    ("ln 10", NUMBERS, lambda w: A(w) / math.log(10)),
    ("100 times", NUMBERS, lambda w: A(w) * 100),
    ("times 3.7", NUMBERS, lambda w: A(w) * 3.7),
    ("multiplied by the number of items of argument 1", [2.0, 3.0], None),
    ("reverse order", NUMBERS, lambda w: w[::-1]),
    ("another order", NUMBERS, lambda w: [w[1], w[0], *w[2:]] if len(w) > 2 else w),
    ("white space", ["a b", "c"], lambda w: f" {w}\n"),
    ("capital", ["A b", "c"], str.upper),
    ("rounded to one decimal", NUMBERS, lambda w: np.round(w, 1)),
    ("cut to a whole", NUMBERS, lambda w: np.trunc(w)),
    ("not rounded", [[3.0, 1], [2.0, 7]], lambda w: A(w) + [0.2, -0.3]),
    ("one too high", NUMBERS, lambda w: A(w) + 1),
    ("last item is missing", NUMBERS, lambda w: w[:-1]),
    ("first item is missing", NUMBERS, lambda w: w[1:]),
    ("too many at the end", NUMBERS, lambda w: [*w, 9.5]),
    ("exp is missing", NUMBERS, lambda w: np.log(w)),
    ("logarithm is missing", NUMBERS, lambda w: np.exp(w)),
    ("one minus", NUMBERS, lambda w: 1 - A(w)),
    ("one divided by", NUMBERS, lambda w: 1 / A(w)),
    ("square root is missing", NUMBERS, lambda w: A(w) ** 2),
    ("not normalised", SHARES, lambda w: A(w) * len(w) * 1.3),
    ("part 1 of 2 is right, part 2 not", [(1, "a"), (2, "b")], lambda w: (w[0], "?")),
    ("part 2 of 2 alone", [(1, "a"), (2, "b")], lambda w: w[1]),
]


@pytest.mark.parametrize("says, right, wrong", RELATIONS, ids=[r[0] for r in RELATIONS])
def test_relations_are_named_without_a_table(says, right, wrong):
    cases = [([0.0] * n,) for n in (3, 5, 7)][: len(right)]
    if wrong is None:
        gots = [w * len(c[0]) for w, c in zip(right, cases)]
    else:
        gots = [plain_answer(wrong(w)) for w in right]
    assert says in find_relation(right, gots, cases)


def test_a_relation_is_claimed_only_if_it_holds_in_all_cases_and_is_nearly_the_only_one():
    assert find_relation([[1.0, 2.5], [3.5, 4.0]], [A([-1.0, -2.5]), A([3.6, 4.0])]) == ""
    assert find_relation([1.0], [0.0]) == ""  # one less, one minus, the logarithm ...


# --- Where ----------------------------------------------------------------------------------------


def test_the_place_both_values_and_how_much_is_right_are_said():
    text = reply(exercise([0.1, 0.2, 0.3]), lambda x: [0.1, 0.2, 0.30007])
    assert "at [2]: expected 0.3, got 0.3001; 2 of 3 entries agree" in text
    assert "2 items instead of 3" in reply(exercise([1, 2, 3]), lambda x: [1, 7])
    assert "the ca›t‹ sat" in reply(exercise("the cat sat"), lambda x: "the car sat")
    late = reply(exercise("a" * 300 + "b"), lambda x: "a" * 300 + "c")
    assert "›c‹" in late and "›b‹" in late
    assert "at ['b']: expected 2, got 3" in reply(exercise({"b": 2}), lambda x: {"b": 3})
    long = reply(exercise(list(range(500))), lambda x: [*range(499), 7])
    assert "at [499]: expected 499, got 7; 499 of 500 entries agree" in long


def test_a_crash_shows_the_line_of_the_learners_code():
    def fn(x):
        y = [x]
        return y[5]

    text = reply(exercise(1), fn)
    assert "IndexError" in text and "of your code: return y[5]" in text


# --- Nothing a learner types hurts the notebook ---------------------------------------------------


class Evil:
    def __eq__(self, other):
        return True

    def __repr__(self):
        raise ValueError("no")

    __str__ = __repr__
    __hash__ = None


class Untold(Exception):
    def __str__(self):
        raise RuntimeError


class Float(float):
    def __eq__(self, other):
        return True

    __hash__ = float.__hash__


def endless(x):
    while True:
        try:
            pass
        except:  # noqa: E722
            pass


def stubborn(x):
    while True:
        try:
            time.sleep(0.001)
        except:  # noqa: E722
            pass


def prints_for_ever(x):
    while True:
        print("x" * 1000)


def deep(x):
    return deep(x)


def raises(error):
    def fn(x):
        raise error

    return fn


def patches(x):
    torch.softmax = lambda *a, **k: 1
    return 1


def unfinished(x): ...


def printed(x):
    print(RIGHT)


async def promised(x):
    return RIGHT


def counts_for_ever(x):
    i = 0
    while True:
        yield i
        i += 1


def switches(x):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    warnings.simplefilter("error")
    torch.set_grad_enabled(False)
    sys.setrecursionlimit(500)
    return 1


BAD = {
    "a loop without end": (endless, "no answer: stopped after 0.3 seconds"),
    "a loop that catches all": (stubborn, "no answer: stopped after 0.3 seconds"),
    "prints for ever": (prints_for_ever, "no answer"),
    "exit": (lambda x: sys.exit(), "must return its answer"),
    "os._exit": (lambda x: os._exit(3), "must return its answer"),
    "quit": (lambda x: quit(), "must return its answer"),
    "interrupt": (raises(KeyboardInterrupt()), "was interrupted"),
    "error without text": (raises(ValueError()), "an error without a text: ValueError"),
    "error whose text raises": (raises(Untold()), "its text can't be shown"),
    "endless recursion": (deep, "RecursionError"),
    "equal to everything": (lambda x: Evil(), "an object of type Evil that cannot be shown"),
    "a float that is equal to everything": (lambda x: Float(3.0), "got      3.0"),
    "a list of evil": (lambda x: [Evil(), Evil()], "cannot be shown"),
    "nan": (lambda x: [math.nan] * 2, "expected 0.25, got nan"),
    "complex": (lambda x: [0.25 + 1j, 0.75], "0.25+1j"),
    "input": (lambda x: input("?"), "input() can't be used here"),
    "patched torch": (patches, "replaces softmax"),
    "a function": (lambda x: math.sin, "a function (was it called?)"),
    "a class": (lambda x: list, "a class, not a value"),
    "a coroutine": (promised, "a coroutine (await it)"),
    "an endless generator": (counts_for_ever, "10000 items instead of 2"),
    "no return": (lambda x: [].append(x), "is its return missing?"),
    "printed": (printed, "is printed ([0.25, 0.75]), not returned"),
    "one argument too few": (lambda: 1, "TypeError"),
    "a function that is none": (5, "a function is checked, this is a number"),
    "the settings": (switches, "expected"),
    "a view of torch": (lambda x: torch.zeros(2, 0), "shape (2, 0) instead of (2,)"),
}


def test_misbehaving_answers_get_one_sentence_and_change_nothing(capsys):
    ex = exercise(RIGHT, seconds=0.3)
    before = state()
    begin = time.monotonic()
    for name, (fn, says) in BAD.items():
        found = ex.diagnose(fn)
        assert found and says in str(found), f"{name}: {found}"
        assert str(found).startswith("✗ an exercise: "), name
        first = str(found).splitlines()[0]
        assert len(first) < 150, name
        assert state() == before, f"{name} left a trace"
    assert time.monotonic() - begin < 10
    assert capsys.readouterr() == ("", "")


def state() -> tuple:
    "What a check must leave as it was."
    return (
        random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(),
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        sys.getrecursionlimit(), os.getcwd(), len(warnings.filters), sys.stdout, sys.stdin,
        signal.getsignal(signal.SIGALRM), builtins.input, os._exit, torch.softmax,
    )


def test_one_call_a_case():
    calls = []
    exercise(1, cases=[(1,), (2,)]).diagnose(lambda x: calls.append(x))
    assert calls == [1, 2]


def test_out_of_the_main_thread_the_limit_holds_as_well():
    told = []
    ex = exercise(1, seconds=0.2)
    thread = threading.Thread(target=lambda: told.append(reply(ex, endless)))
    thread.start()
    thread.join(5)
    assert told and "no answer: stopped" in told[0]
    thread = threading.Thread(target=lambda: told.append(reply(ex, lambda x: 1)))
    thread.start()
    thread.join(5)
    assert told[1] == "✓"


def test_inside_an_event_loop_as_in_a_notebook():
    async def cell():
        return reply(exercise(1, seconds=0.2), endless), reply(exercise(1), lambda x: 1)

    late, right = asyncio.run(cell())
    assert "no answer" in late and right == "✓"


def test_the_alarm_of_others_still_rings():
    rang = []
    old = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        exercise(1).diagnose(lambda x: 1)
        time.sleep(0.3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert rang == [1]


def notebook(source: str) -> dict:
    "Run cells as a notebook does: all in one namespace."
    space = {"__name__": "__main__", "Exercise": Exercise, "torch": torch}
    exec(source, space)
    return space


def test_a_learners_own_helper_changes_nothing():
    space = notebook(
        "def _scale(x, by=2): return by * x\n"
        "def _mean(xs): return _scale(sum(xs)) / len(xs)\n"
        "ex = Exercise('m', lambda xs: _mean(xs), [([1, 2, 6],)],\n"
        "              misconceptions={'no mean': lambda xs: _scale(sum(xs))})\n"
    )
    exec(
        "def _mean(xs): return 0\ndef _scale(x, by=2): return 0\ndef sum(xs): return 0\n", space
    )
    ex = space["ex"]
    assert ex.diagnose(space["_mean"]) is not None
    assert ex.diagnose(lambda xs: 6) is None
    assert ex.diagnose(lambda xs: 18).diagnosis == "no mean"
    assert ex.reference([1, 2, 6]) == 6


def test_a_torch_patched_before_the_check_is_noticed():
    own = torch.softmax
    try:
        torch.softmax = lambda *a, **k: 1
        assert "softmax was replaced" in reply(exercise(1), lambda x: 1)
    finally:
        torch.softmax = own


def test_changed_inputs_are_said():
    def spoils(xs):
        xs.sort()

    ex = Exercise("sort", sorted, [([3, 1, 2],)])
    assert "argument 1 is changed, but nothing returned" in reply(ex, spoils)
    text = reply(ex, lambda xs: xs.clear() or [1])
    assert "argument 1 is not what it was" in text
    assert ex.cases == [([3, 1, 2],)]


def test_none_in_some_cases_is_said():
    ex = Exercise("sign", lambda x: x > 0, [(1,), (-1,)])
    assert "nothing (None) in 1 of 2 cases" in reply(ex, lambda x: True if x > 0 else None)


# --- Stubs, hidden cases, solutions ---------------------------------------------------------------


def test_a_stub_is_not_answered_yet_and_a_missing_return_is_something_else(capsys):
    ex = exercise(1, minutes=7)
    later = raises(NotImplementedError())
    for stub in (unfinished, lambda x: None, lambda x: unfinished(x), later):
        ex.check(stub)
        assert capsys.readouterr().out == "○ an exercise: not answered yet (7 minutes).\n"

    def forgets(x):
        x + 1

    with pytest.raises(CheckFailed, match="is its return missing"):
        ex.check(forgets)


def test_a_failed_check_is_no_traceback():
    found = exercise(1).diagnose(lambda x: 2)
    assert found._render_traceback_() == str(found).splitlines()
    with pytest.raises(CheckFailed) as failure:
        exercise(1).check(lambda x: 1 / 0)
    assert failure.value.__suppress_context__


def test_hidden_cases_find_an_answer_learnt_by_heart():
    def more(rng):
        return [([rng.randint(-9, 9) for _ in range(n)],) for n in (0, 1, 2, 3, 4, 5)]

    ex = Exercise("mean", lambda xs: sum(xs) / len(xs), [([1, 3],)], more=more)
    assert len(ex.cases) == 6  # the mean of nothing is an error, and left out
    assert 1 < len(ex._hidden) < 5 and 0 not in ex._hidden
    assert reply(ex, lambda xs: sum(xs) / len(xs)) == "✓"
    assert ex.diagnose(lambda xs: 2)
    only = ex._hidden
    hit = [i for i in range(len(ex.cases)) if i in only]
    wrong = lambda xs: 99 if any(xs == ex.cases[i][0] for i in hit) else sum(xs) / len(xs)
    text = reply(ex, wrong)
    assert "not shown" in text and "expected" not in text


def test_a_solution_is_readable(capsys, tmp_path):
    file = tmp_path / "cell.py"
    file.write_text(
        "def _entropy(ws, log=math.log, minus=True, own=1.0, weigh=lambda p: p):\n"
        "    return sum(own * weigh(w) * log(w) * (-1 if minus else 1) for w in ws)\n"
        "ex = Exercise('e', _entropy, [([0.5, 0.5],)])\n"
        "short = Exercise('s', lambda x: 2 * x, [(1,)])\n"
    , encoding="utf-8")
    space = {"__name__": "__main__", "Exercise": Exercise, "math": math}
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), space)
    space["ex"].solution()
    text = capsys.readouterr().out
    assert "def _entropy(ws):" in text and "w * math.log(w) * -1" in text
    space["short"].solution()
    assert capsys.readouterr().out == "def answer(x):\n    return 2 * x\n"


def test_a_check_is_quick():
    cases = [(torch.randn(5, 6),) for _ in range(6)]
    wrong = {f"times {k}": (lambda x, k=k: x * k) for k in range(3, 8)}
    ex = Exercise("softmax", lambda x: x.softmax(-1), cases, misconceptions=wrong)
    for fn in (lambda x: x.softmax(-1), lambda x: x.softmax(-1) * 3):
        best = math.inf
        for _ in range(5):
            begin = time.process_time()
            ex.diagnose(fn)
            best = min(best, time.process_time() - begin)
        assert best < 0.05




# --- Mutations ------------------------------------------------------------------------------------


def test_a_mutation_that_no_case_notices_is_listed():
    cell = rules.Cell(
        "mine", "code", "def mine(x, most):\n    return x if x > most else most\n", {}, []
    )
    tame = Exercise("cut", lambda x, most: max(x, most), [(3, 1)])
    telling = Exercise("cut", lambda x, most: max(x, most), [(3, 1), (1, 3)])
    changes, left = mutate.survivors(cell, {}, tame, "mine")
    assert changes == 3
    assert sorted(left) == ["return x", "return x if x >= most else most"]
    assert mutate.survivors(cell, {}, telling, "mine")[1] == ["return x if x >= most else most"]
