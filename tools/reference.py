"""What the site's pages of reference say: functions and classes, terms, papers.

All of it is read from sources: signatures and comments from the modules (which are not imported),
terms from site/glossary.md, papers from the lessons.
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

import rules

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+/\d{7})")


# --- Functions and classes ----------------------------------------------------------------------


def comments(source: str) -> dict:
    "Line number -> the comment on it."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [t for t in tokens if t.type == tokenize.COMMENT]
    return {t.start[0]: t.string.removeprefix("#").strip() for t in found}


def cell_text(text: str) -> str:
    "Text for a cell of a table."
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    return f"`{cell_text(text)}`" if text else ""


@dataclass
class Entry:
    "A function, a class or a method."

    node: ast.AST
    owner: str = ""

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.node.name}" if self.owner else self.node.name

    @property
    def sentence(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def maker(self):
        "Where the parameters stand: in a class, its `__init__`."
        if not isinstance(self.node, ast.ClassDef):
            return self.node
        inits = [n for n in self.node.body if getattr(n, "name", "") == "__init__"]
        return inits[0] if inits else None

    def signature(self) -> str:
        "How it is called, one parameter a line where that is long."
        made, name = self.maker, self.name
        if made is None:
            names = [n for n, _ in rules.parameters(self.node)]
            return f"{name}({', '.join(names)})" if names else name
        text = ast.unparse(made.args)
        text = re.sub(r"^(self|cls)(: [^,]*)?(, )?", "", text)
        returns = f" -> {ast.unparse(made.returns)}" if made.returns and made is self.node else ""
        short = f"{name}({text}){returns}"
        if len(short) <= 76:
            return short
        parts = split_arguments(made.args)
        return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"

    def table(self, notes: dict) -> str:
        "Its parameters, each with the comment beside it, and what it returns."
        rows = [
            (code(name), cell_text(notes.get(line, "")))
            for name, line in rules.parameters(self.node)
        ]
        made = self.maker
        if made is self.node and made is not None and made.returns:
            said = notes.get(made.returns.end_lineno, "")
            rows.append(("*returns*", cell_text(said)))
        rows = [row for row in rows if row[1]]
        if not rows:
            return ""
        return "| | |\n|---|---|\n" + "".join(f"| {a} | {b} |\n" for a, b in rows)


def split_arguments(args: ast.arguments) -> list:
    "The parameters as they are written, without `self`."
    defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults
    parts = []
    for arg, default in zip(args.args, defaults):
        parts.append(ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else ""))
    if args.vararg or args.kwonlyargs:
        parts.append("*" + (ast.unparse(args.vararg) if args.vararg else ""))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults):
        parts.append(ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else ""))
    if args.kwarg:
        parts.append("**" + ast.unparse(args.kwarg))
    return [part for part in parts if not re.match(r"(self|cls)\b", part)]


@dataclass
class Module:
    "A module of the library, read as text."

    name: str
    path: Path
    git_url: str
    entries: list = field(default_factory=list)  # in the order of the source
    notes: dict = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, path: Path, git_url: str):
        source = path.read_text(encoding="utf-8")
        module = cls(name, path, git_url, notes=comments(source))
        for node in ast.parse(source).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            owner = rules.is_patch(node) and ast.unparse(node.args.args[0].annotation)
            module.entries.append(Entry(node, owner or ""))
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    module.entries.append(Entry(inner, node.name))
        return module

    def page(self, home) -> str:
        "Each name with its signature, its sentence and its parameters, in the order of the source."
        parts = [f"Made by [{home.title}](../{home.url}), which explains and tests it."]
        for entry in self.entries:
            file = f"llm_course/{self.name.replace('.', '/')}.py"
            url = f"{self.git_url}/blob/main/{file}#L{entry.node.lineno}"
            parts += [f"## {entry.name} {{#{entry.name}}}", f"```python\n{entry.signature()}\n```"]
            parts += [
                f"{escaped(entry.sentence)} [source]({url})",
                escaped(entry.table(self.notes)),
            ]
        return "\n\n".join(part for part in parts if part)


def escaped(text: str) -> str:
    "Text that is no markdown: stars and dollars and angles are meant as they are."

    def plain(part: str) -> str:
        return re.sub(r"([*$<>_^~])", r"\\\1", part) if part != "*returns*" else part

    pieces = re.split(r"(`[^`\n]+`|\*returns\*)", text)
    return "".join(piece if i % 2 else plain(piece) for i, piece in enumerate(pieces))


class Library:
    "All modules of the package."

    def __init__(self, folder: Path, course, git_url: str):
        self.modules = {}
        for name, page in course.by_module.items():
            path = folder / (name.replace(".", "/") + ".py")
            path = path if path.exists() else folder / name.replace(".", "/") / "__init__.py"
            if path.exists() and page.lesson.exported:
                self.modules[name] = Module.read(name, path, git_url)
        self.home = {}
        for module in self.modules.values():
            for entry in module.entries:
                self.home.setdefault(entry.name, module.name)

    def url(self, name: str) -> str:
        "The place of a public name, seen from a lesson's page; empty if there is none."
        name = name.removeprefix("llm_course.")
        if name in self.modules:
            return f"api/{name}.html"
        return f"api/{self.home[name]}.html#{name}" if name in self.home else ""

    def index(self) -> str:
        "All functions and classes by name."
        rows = ["| name | what it does | module |", "|---|---|---|"]
        for name in sorted(self.home, key=str.lower):
            if "." not in name:
                module = self.modules[self.home[name]]
                entry = next(e for e in module.entries if e.name == name)
                said, page = escaped(cell_text(entry.sentence)), f"{module.name}.html"
                rows.append(f"| [`{name}`]({page}#{name}) | {said} | [{module.name}]({page}) |")
        return "\n".join(rows)


# --- Terms --------------------------------------------------------------------------------------


class Glossary:
    "The field's terms: in the file, `term, other form` on a line, then `: what it means`."

    def __init__(self, meanings: dict):
        self.meanings = meanings  # the first form of each -> (all forms, meaning)
        self.by_form = {f.lower(): (f, t) for t, (forms, _) in meanings.items() for f in forms}
        forms = sorted(self.by_form, key=len, reverse=True)
        self.pattern = re.compile(
            r"(?<![\w/.#\[-])(" + "|".join(map(re.escape, forms)) + r")(s?)(?![\w\]-])(?!\.\w)",
            re.I,
        )

    @classmethod
    def read(cls, path: Path):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"^([^\n:#>].*)\n: (.+)$", text, flags=re.M)
        meanings = {}
        for names, meaning in found:
            forms = [name.strip() for name in names.split(",")]
            meanings[forms[0]] = (forms, meaning)
        return cls(meanings)

    def link(self, text: str, seen: set, number: str = "") -> str:
        "Link a term where a page first names it, except on that of the lesson that explains it."
        if not self.meanings:
            return text

        def link(found) -> str:
            form, term = self.by_form[found[1].lower()]
            if form[1:] != form[1:].lower() and found[1] != form:
                return found[0]  # "zero" is not ZeRO
            meaning = plain_words(self.meanings[term][1]).replace('"', "'")
            own = number and number in re.findall(r"\b\d\d[a-z]?\b", meaning)
            if term in seen or own or found[0] == "transformers":  # that is a library
                return found[0]
            seen.add(term)
            return f'[{found[0]}](glossary.html#{anchor(term)}){{.term data-meaning="{meaning}"}}'

        return self.pattern.sub(link, text)

    def page(self) -> str:
        parts = []
        for term in sorted(self.meanings, key=str.lower):
            forms, meaning = self.meanings[term]
            also = f" ({', '.join(forms[1:])})" if forms[1:] else ""
            parts.append(f"[**{term}**{also}]{{#{anchor(term)}}}\n: {meaning}")
        return "\n\n".join(parts)


def anchor(term: str) -> str:
    return "term-" + re.sub(r"[^a-z0-9]+", "-", term.lower()).strip("-")


def plain_words(text: str) -> str:
    "Markdown without its marks."
    return re.sub(r"[`*]|\]\([^)]*\)|\[", "", text)


# --- Papers -------------------------------------------------------------------------------------


def mentions(course) -> dict:
    "arXiv number -> [(lesson's page, the words around it)]."
    found = {}
    for page in course.by_number.values():
        for cell in page.lesson.cells:
            if cell.kind != "markdown":
                for number in ARXIV.findall(cell.source):
                    found.setdefault(number, []).append((page, ""))
                continue
            for line in cell.source.splitlines():
                for piece in re.split(r"; |(?<! al)(?<!\b[A-Z])\. (?=[A-Z*])", line):
                    for number in ARXIV.findall(piece):
                        text = re.sub(r"^(?:- )?\*\*[^*]+\*\* ?|^- ", "", piece)
                        found.setdefault(number, []).append((page, text))
    return found


def papers(course) -> str:
    "A line for each paper, the newest first: what a lesson says of it, and which lessons name it."
    lines = []
    for number, where in sorted(mentions(course).items(), reverse=True):
        said = max(
            (text for _, text in where), key=lambda t: (bool(re.search(r"\(\d{4}", t)), len(t))
        )
        pages = {page.name: page for page, _ in where}
        names = " · ".join(f"[{page.title}]({page.url})" for page in pages.values())
        paper = f"[arXiv:{number}](https://arxiv.org/abs/{number})"
        lines.append(f"- {paper}: {words_of(said, number)} ({names})")
    return "\n".join(lines)


def words_of(text: str, number: str) -> str:
    "What is said of a paper, without its number."
    text = re.sub(r"(?:, |(?<=\())?arXiv:" + re.escape(number) + r"(?:, (?=\d{4}))?", "", text)
    text = re.sub(r"\s+", " ", re.sub(r" ?\(\)", "", text)).strip(" ,;:.")
    return text or "named in the code"
