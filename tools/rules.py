"""The rules that a lesson keeps, each a small function that yields complaints.

`test_course_rules.py` applies them to the lessons; `test_rules.py` shows that each one catches a
lesson that breaks it.
"""

import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVES = re.compile(
    r"#\| (export|exports|hide|eval: false|code-fold: true|code-summary: \".+\"|echo: false"
    r"|default_exp [a-z_.]+)"
)
LOOKS_LIKE_DIRECTIVE = re.compile(r"\s*#\s*\|")
EXPORTS_NOTHING = {"index", "00_start", "89_museum", "99_capstone"}
CODE_LINES, EXPORTED_LINES, FUNCTION_LINES, WIDTH = 30, 25, 30, 100
PICTURES, ASSERTING_SHARE = 4, 0.2
ROAD = {"code lines": 450, "code cells": 60, "words": 2000, "KB": 120, "public names": 20}
ENGINE_ROOM = {"code lines": 700, "KB": 120, "public names": 20}
MINUTES = (10, 60)
OUTPUT_WIDTH = 76  # columns of what a cell prints: `print_wrapped` keeps to them
# Cells that print wider lines, each with its reason. It may only shrink.
WIDE_OUTPUTS = {
    "99_capstone c74a1226": "shows a program as an entry of the capstone stores it",
}
# Notebooks over a limit, each with its reason: {name: {what: most}}. At most five; it may only shrink.
EXCEPTIONS = {}
TEST_CALL = re.compile(r"test_\w+|check(_solution)?|assert_\w+")
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])(/(home|root|Users|tmp|work|workspace|mnt|private)/|[A-Z]:\\\w)"
)
TIMING = re.compile(
    r"\b\d+(\.\d+)? ?(ns|us|µs|ms|s|sec|secs|second|seconds|it/s|tokens/s)(?![\w'])"
)
NUMBERED = re.compile(r"\d\d[a-z]?_")
RULES = []


def rule(check):
    "Register a function (lesson) -> complaints."
    RULES.append(check)
    return check


@dataclass
class Cell:
    "One cell of a lesson."

    id: str
    kind: str  # "markdown" or "code"
    source: str
    metadata: dict = field(default_factory=dict)
    outputs: list = field(default_factory=list)

    @cached_property
    def directives(self) -> list:
        "The lines at the top that look like directives, without the leading `#| `."
        lines = []
        for line in self.source.splitlines():
            if not LOOKS_LIKE_DIRECTIVE.match(line):
                break
            lines.append(line)
        return [line[3:].strip() for line in lines]

    @property
    def code(self) -> list:
        "The lines that are neither directives nor empty."
        return [line for line in self.source.splitlines()[len(self.directives) :] if line.strip()]

    @cached_property
    def tree(self) -> ast.Module:
        "The parsed source; empty for markdown and for what is not Python."
        try:
            return ast.parse(self.source if self.kind == "code" else "")
        except SyntaxError:
            return ast.parse("")

    @property
    def exported(self) -> bool:
        return self.kind == "code" and bool({"export", "exports"} & set(self.directives))

    @property
    def skipped(self) -> bool:
        return "eval: false" in self.directives

    def nodes(self, *types) -> list:
        return [node for node in ast.walk(self.tree) if isinstance(node, types)]

    @property
    def tests(self) -> bool:
        "Does the cell assert something, and run?"
        calls = [node.func for node in self.nodes(ast.Call)]
        names = [getattr(f, "id", getattr(f, "attr", "")) for f in calls]
        asserts = self.nodes(ast.Assert) or any(TEST_CALL.fullmatch(name) for name in names)
        return self.kind == "code" and not self.skipped and bool(asserts)


def is_patch(node: ast.AST) -> bool:
    "Is this function a method that `patch` adds to a class?"
    decorators = getattr(node, "decorator_list", [])
    return any(getattr(getattr(d, "func", d), "id", "") == "patch" for d in decorators)


def is_new_name(node: ast.AST) -> bool:
    "Does an assignment make this name? Not so for `a.b = ...` and `a[b] = ...`."
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


