"Each rule catches a lesson that breaks it: a rule that lets everything pass is no rule."

import json

import pytest

import rules

GOOD = [
    ("markdown", "# Doubling\n\n> Twice as much, by hand and by function."),
    ("code", "#| default_exp model.double"),
    ("markdown", "Why would anybody double a number?"),
    ("code", "#| export\nimport math\nfrom llm_course.core import set_seed"),
    ("code", "from fastcore.test import test_eq\nfrom llm_course.core import lesson"),
    ("code", 'lesson("31_model.double", minutes=30)'),
    (
        "code",
        "#| export\ndef double(\n    x: float, # Any number\n) -> float:  # Twice that\n"
        '    "Twice as much."\n    return 2 * x',
    ),
    ("code", "test_eq(double(2), 4)"),
    (
        "code",
        '#| export\nclass Doubler:\n    "Doubles again and again."\n'
        "    def __init__(\n        self,\n"
        "        times: int, # How often\n    ):\n        self.times = times\n\n"
        "    def __call__(self, x):\n        return x * 2 ** self.times",
    ),
    ("code", "assert Doubler(2)(1) == 4"),
    ("markdown", "**1. Half.** (5 minutes, easy) Take half of a number."),
    ("markdown", "## What you have now\n\n`double`."),
    ("code", "test_eq(Doubler(1)(2), 4)"),
]
ROOM = [
    GOOD[0],
    GOOD[1],
    ("markdown", "**Engine room.** You may skip this notebook; come back when you double a lot."),
    *GOOD[3:5],
    ("code", 'lesson("31b_model.double")'),
    *GOOD[6:],
]


def write(folder, cells, name="31_model.double", outputs=None):
    "A notebook with these cells; `outputs` go to the last one."
    made = []
    for i, (kind, source) in enumerate(cells):
        cell = {"id": f"cell{i:04}", "cell_type": kind, "metadata": {}, "source": source}
        made.append(cell | ({"outputs": []} if kind == "code" else {}))
    made[-1]["outputs"] = outputs or []
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": made}), encoding="utf-8")
    return rules.Lesson(path)


def replaced(old, new):
    "The good lesson with a piece of text exchanged."
    changed = [(kind, source.replace(old, new)) for kind, source in GOOD]
    assert changed != GOOD, f"nothing to replace: {old!r}"
    return {"cells": changed}


def added(source, kind="code"):
    "The good lesson with one more cell."
    return {"cells": [*GOOD, (kind, source)]}


def printed(text):
    return {"cells": GOOD, "outputs": [{"output_type": "stream", "name": "stdout", "text": text}]}


def shown(kind, data):
    return {"cells": GOOD, "outputs": [{"output_type": "display_data", "data": {kind: data}}]}


MUTANTS = [
    ("opens_with_title_and_sentence", replaced("# Doubling", "## Doubling")),
    ("opens_with_title_and_sentence", replaced("> Twice", "Twice")),
    ("is_named_after_its_module", {"cells": GOOD, "name": "31_model.twice"}),
    ("is_named_after_its_module", {"cells": GOOD, "name": "index"}),
    ("is_named_after_its_module", added("#| default_exp model.other")),
    ("header_names_the_lesson", replaced('lesson("31_model.double"', 'lesson("30_model.double"')),
    ("directives_are_known_and_first", replaced("#| export\ndef", "#| exprot\ndef")),
    ("directives_are_known_and_first", replaced("#| export\ndef", "#|export\ndef")),
    ("directives_are_known_and_first", added("x = 1\n#| hide")),
    ("directives_are_known_and_first", added("# a comment\n#| export\ndef f(): pass")),
    ("imports_stand_alone", replaced("test_eq(double(2)", "import os\ntest_eq(double(2)")),
    ("imports_stand_alone", added("def draw():\n    import os\n\ndraw()")),
    ("cells_are_short", added("x = 1\n" * 31)),
    ("cells_are_short", added("#| export\n" + "x = 1\n" * 26)),
    ("functions_are_short", added("def f():\n" + "    x = 1\n\n" * 15 + "    return x")),
    ("lines_are_narrow", added("x = " + "1 + " * 30 + "1")),
    ("fits_its_kind", shown("text/plain", "a" * 160_000)),
    ("fits_its_kind", {"cells": [*GOOD, *[("code", "x = 1\n" * 30)] * 15]}),
    ("fits_its_kind", {"cells": [*GOOD, *[("code", "x = 1")] * 53]}),
    ("fits_its_kind", added("word " * 2000, "markdown")),
    ("fits_its_kind", added("#| export\n" + "".join(f"X{i} = Y{i}, _z = 1, 2\n" for i in range(10)))),
    ("engine_room_says_when_to_come_back", {"cells": GOOD, "name": "31b_model.double"}),
    ("minutes_are_one_sitting", replaced("minutes=30", "minutes=75")),
    ("minutes_are_one_sitting", replaced(", minutes=30", "")),
    ("ends_like_every_lesson", replaced("## What you have now", "## Summary")),
    ("ends_like_every_lesson", replaced(" (5 minutes, easy)", "")),
    ("statements_do_something", added("test_eq(1, 1) if GOOD else None")),
    ("imports_no_private_names", replaced("import set_seed", "import _probe")),
    ("pictures_are_few", shown("text/html", '<img src="data:image/png;base64,a"/>' * 5)),
    ("public_names_are_documented", replaced('    "Twice as much."\n', "")),
    ("public_names_are_documented", replaced("    x: float, # Any number\n", "    x: float,\n")),
    (
        "public_names_are_documented",
        replaced("        times: int, # How often\n", "        times: int,\n"),
    ),
    (
        "public_names_are_documented",
        replaced("self,\n        times: int, # How", "self, a, times: int, # How"),
    ),
    ("public_names_are_tested", replaced("test_eq(double(2), 4)", "double(2)")),
    ("a_fifth_of_the_cells_test", {"cells": GOOD + [("code", "x = 1")] * 8}),
    ("printed_lines_are_narrow", printed("one\n" + "word " * 16)),
    ("printed_lines_are_narrow", shown("text/plain", "[" + "1, " * 30 + "1]")),
    ("outputs_are_steady", shown("application/vnd.jupyter.widget-view+json", {})),
    ("outputs_are_steady", printed("saved in /home/ann/model.bin")),
    ("outputs_are_steady", printed("took 1.5 s")),
    (
        "outputs_are_steady",
        {"cells": GOOD, "outputs": [{"output_type": "stream", "name": "stderr", "text": "!"}]},
    ),
    ("names_no_machine", added('path = "/home/ann/text.txt"')),
    ("text_files_say_their_encoding", added('open("a.txt")')),
    ("text_files_say_their_encoding", added('Path("a.txt").read_text()')),
    ("text_files_say_their_encoding", added('Path("a.txt").write_text("a")')),
]


