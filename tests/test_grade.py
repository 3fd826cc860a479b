"""A class of generated notebooks, right, wrong in every known way, and hostile, is graded right."""

import ast
import csv
import json
import os
import time

import pytest

from llm_course import classroom, grade, handout, progress

LESSON = "31_model.attention"
LIMITS = grade.Limits(seconds=4)
HOSTILE = {
    "loops": "while True:\n    try:\n        while True: pass\n    except Exception: pass",
    "prints": "for i in range(200):\n    print('x' * 5_000_000)\n1/0",
    "deletes": "import os, shutil\nfor n in os.listdir('.'): os.remove(n)\nshutil.rmtree('..')",
    "leaves": "import sys\nsys.exit(7)",
    "drops": "import os\nos._exit(0)",
    "imports": "import a_package_that_nobody_has",
    "forks": "import os\nwhile True: os.fork()",
    "spawns": "import subprocess\nsubprocess.run(['sleep', '100'])",
    "calls": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9/')",
    "eats": "b = [bytearray(10**9) for _ in range(100)]",
    "segfaults": "import ctypes\nctypes.string_at(0)",
    "syntax": "def f(:\n    pass",
    "spies": "import glob\nprint(open(sorted(glob.glob({folder!r} + '/*/*.ipynb'))[0]).read())",
}


def answers() -> dict:
    """Title of each exercise -> (name of its variable, its stub's function, right source,
    mistake -> wrong source). The sources come from the lesson's own cells."""
    cells = [classroom.source_of(c) for c in classroom.read_cells(LESSON)]
    folded = [c for c in classroom.read_cells(LESSON) if progress.makes_exercise(c)]
    stubs = grade._stub_answers(LESSON)
    found = {}
    for cell in folded:
        tree = ast.parse(classroom.source_of(cell))
        helpers = [ast.unparse(n) for n in tree.body if isinstance(n, ast.FunctionDef)]
        for node in tree.body:
            call = getattr(node, "value", None)
            if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "Exercise":
                continue
            key, title = node.targets[0].id, call.args[0].value
            wrong = next(k.value for k in call.keywords if k.arg == "misconceptions")
            wrong = dict(zip(map(ast.literal_eval, wrong.keys), map(ast.unparse, wrong.values)))
            solution = next(s for s in cells if f"{key}.check_solution(" in s)
            defined = [n for n in ast.parse(solution).body if isinstance(n, ast.FunctionDef)][-1]
            own = stubs[key]
            plain = "\n".join(x for x in solution.split("\n") if not x.startswith("#|"))
            right = f"{plain.split(key + '.check_solution')[0]}\n{own} = {defined.name}"
            made = {}
            for mistake, source in wrong.items():
                if not source.startswith("["):  # several programs for one mistake: one is enough
                    made[mistake] = "\n".join([*helpers, f"{own} = {source}"])
            found[title] = (key, own, right, made)
    return found


def notebook(copy: bytes, told: dict) -> str:
    "A student's notebook: the class's copy, with sources in place of the stubs of some exercises."
    lesson = json.loads(copy)
    for cell in lesson["cells"]:
        for key, (source, own) in told.items():
            if classroom.for_learners(cell) and f"{key}.check(" in classroom.source_of(cell):
                cell["source"] = f"{source}\n{key}.check({own})"
    return json.dumps(lesson)


def make_class(folder, mistakes: int | None = None, hostile=tuple(HOSTILE)) -> dict:
    "Write the notebooks; (student, exercise) -> (points, mistake) as it must come out."
    every, expected = answers(), {}
    copy = handout.read_lessons(progress.lessons_folder(), solutions=False)[f"{LESSON}.ipynb"]
    right = {title: (key, source, own) for title, (key, own, source, _) in every.items()}

    def write(student, told, first=None):
        text = notebook(copy, {key: (source, own) for key, source, own in told.values()})
        if first is not None:
            lesson = json.loads(text)
            trouble = {"cell_type": "code", "id": "trouble0", "metadata": {}, "outputs": []}
            lesson["cells"].insert(-1, trouble | {"execution_count": None, "source": first})
            text = json.dumps(lesson)
        (folder / student).mkdir()
        (folder / student / f"{LESSON}.ipynb").write_text(text, encoding="utf-8")
        (folder / student / "notes.txt").write_text("mine", encoding="utf-8")
        for title in every:
            expected[student, title] = (int(title in told), "")

    write("all right", right)
    wrongs = [(t, m, s) for t, (_, _, _, made) in every.items() for m, s in made.items()]
    for n, (title, mistake, source) in enumerate(wrongs[:mistakes]):
        key, _, own = right[title]
        write(f"wrong {n}", right | {title: (key, source, own)})
        expected[f"wrong {n}", title] = (0, mistake)
    for name in hostile:
        source = HOSTILE[name].replace("{folder!r}", repr(str(folder)))
        title = next(iter(every))
        key, _, own = right[title]
        write(name, right | {title: (key, source, own)})  # instead of the first answer
        expected[name, title] = (0, "")
    write("nothing done", {})
    (folder / "a photo").mkdir()
    (folder / "a photo" / f"{LESSON}.ipynb").write_bytes(b"\x89PNG\r\n")
    expected |= {("a photo", title): (0, "") for title in every}
    return expected