@dataclass
class Lesson:
    "A notebook, read as text."

    path: Path

    @cached_property
    def cells(self) -> list:
        made = []
        for c in json.loads(self.path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(c["source"])  # a list of lines, or one text
            outputs = c.get("outputs", [])
            made.append(Cell(c.get("id", ""), c["cell_type"], source, c["metadata"], outputs))
        return made

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> str:
        "Its place in the dependency order, for example `41` or `40b`; empty for the index."
        return self.name.split("_")[0] if NUMBERED.match(self.name) else ""

    @property
    def is_engine_room(self) -> bool:
        "Machinery that a learner may skip: its number ends in a letter."
        return self.number[-1:].isalpha()

    @property
    def module(self) -> str:
        "The module it is exported to, for example `model.attention`; empty if there is none."
        found = [d[12:] for c in self.cells for d in c.directives if d.startswith("default_exp ")]
        return found[0] if found else ""

    @property
    def code_cells(self) -> list:
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def exported(self) -> list:
        return [cell for cell in self.cells if cell.exported]

    def definitions(self) -> list:
        "The functions and classes that it exports; methods that `patch` adds are not among them."
        kinds = (ast.FunctionDef, ast.ClassDef)
        nodes = [node for cell in self.exported for node in cell.tree.body]
        return [node for node in nodes if isinstance(node, kinds) and not is_patch(node)]

    def public(self) -> list:
        "Its functions and classes whose names do not start with an underscore."
        return [node for node in self.definitions() if not node.name.startswith("_")]

    def public_names(self) -> list:
        "What `__all__` holds: functions, classes and constants."
        names = [node.name for node in self.definitions()]
        for cell in self.exported:
            for node in cell.tree.body:
                if isinstance(node, (ast.Assign, ast.AnnAssign)):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names += [n.id for t in targets for n in ast.walk(t) if is_new_name(n)]
        return sorted({name for name in names if not name.startswith("_")})

    def sizes(self) -> dict:
        "What the limits count."
        text = [cell.source for cell in self.cells if cell.kind == "markdown"]
        return {
            "code lines": sum(
                1
                for cell in self.code_cells
                for line in cell.source.splitlines()
                if line.strip() and not LOOKS_LIKE_DIRECTIVE.match(line)
            ),
            "code cells": len(self.code_cells),
            "words": sum(len(t.split()) for t in text),
            "KB": round(self.path.stat().st_size / 1024),
            "public names": len(self.public_names()),
        }


def lessons(folder: Path = ROOT / "nbs") -> list:
    "Every notebook of a folder."
    return [Lesson(path) for path in sorted(folder.glob("*.ipynb"))]


def modules(every: list) -> dict:
    "Module name -> number of the lesson that exports it."
    return {lesson.module: lesson.number for lesson in every if lesson.module}


# --- How a lesson opens -------------------------------------------------------------------------


@rule
def opens_with_title_and_sentence(lesson):
    first = lesson.cells[0]
    if first.kind != "markdown" or not re.fullmatch(r"# .+\n\n> .+", first.source):
        yield "the first cell must be markdown: '# Title', an empty line, '> one sentence'"


@rule
def is_named_after_its_module(lesson):
    if lesson.name in EXPORTS_NOTHING or not lesson.module:
        if lesson.exported:
            yield f"{lesson.name} must not export anything"
        return
    found = [d for c in lesson.cells for d in c.directives if d.startswith("default_exp")]
    expected = f"default_exp {lesson.name.split('_', 1)[-1]}"
    if not re.fullmatch(r"\d\d[a-z]?_[a-z_.]+", lesson.name):
        yield "the file must be named like 31_model.attention.ipynb"
    elif found != [expected]:
        yield f"expected exactly one '#| {expected}', found {found}"
    elif lesson.cells[1].directives != [expected]:
        yield f"'#| {expected}' must be the second cell"


@rule
def header_names_the_lesson(lesson):
    calls = [
        node
        for cell in lesson.code_cells
        for node in cell.nodes(ast.Call)
        if getattr(node.func, "id", "") == "lesson"
    ]
    wrong = [ast.unparse(call) for call in calls if ast.unparse(call.args[0]) != repr(lesson.name)]
    if wrong:
        yield f"the header must name this lesson, {lesson.name!r}: {wrong}"


@rule
def engine_room_says_when_to_come_back(lesson):
    if lesson.is_engine_room:
        text = lesson.cells[2].source if len(lesson.cells) > 2 else ""
        if not re.match(r"\*\*Engine room\.\*\* You may skip this notebook; come back when", text):
            yield "the third cell must begin '**Engine room.** You may skip this notebook; come back when'"


@rule
def minutes_are_one_sitting(lesson):
    calls = [n for c in lesson.code_cells for n in c.nodes(ast.Call)]
    calls = [n for n in calls if getattr(n.func, "id", "") == "lesson" and not lesson.is_engine_room]
    for call in calls:
        given = [*call.args[1:], *(k.value for k in call.keywords)]
        minutes = given[0].value if given and isinstance(given[0], ast.Constant) else 0
        if not MINUTES[0] <= minutes <= MINUTES[1]:
            yield f"{minutes} minutes; a lesson takes {MINUTES[0]} to {MINUTES[1]}"


EXERCISE = re.compile(r"\*\*\d\. [^*]+\*\* \(\d+ minutes, (easy|medium|hard)\)")


@rule
def ends_like_every_lesson(lesson):
    heads = [c.source.splitlines()[0] for c in lesson.cells if c.kind == "markdown" and c.source]
    if lesson.number and not lesson.is_engine_room and "## What you have now" not in heads:
        yield "a lesson ends with '## What you have now'"
    for head in heads:
        if re.match(r"\*\*\d+\.", head) and not EXERCISE.match(head):
            yield f"an exercise is headed '**1. Title.** (5 minutes, easy) ...': {head[:50]!r}"


@rule
def statements_do_something(lesson):
    for cell in lesson.code_cells:
        for node in cell.nodes(ast.Expr):
            if isinstance(node.value, ast.IfExp) and not cell.outputs:
                yield f"cell {cell.id}: `x if y else z` as a statement: write `if`"


# --- Directives and imports ---------------------------------------------------------------------


@rule
def directives_are_known_and_first(lesson):
    for cell in lesson.code_cells:
        for number, line in enumerate(cell.source.splitlines()):
            if not LOOKS_LIKE_DIRECTIVE.match(line):
                continue
            if number >= len(cell.directives):
                yield f"cell {cell.id}: nbdev ignores {line!r}: it stands below code"
            elif not DIRECTIVES.fullmatch(line):
                yield f"cell {cell.id}: unknown directive {line!r}"


@rule
def imports_stand_alone(lesson):
    imports, definitions = (ast.Import, ast.ImportFrom), (ast.FunctionDef, ast.ClassDef)
    for cell in lesson.code_cells:
        if cell.skipped or not cell.nodes(*imports):
            continue
        top = [isinstance(node, imports) for node in cell.tree.body]
        only_definitions = all(isinstance(node, definitions) for node in cell.tree.body)
        if any(top) and not all(top):
            yield f"cell {cell.id}: keep imports in a cell of their own: the site runs it"
        elif not any(top) and not cell.exported and not only_definitions:
            yield f"cell {cell.id}: it imports in a function, so the site runs it: only define here"


def imported_modules(cell: Cell, known: dict) -> list:
    "Modules of this course that a cell imports, for example `model.attention`, at any depth."
    found = []
    for node in cell.nodes(ast.Import):
        found += [alias.name for alias in node.names]
    for node in cell.nodes(ast.ImportFrom):
        base = node.module or ""
        inside = [f"{base}.{alias.name}" for alias in node.names]
        is_module = [
            base == "llm_course" or name.removeprefix("llm_course.") in known for name in inside
        ]
        found += [name if yes else base for name, yes in zip(inside, is_module)]
    return [name.removeprefix("llm_course.") for name in found if name.startswith("llm_course.")]


def exports_import_lower_numbers(lesson, known):
    "Needs the other lessons, so it is not in RULES: `known` maps module -> number."
    layers = {"data", "tokens", "model"}
    for cell in lesson.exported:
        for name in imported_modules(cell, known):
            package, own = name.split(".")[0], lesson.module.split(".")[0]
            if name.startswith("__"):
                continue
            if name not in known:
                yield f"cell {cell.id}: imports llm_course.{name}, which no lesson exports"
            elif known[name] >= lesson.number:
                yield f"cell {cell.id}: imports {name}, {known[name]}: not a lower number"
            elif package != own and {package, own} <= layers:
                yield f"cell {cell.id}: {own} must not import {package}: a lesson may"


@rule
def imports_no_private_names(lesson):
    for cell in lesson.exported:
        for node in cell.nodes(ast.ImportFrom):
            private = [a.name for a in node.names if a.name.startswith("_")]
            if private and (node.module or "").startswith("llm_course"):
                yield f"cell {cell.id}: {private} of {node.module} are private"


# --- Sizes --------------------------------------------------------------------------------------


@rule
def cells_are_short(lesson):
    for cell in lesson.code_cells:
        lines, has_class = len(cell.code), bool(cell.nodes(ast.ClassDef))
        most = EXPORTED_LINES if cell.exported and not has_class else CODE_LINES
        if lines > most:
            yield f"cell {cell.id}: {lines} lines, at most {most}"


@rule
def functions_are_short(lesson):
    for cell in lesson.code_cells:
        for node in cell.nodes(ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"cell {cell.id}: {node.name} has {lines} lines, at most {FUNCTION_LINES}"


@rule
def lines_are_narrow(lesson):
    for cell in lesson.code_cells:
        for line in cell.source.splitlines():
            if len(line) > WIDTH:
                yield f"cell {cell.id}: {len(line)} columns, at most {WIDTH}: {line.strip()[:40]}"


def over(lesson) -> dict:
    "What of a notebook is over its limit, whatever the exceptions say."
    limits = ENGINE_ROOM if lesson.is_engine_room else ROAD if lesson.number else {"KB": 120}
    return {what: n for what, n in lesson.sizes().items() if n > limits.get(what, n)}


@rule
def fits_its_kind(lesson):
    for what, n in over(lesson).items():
        if n > EXCEPTIONS.get(lesson.name, {}).get(what, 0):
            yield f"{n} {what}: move machinery to an engine room, or split off the second idea"


@rule
def pictures_are_few(lesson):
    found = sum(
        len(re.findall(r"image/(?:png|jpeg)\"|data:image/", json.dumps(cell.outputs)))
        for cell in lesson.cells
    )
    if found > PICTURES:
        yield f"{found} stored pictures, at most {PICTURES}"


@rule
def ids_are_there_and_unique(lesson):
    ids = [cell.id for cell in lesson.cells]
    for bad in sorted(
        {i for i in ids if not re.fullmatch(r"[0-9a-zA-Z_-]{4,64}", i) or ids.count(i) > 1}
    ):
        yield f"cell id {bad!r} is missing, malformed or there twice"


# --- Documentation ------------------------------------------------------------------------------


def commented_lines(source: str) -> set:
    "Numbers of the lines that carry a comment."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def parameters(node: ast.AST) -> list:
    "(name, line) of what a caller passes: a function's parameters, or those of a class."
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if inits:
            return parameters(inits[0])
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        dataclass_ = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
        return [(f.target.id, f.lineno) for f in fields] if dataclass_ else []
    a = node.args
    every = a.posonlyargs + a.args + [a.vararg] + a.kwonlyargs + [a.kwarg]
    return [(p.arg, p.lineno) for p in every if p and p.arg not in ("self", "cls")]


@rule
def public_names_are_documented(lesson):
    for cell in lesson.exported:
        comments = commented_lines(cell.source)
        for node in cell.tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            documented = [node] + [
                n
                for n in node.body
                if isinstance(n, ast.FunctionDef)
                and not n.name.startswith("_")
                and isinstance(node, ast.ClassDef)
            ]
            for part in documented:
                if len((ast.get_docstring(part) or "").splitlines()) != 1:
                    yield f"cell {cell.id}: {part.name} needs a docstring of one line"
            lines = [line for _, line in parameters(node)]
            for name, line in parameters(node):
                if line not in comments or lines.count(line) > 1:
                    yield f"cell {cell.id}: {node.name}: {name!r} needs a line with a comment"


@rule
def public_names_are_tested(lesson):
    used = set()
    for cell in lesson.code_cells:
        if cell.tests:
            used |= {node.id for node in cell.nodes(ast.Name)}
            used |= {node.attr for node in cell.nodes(ast.Attribute)}
    for node in lesson.public():
        if node.name not in used:
            yield f"{node.name} is exported but no cell with an assert uses it"


@rule
def a_fifth_of_the_cells_test(lesson):
    cells = [cell for cell in lesson.code_cells if cell.code]
    tests = sum(cell.tests for cell in cells)
    if lesson.name not in EXPORTS_NOTHING and cells and tests < ASSERTING_SHARE * len(cells):
        yield f"{tests} of {len(cells)} code cells assert something; a fifth is the least"


# --- Outputs and text ---------------------------------------------------------------------------


def output_texts(cell: Cell) -> list:
    "What a reader sees as text, pictures left out."
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text", ""))
        texts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    texts = [t if isinstance(t, str) else "".join(t) for t in texts]
    return [re.sub(r"data:image/[^\"]*", "", text) for text in texts]


def printed_lines(cell: Cell) -> list:
    "The lines that a cell prints; not the words that stand for a picture."
    texts = []
    for output in cell.outputs:
        data = output.get("data", {})
        texts.append(output.get("text", ""))
        texts += data.values() if set(data) == {"text/plain"} else []
    texts = [text if isinstance(text, str) else "".join(text) for text in texts]
    return [line for text in texts for line in text.splitlines()]


@rule
def printed_lines_are_narrow(lesson):
    for cell in lesson.code_cells:
        wide = [line for line in printed_lines(cell) if len(line) > OUTPUT_WIDTH]
        if wide and f"{lesson.name} {cell.id}" not in WIDE_OUTPUTS:
            found = f"prints {len(wide)} lines of more than {OUTPUT_WIDTH} columns"
            yield f"cell {cell.id}: {found}; use print_wrapped: {wide[0][:40]!r}"


@rule
def outputs_are_steady(lesson):
    for cell in lesson.code_cells:
        stored = json.dumps(cell.outputs)
        if "widget-view+json" in stored:
            yield f"cell {cell.id}: stores a widget, which only a running notebook can show"
        if '"stderr"' in stored or '"error"' in stored:
            yield f"cell {cell.id}: stores an error or a warning"
        for text in output_texts(cell):
            for kind, pattern in (("path", MACHINE_PATH), ("timing", TIMING)):
                if found := pattern.search(text):
                    yield f"cell {cell.id}: the output holds a {kind}: {found[0]!r}"


@rule
def names_no_machine(lesson):
    for cell in lesson.cells:
        if found := MACHINE_PATH.search(cell.source):
            yield f"cell {cell.id}: {found[0]!r} is a path of one machine; use pathlib and tempfile"


OPENS_BYTES = {"webbrowser", "os", "socket", "zipfile", "Image", "tarfile", "request", "urllib"}


def forgets_encoding(call: ast.Call) -> bool:
    "Does this call open a text file without saying its encoding?"
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    methods = {"open", "read_text", "write_text"} if owner else {"open"}
    if name not in methods or owner in OPENS_BYTES:
        return False
    mode = " ".join(ast.unparse(a) for a in call.args[:2]) + "".join(
        ast.unparse(k.value) for k in call.keywords if k.arg == "mode"
    )
    binary = name == "open" and re.search(r"'[rwxa+]*b[rwxa+]*'", mode)
    return not binary and not any(k.arg == "encoding" for k in call.keywords)


def unencoded(tree: ast.AST) -> list:
    "The calls in a program that open a text file without saying its encoding."
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if forgets_encoding(call)]


@rule
def text_files_say_their_encoding(lesson):
    for cell in lesson.code_cells:
        for call in unencoded(cell.tree):
            yield f'cell {cell.id}: {call} needs encoding="utf-8"'