def find(name):
    return next(rule for rule in rules.RULES if rule.__name__ == name)


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_a_good_lesson_passes(rule, tmp_path):
    assert list(rule(write(tmp_path, GOOD))) == []
    assert list(rule(write(tmp_path, ROOM, "31b_model.double"))) == []


def test_wide_words_for_a_picture_and_named_cells_pass(tmp_path, monkeypatch):
    picture = {"text/html": "<p>", "text/plain": "word " * 30}
    outputs = [{"output_type": "display_data", "data": picture}]
    check = find("printed_lines_are_narrow")
    assert list(check(write(tmp_path, GOOD, outputs=outputs))) == []
    wide = write(tmp_path, **printed("x" * 77))
    last = wide.cells[-1].id
    monkeypatch.setitem(rules.WIDE_OUTPUTS, f"31_model.double {last}", "as a test")
    assert list(check(wide)) == [] and set(rules.WIDE_OUTPUTS.values()) > {"as a test"}


def test_what_counts_as_public(tmp_path):
    cells = [
        "#| export\nA, _b = 1, 2\nc.d = 3\nE: int = 4\nf[0] = 5",
        "#| exports\nclass G:\n    pass\n\n@patch\ndef h(self: G): pass\n\ndef _i(): pass",
        "j = 6",
    ]
    lesson = write(tmp_path, [*GOOD, *(("code", source) for source in cells)])
    assert lesson.public_names() == ["A", "Doubler", "E", "G", "double"]


@pytest.mark.parametrize(
    "name, mutant", MUTANTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(MUTANTS)]
)
def test_a_broken_lesson_is_caught(name, mutant, tmp_path):
    assert list(find(name)(write(tmp_path, **mutant)))


def test_every_rule_has_a_mutant():
    # Ids are the one thing that `write` always gets right; they have a test of their own below.
    without = {rule.__name__ for rule in rules.RULES} - {name for name, _ in MUTANTS}
    assert without == {"ids_are_there_and_unique"}


def test_ids():
    class Twice:
        cells = [
            rules.Cell("abcd1234", "code", ""),
            rules.Cell("abcd1234", "code", ""),
            rules.Cell("", "code", ""),
        ]

    complaints = list(find("ids_are_there_and_unique")(Twice))
    assert len(complaints) == 2


@pytest.mark.parametrize(
    "line, fragment",
    [
        ("from llm_course.train.loop import train", "not a lower number"),
        ("import llm_course.train.loop", "not a lower number"),
        ("from llm_course.train import loop", "not a lower number"),
        ("from llm_course.nowhere import x", "no lesson exports"),
        ("from llm_course.tokens.bpe import x", "must not import tokens"),
        ("def f():\n    from llm_course.train.loop import train", "not a lower number"),
    ],
)
def test_imports_of_higher_numbers_are_caught(line, fragment, tmp_path):
    known = {"core": "00a", "tokens.bpe": "20", "model.double": "31", "train.loop": "41"}
    check = rules.exports_import_lower_numbers
    assert list(check(write(tmp_path, GOOD), known)) == []
    broken = write(tmp_path, **replaced("from llm_course.core import set_seed", line))
    assert fragment in " ".join(check(broken, known))


@pytest.mark.parametrize(
    "line",
    [
        'open("a.bin", "rb")',
        'p.open("wb")',
        'open("a", encoding="utf-8")',
        'p.read_text(encoding="utf-8")',
        "webbrowser.open(url)",
        "p.read_bytes()",
    ],
)
def test_good_ways_to_open_a_file_pass(line, tmp_path):
    assert list(find("text_files_say_their_encoding")(write(tmp_path, **added(line)))) == []