def run(folder, expected) -> list:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    grades = grade.grade_folder(folder, limits=LIMITS)
    rows = list(csv.DictReader(grade.grades_csv(grades).splitlines()))
    found = {(r["student"], r["exercise"]): (int(r["points"]), r["mistake"]) for r in rows}
    wrong = {k: (found.get(k), v) for k, v in expected.items() if found.get(k) != v}
    assert not wrong and len(found) == len(expected)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return grades


@pytest.mark.skipif(os.name == "nt", reason="alarms and limits of memory are Unix's")
def test_a_small_class(tmp_path):
    expected = make_class(tmp_path, mistakes=1, hostile=("loops", "drops", "deletes"))
    grades = run(tmp_path, expected)
    counts = grade.count_mistakes(grades)
    assert all(sum(c.values()) == len({g.student for g in grades}) for c in counts.values())
    page = grade.grades_page(grades)
    mistake = next(m for _, m in expected.values() if m)
    assert mistake[:20] in page and "http" not in page.split("</style>")[1]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="alarms and limits of memory are Unix's")
def test_a_class_of_thirty_in_five_minutes(tmp_path):
    others = 3  # all right, nothing done, a photo
    expected = make_class(tmp_path, mistakes=30 - others - len(HOSTILE))
    assert len({student for student, _ in expected}) == 30
    start = time.monotonic()
    run(tmp_path, expected)
    seconds = time.monotonic() - start
    print(f"30 notebooks in {seconds:.0f} seconds")
    assert seconds < 300


def test_lessons_are_found(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / f"ada_{LESSON}.ipynb").write_text("{}", encoding="utf-8")
    (tmp_path / "x" / "mine.ipynb").write_text('"lesson(\\"00_start\\", minutes=10)"', encoding="utf-8")
    (tmp_path / "unknown.ipynb").write_text("{}", encoding="utf-8")
    found = {(w, s, own) for _, w, s, own in grade.find_notebooks(tmp_path)}
    assert found == {(LESSON, "ada", False), ("00_start", "x", True), ("", "unknown", False)}
    with pytest.raises(ValueError, match="no lesson"):
        grade.grade_folder(tmp_path, "31_model.nonsense")


def test_a_name_that_the_lesson_makes_is_found_by_running_it_all(tmp_path):
    "An answer that uses a value of the lesson's own cells is right as well."
    every = answers()
    title, (key, own, right, _) = next(iter(every.items()))
    cells = [(1, "offset = 0"), (2, f"{right}\noffset + 0\n{key}.check({own})")]
    name = grade.find_lesson(tmp_path / f"{LESSON}.ipynb")
    lesson = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    for number, source in cells:
        cell = {"cell_type": "code", "id": f"cell{number}", "metadata": {}, "outputs": []}
        lesson["cells"].append(cell | {"execution_count": None, "source": source})
    path = tmp_path / f"{LESSON}.ipynb"
    path.write_text(json.dumps(lesson), encoding="utf-8")
    quick = [n for n, _ in grade.student_cells(path, name, whole=False)]
    assert quick == [1, 2]
    known = classroom.source_of(classroom.read_cells(LESSON)[-1])
    lesson["cells"][0]["source"] = known
    path.write_text(json.dumps(lesson), encoding="utf-8")
    assert [n for n, _ in grade.student_cells(path, name, whole=False)] == [2]
