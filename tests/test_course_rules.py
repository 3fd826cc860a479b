"The lessons keep the rules of the course (rules.py)."

import ast
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rules

ROOT = Path(__file__).resolve().parent.parent
LESSONS = rules.lessons()
LIGHT = (
    "core",
    "world",
    "attempt",
    "check",
    "tokens",
    "data.batches",
    "model",
    "train",
    "generate",
    "evaluate",
    "evolve",
    "align",
)
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)


def complain(lesson, complaints):
    if complaints := list(complaints):
        pytest.fail("\n  ".join([f"{lesson.path.name}:", *complaints]), pytrace=False)


@each_lesson
@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_rule(lesson, rule):
    complain(lesson, rule(lesson))


@each_lesson
def test_exports_import_only_lower_numbers(lesson):
    complain(lesson, rules.exports_import_lower_numbers(lesson, rules.modules(LESSONS)))


def test_there_are_lessons():
    assert len(LESSONS) > 2


def test_numbers_and_modules_are_unique():
    numbers = [lesson.number for lesson in LESSONS if lesson.number]
    found = [lesson.module for lesson in LESSONS if lesson.module]
    assert len(set(numbers)) == len(numbers), f"two lessons share a number: {numbers}"
    assert len(set(found)) == len(found), f"two lessons export the same module: {found}"


def module_names(package: Path) -> set:
    "The modules of a package, apart from those that no notebook makes."
    found = {path.relative_to(package).with_suffix("") for path in package.rglob("*.py")}
    own = {"__init__", "__main__", "_modidx"}
    return {".".join(path.parts) for path in found if path.name not in own}


def test_no_module_without_its_lesson():
    exported = {lesson.module for lesson in LESSONS if lesson.exported}
    stale = module_names(ROOT / "llm_course") - exported
    assert not stale, f"no notebook exports {sorted(stale)}; delete what a renamed notebook left"
    missing = exported - module_names(ROOT / "llm_course")
    assert not missing, f"run nbdev_export: {sorted(missing)} are not there"


def light_modules() -> list:
    "The modules that must import with next to nothing installed."
    names = sorted(rules.modules(LESSONS))
    return [name for name in names if name.startswith(LIGHT)]


BLOCK = """
import importlib.abc, sys
allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "regex", "safetensors", "llm_course"}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        # What torch itself tries to import is torch's business: only the importing file counts.
        if name.split(".")[0] in allowed:
            return None
        frame = sys._getframe(1)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame and "llm_course" in frame.f_globals.get("__name__", ""):
            raise ModuleNotFoundError(f"{name} is not among torch, numpy, regex and safetensors")

sys.meta_path.insert(0, Blocker())
for name in %s:
    __import__("llm_course." + name)
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", cwd=ROOT
    )


def test_light_modules_need_next_to_nothing():
    result = run_python(BLOCK % light_modules())
    assert result.returncode == 0, result.stderr


def test_the_blocker_blocks(tmp_path):
    package = tmp_path / "llm_course"
    package.mkdir()
    (package / "__init__.py").write_text("import matplotlib", encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + BLOCK % ["core"]
    result = run_python(code)
    assert "matplotlib is not among" in result.stderr


def test_import_is_quick():
    def seconds(code):
        start = time.perf_counter()
        assert run_python(code).returncode == 0
        return time.perf_counter() - start

    pairs = [(seconds("import llm_course"), seconds("pass")) for _ in range(9)]
    extra = statistics.median(a for a, b in pairs) - statistics.median(b for a, b in pairs)
    noise = statistics.median(b for a, b in pairs)
    assert extra < max(0.05, noise), f"import llm_course takes {1000 * extra:.0f} ms, at most 50"
    loaded = run_python("import llm_course, sys; print('torch' in sys.modules)").stdout
    assert loaded.strip() == "False", "import llm_course must not import torch"


def lint(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess:
    "Ruff with the rules of pyproject.toml: dead imports, unknown names, closures that see too late."
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", *arguments]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, encoding="utf-8", cwd=ROOT
    )


def test_no_fault_that_a_linter_sees():
    found = lint("llm_course", "nbs", "tools", "tests", "benchmarks", "experiments", "setup.py")
    assert found.returncode == 0, (
        f"{found.stdout}A module imports what its exported cells need; what only the lesson "
        "needs goes into a cell that is not exported."
    )


def test_the_linter_sees_a_dead_import_in_a_module():
    found = lint("--stdin-filename", "llm_course/core.py", "-", text="import os\n")
    assert found.returncode == 1 and "F401" in found.stdout


def text_files() -> list:
    "Files of the project that people read, notebooks and generated modules left out."
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    kinds = {".py", ".md", ".yml", ".yaml", ".ini", ".toml", ".cff", ".txt", ".css", ""}
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [
        p for p in paths if p.suffix in kinds and p.is_file() and "llm_course" not in p.parts[-2:]
    ]


def test_files_name_no_machine():
    for path in text_files():
        if path.name in ("rules.py", "test_rules.py"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = rules.MACHINE_PATH.search(line)
            assert not found, (
                f"{path.relative_to(ROOT)}:{number}: {found[0]} is a path of one machine"
            )


def test_programs_say_their_encoding():
    programs = [
        ROOT / "setup.py",
        *(ROOT / "tests").glob("*.py"),
        *(ROOT / "tools").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "experiments").glob("*.py"),
    ]
    for path in programs:
        found = rules.unencoded(ast.parse(path.read_text(encoding="utf-8")))
        assert not found, f'{path.relative_to(ROOT)}: {found} need encoding="utf-8"'


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing, f"README.md links to {missing}; the index's links start in nbs/"


def test_exceptions_shrink():
    known = {lesson.name: lesson for lesson in LESSONS}
    assert len(rules.EXCEPTIONS) <= 5
    for name, most in rules.EXCEPTIONS.items():
        needed = rules.over(known[name])
        assert most == needed, f"{name}: its exceptions are {most}, it needs {needed}"


def test_no_public_name_twice():
    homes = {}
    for lesson in LESSONS:
        for name in lesson.public_names():
            homes.setdefault(name, []).append(lesson.module)
    twice = {name: found for name, found in homes.items() if len(found) > 1}
    assert not twice, f"the same public name in two modules: {twice}"


NAMED = re.compile(r"\b\d\d[a-z]?_[a-z]+(?:\.[a-z_]+)?\b")
NUMBERS = re.compile(r"\b[Ll]essons? `?(\d\d[a-z]?)\b(?!_)((?:(?:,| and| to| or|, and) \d\d[a-z]?\b(?!_))*)")


def missing_lessons(text: str) -> set:
    "Lessons that a text names, by name or by number, and that do not exist."
    names = {lesson.name for lesson in LESSONS}
    numbers = {lesson.number for lesson in LESSONS}
    found = {n.removesuffix(".ipynb").removesuffix(".py") for n in NAMED.findall(text)} - names
    for first, rest in NUMBERS.findall(text):
        found |= set(re.findall(r"\d\d[a-z]?", first + rest)) - numbers
    return found


def test_every_lesson_that_is_named_exists():
    texts = {lesson.name: "\n".join(c.source for c in lesson.cells) for lesson in LESSONS}
    texts |= {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in text_files()
        if path.suffix in (".md", ".yml", ".ini") or path.parent.name in ("benchmarks", "experiments")
    }
    wrong = {name: found for name, text in texts.items() if (found := missing_lessons(text))}
    assert not wrong, f"these lessons do not exist: {wrong}"


def test_missing_lessons_are_found():
    assert missing_lessons("see lessons 31 and 29, and `41_train.loops`") == {"29", "41_train.loops"}


HEADER = re.compile(r'lesson\(\\"([\w.]+)\\"(?:, (?:minutes=)?(\d+))?\)')


def test_the_index_lists_each_notebook_once():
    "Lessons with their minutes, engine rooms without."
    index = (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")
    listed = re.findall(r"\| \[([\w.]+)\]\(\1\.ipynb\) \|(?:[^|\n]+\| (\d+) \|)?", index)
    said = []
    for lesson in LESSONS:
        if lesson.number:
            found = HEADER.search(lesson.path.read_text(encoding="utf-8"))
            assert found and found[1] == lesson.name, f'{lesson.name}: no lesson("{lesson.name}")'
            assert bool(found[2]) != lesson.is_engine_room, f"{lesson.name}: only lessons have minutes"
            said.append(found.groups(default=""))
    assert sorted(listed) == said, f"notebooks say {said}, the index {listed}"


def test_the_ways_of_the_index_take_as_long_as_it_says():
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    texts = ["".join(cell["source"]) for cell in index["cells"]]
    minutes = {name: int(m) for name, m in re.findall(
        r"\| \[([\w.]+)\]\(\1\.ipynb\) \|[^|\n]+\| (\d+) \|", "\n".join(texts))}
    assert f"{sum(minutes.values()) / 60:.0f} hours in all" in "".join(texts)
    ways = next(text for text in texts if text.startswith("## Which way?"))
    rows = re.findall(r"^\| ([^|\n]+) \| (\[.+) \| ([\d.]+) \|$", ways, re.M)
    assert len(rows) >= 5
    for want, links, hours in rows:
        names = re.findall(r"\[(\w+)\]\((\1_[\w.]+)\.ipynb\)", links)
        total = sum(minutes[name] for _, name in names)
        assert len(names) == links.count("](") and f"{total / 60:.1f}" == hours, (want, total / 60)
