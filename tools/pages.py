"""Make the pages of the site:  python tools/pages.py [--render]

1. nbdev prepares the notebooks in _proc (`proc_nbs`; `skip_procs` in settings.ini leaves all code
   on the page, and nothing is executed: the outputs are those stored in the notebooks).
2. Here each page gets what a page needs and a notebook has not: a box on top, hints in folds,
   links on lessons, papers, functions and terms. Pages of reference are written beside them.
3. `faults` reads all of them: options, links, anchors, alternative texts, third parties.
4. With --render, Quarto makes the site of them, in _docs; without it, pandoc makes a plain one.
"""

import argparse
import ast
import html
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import plain_site
import rules
from reference import Glossary, Library, papers

ROOT = Path(__file__).resolve().parent.parent
PROC, DOCS, SITE = ROOT / "_proc", ROOT / "_docs", ROOT / "site"
QUARTO = "1.7.34"  # what .github/workflows/docs.yml installs
ROW = re.compile(r"^\| \[([\w.]+)\]\(\1\.ipynb\) \| ([^|]+) \|(?: (\d+) \| (\w+) \|)?", re.M)
WHERE = re.compile(r"^\| \*\*([^*|]+)\*\* \|", re.M)


def settings() -> dict:
    "The keys of settings.ini."
    parser = ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


# --- What is known of each lesson ---------------------------------------------------------------


@dataclass(eq=False)
class Page:
    "A notebook of the course, and what its page says on top."

    lesson: rules.Lesson
    layer: str = ""
    after: str = ""  # what a learner can do afterwards
    level: str = ""

    @property
    def name(self) -> str:
        return self.lesson.name

    @property
    def url(self) -> str:
        return self.name.split("_", 1)[-1] + ".html" if self.lesson.number else self.name + ".html"

    @property
    def opening(self) -> list:
        return self.lesson.cells[0].source.split("\n")

    @property
    def title(self) -> str:
        return f"{self.lesson.number} {self.opening[0].removeprefix('# ')}".strip()

    @property
    def sentence(self) -> str:
        return self.opening[2].removeprefix("> ")

    @cached_property
    def minutes(self) -> int:
        "From the header; 0 for an engine room."
        calls = [node for cell in self.lesson.code_cells for node in cell.nodes(ast.Call)]
        for node in calls:
            if getattr(node.func, "id", "") == "lesson":
                given = [*node.args[1:], *(k.value for k in node.keywords)]
                return given[0].value if given else 0
        return 0


class Course:
    "All notebooks, in order, and how they hang together."

    def __init__(self, folder: Path = ROOT / "nbs"):
        self.pages = {lesson.name: Page(lesson) for lesson in rules.lessons(folder)}
        self._read_index()
        known = rules.modules([page.lesson for page in self.pages.values()])
        self.by_number = {p.lesson.number: p for p in self.pages.values() if p.lesson.number}
        self.by_module = {module: self.by_number[number] for module, number in known.items()}
        self._known = known

    def _read_index(self) -> None:
        "The tables of the index say the layer of a lesson, its level, and what it is good for."
        layer, layers = "", {}
        for cell in self.pages["index"].lesson.cells:
            for line in cell.source.splitlines():
                if found := WHERE.match(line):
                    layer = found[1]
                elif (found := ROW.match(line)) and found[1] in self.pages:
                    page = self.pages[found[1]]
                    page.after, page.level = found[2].strip(), found[4] or ""
                    if found[4]:
                        layers[found[1][:1] + found[1][1]] = layer
        for page in self.pages.values():
            if page.lesson.number:
                before = [key for key in layers if key <= page.lesson.number[:2]]
                page.layer = layers[max(before)] if before else "Start"

    @property
    def road(self) -> list:
        "The lessons, in order."
        return [p for p in self.by_number.values() if not p.lesson.is_engine_room]

    @property
    def engine_rooms(self) -> list:
        return [p for p in self.by_number.values() if p.lesson.is_engine_room]

    def neighbours(self, page: Page) -> tuple:
        "The lessons before and after one on the road; None where the road ends."
        road = self.road if page in self.road else self.engine_rooms
        if page not in road:
            return None, None
        i = road.index(page)
        return (road[i - 1] if i else None), (road[i + 1] if i + 1 < len(road) else None)

    @cache
    def imports(self, page: Page) -> set:
        "The names of the notebooks whose modules a notebook imports."
        cells = page.lesson.code_cells
        modules = {m for cell in cells for m in rules.imported_modules(cell, self._known)}
        found = {self.by_module[m].name for m in modules if m in self.by_module}
        return {name for name in found if name < page.name}

    def needs(self, page: Page, most: int = 4) -> list:
        "The lessons to do before this one: what it builds on, without what these build on."
        seen, queue = set(), list(self.imports(page))
        direct = [n for n in queue if not self.pages[n].lesson.is_engine_room]
        for name in queue:
            for deeper in self.imports(self.pages[name]) - seen:
                seen.add(deeper)
                queue.append(deeper)
        chosen = sorted(name for name in direct if name not in seen)[-most:]
        before = self.neighbours(page)[0]
        if not chosen and before is not None and page in self.road:
            chosen = [before.name]
        return [self.pages[name] for name in chosen]


# --- Links --------------------------------------------------------------------------------------

PARTS = re.compile(
    r"(?P<fence>^[ ]*(?P<tick>```+|~~~+).*?^[ ]*(?P=tick)[ ]*$)"
    r"|(?P<math>\$\$.*?\$\$|(?<![\\\w])\$(?=\S)[^$\n]*?(?<=\S)\$(?!\d))"
    r"|(?P<link>!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)\s]*\)(?:\{[^}]*\})?)"
    r"|(?P<tag><[^>\n]+>)|(?P<code>(?<!`)`[^`\n]+`(?!`))|(?P<heading>^#+ [^\n]*$)",
    re.S | re.M,
)
NAMED = re.compile(r"(?<![\w/.])\d\d[a-z]?_[a-z][a-z_.]*[a-z]")
NUMBERS = re.compile(
    r"\b(?:[Ll]essons?|[Ee]ngine rooms?) (\d\d[a-z]?)"
    r"(?:(?:,| to| and| or|, and|–) \d\d[a-z]?)*\b(?![_.]\w)"
)
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+/\d{7})")
TARGET = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")


class Linker:
    "Puts links into the text of one page: each lesson and paper, a term and a function once."

    def __init__(self, course: Course, library: Library, glossary: Glossary, page: Page | None):
        self.course, self.library, self.glossary, self.page = course, library, glossary, page
        self.seen = set()

    def __call__(self, text: str) -> str:
        "The text with links, or as it was where there is nothing to link."
        text, result, end = self.targets(text), [], 0
        for part in PARTS.finditer(text):
            result += [self.plain(text[end : part.start()]), self.part(part)]
            end = part.end()
        return "".join([*result, self.plain(text[end:])])

    def targets(self, text: str) -> str:
        "Links to notebooks become links to pages; to files of the repository, links to the host."

        def target(found) -> str:
            name = Path(found[1]).name
            if name.removesuffix(".ipynb") in self.course.pages:
                return self.course.pages[name.removesuffix(".ipynb")].url + (found[2] or "")
            if name == "CONTRIBUTING.md":
                return "contributing.html" + (found[2] or "")
            inside = (ROOT / "nbs" / found[1]).resolve()
            if inside.exists() and ROOT in inside.parents and inside.parent != ROOT / "nbs":
                return f"{settings()['git_url']}/blob/main/{inside.relative_to(ROOT).as_posix()}"
            return found[0]

        return TARGET.sub(target, text)

    def part(self, part) -> str:
        "What is no plain text stays as it is, but a name in code may be a link."
        if part["heading"]:
            return ARXIV.sub(paper_link, part[0])
        if not part["code"]:
            return part[0]
        name = part[0][1:-1]
        known = self.course.pages.get(name.removesuffix(".ipynb"))
        if known is not None and known is not self.page and known.lesson.number:
            return f"[{part[0]}]({known.url})"
        url = self.library.url(name.removesuffix("()"))
        if url and name not in self.seen:
            self.seen.add(name)
            return f"[{part[0]}]({url})"
        return part[0]

    def plain(self, text: str) -> str:
        "Lessons, papers and terms in plain words."
        text = NAMED.sub(self.named, NUMBERS.sub(self.numbers, ARXIV.sub(paper_link, text)))
        return self.glossary.link(text, self.seen, self.page.lesson.number if self.page else "")

    def named(self, found) -> str:
        page = self.course.pages.get(found[0])
        return f"[{found[0]}]({page.url})" if page and page is not self.page else found[0]

    def numbers(self, found) -> str:
        def one(number) -> str:
            page = self.course.by_number.get(number[0])
            return f"[{number[0]}]({page.url})" if page and page is not self.page else number[0]

        return re.sub(r"\d\d[a-z]?", one, found[0])


def paper_link(found) -> str:
    return f"[{found[0]}](https://arxiv.org/abs/{found[1]})"


# --- One page -----------------------------------------------------------------------------------

CHECKED = re.compile(r'#\| code-summary: "How exercise (\d+) is checked"')
LEFT = re.compile(r"^#\| exports?\n?", re.M)  # nbdev leaves it where nothing follows


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def take_hints(source: str) -> tuple:
    "The hints of an `Exercise` in a cell's source, and the source without them."
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [node for node in calls if getattr(node.func, "id", "") == "Exercise"]
    found = [keyword for node in calls for keyword in node.keywords if keyword.arg == "hints"]
    if not found:
        return [], source
    keyword, raw = found[0], source.encode()  # the columns of a syntax tree count bytes
    starts = [0, *(m.end() for m in re.finditer(b"\n", raw))]
    start = starts[keyword.lineno - 1] + keyword.col_offset
    end = starts[keyword.value.end_lineno - 1] + keyword.value.end_col_offset
    before, after = raw[:start], raw[end:]
    comma = re.match(rb"\s*,\s*(?!\s*\))", after)
    if comma:
        after = after[comma.end() :]
    else:  # it was the last argument: the comma before it goes, too
        before, after = re.sub(rb",\s*$", b"", before), re.sub(rb"^\s*,?\s*", b"", after)
    return ast.literal_eval(keyword.value), (before + after).decode()


def fold(summary: str, text: str) -> dict:
    "Text that is shown on demand."
    return markdown(f'<details class="hint"><summary>{summary}</summary>\n\n{text}\n\n</details>')


def still(outputs: list) -> list:
    "Stored outputs as plain HTML: where Jupyter's HTML is left, Quarto loads scripts from abroad."
    for output in outputs:
        data = output.get("data", {})
        text = data.pop("text/html", None)
        if text is not None:
            text = on_paper("".join(text).strip())
            output["data"] = {"text/markdown": f"``````{{=html}}\n{text}\n``````\n"}
    return outputs


def on_paper(text: str) -> str:
    "What brings its own colours is shown on white, also in the dark; olive is made dark enough."
    if "llm-player" in text or text.startswith(("<svg", "<img")) or "color:" not in text:
        return text
    return f'<div class="paper">{text.replace("#808000", "#666600")}</div>'


def box(course: Course, page: Page) -> str:
    "What stands on top of a lesson."
    keys = settings()
    host, at = f"{keys['user']}/{keys['repo']}", f"{page.name}.ipynb"
    kind = "Lesson" if page.minutes else "Engine room"
    facts = [f"**{kind} {page.lesson.number}**", page.layer]
    if page.minutes:
        facts += [f"about {page.minutes} minutes", page.level]
    runs = [
        f"[Colab](https://colab.research.google.com/github/{host}/blob/colab/{at})",
        f"[Binder](https://mybinder.org/v2/gh/{host}/main?labpath=nbs/{at})",
        f'[download](lessons/{at}){{download="{at}"}}',
    ]
    lines = [" · ".join(filter(None, facts)), f"**Run it:** {' · '.join(runs)}"]
    if needs := course.needs(page):
        lines += ["**Before it:** " + " · ".join(f"[{p.title}]({p.url})" for p in needs)]
    if page.after and page.minutes:
        lines += [f"**Afterwards you can** {page.after}."]
    before, after = course.neighbours(page)
    ways = [f"[← {before.title}]({before.url}){{.before}}"] if before else []
    ways += [f"[{after.title} →]({after.url}){{.after}}"] if after else []
    body = "\n\n".join(lines)
    if ways:
        body += "\n\n:::: {.ways}\n" + " ".join(ways) + "\n::::"
    return f'::::: {{.lesson-box data-lesson="{page.lesson.number}"}}\n{body}\n:::::'


def front_matter(page: Page) -> str:
    "Title with its number, one sentence, and a picture for those who share the link."
    facts = {"title": page.title, "description": page.sentence, "output-file": page.url}
    facts |= {"image": "card.png", "image-alt": "llm-course: build a language model"}
    return "---\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in facts.items()) + "---\n"


def in_order(cells: list) -> list:
    "An exercise's stub comes first, then hints, how it is checked, and a solution, each folded."
    result = []
    for cell in cells:
        source = cell["source"]
        if result and is_stub(source) and CHECKED.search(result[-1]["source"]):
            result.insert(next_fold(result), cell)
        else:
            result.append(cell)
    return result


def is_stub(source: str) -> bool:
    return "#| eval: false" in source and ".check(" in source


def next_fold(cells: list) -> int:
    "Where the folds of the exercise begin that is at the end of `cells`."
    i = len(cells) - 1
    while i and cells[i - 1]["source"].startswith('<details class="hint">'):
        i -= 1
    return i


def make_page(course: Course, page: Page, prepared: dict, linker: Linker) -> dict:
    "The notebook that Quarto gets: prepared by nbdev, and changed for readers."
    original = {cell.id: cell for cell in page.lesson.cells}
    cells = []
    for cell in prepared["cells"][1:]:
        cell["source"] = LEFT.sub("", "".join(cell["source"]))
        before = original.get(cell.get("id"))
        directives = before.directives if before and before.kind == "code" else []
        hidden = {"hide", f"default_exp {page.lesson.module}"} & set(directives)
        if hidden or not cell["source"].strip():
            continue
        if cell["cell_type"] == "markdown":
            cell["source"] = linker(cell["source"])
            if page.name == "index" and len(cells) == 2:
                cells.append(diagram())
        if cell["cell_type"] == "code":
            cell["outputs"] = still(cell["outputs"])
            if cell["source"].startswith("lesson("):
                continue
            if CHECKED.search(cell["source"]):
                hints, cell["source"] = take_hints(cell["source"])
                cells += [fold(f"Hint {i}", linker(text)) for i, text in enumerate(hints, 1)]
            if {"export", "exports"} & set(directives):
                cell["source"] = "#| classes: library\n" + cell["source"]
        cells.append(cell)
    top = [{"cell_type": "raw", "metadata": {}, "source": front_matter(page)}]
    if page.lesson.number:
        top.append(markdown(box(course, page)))
        if page.lesson.exported:
            url = f"api/{page.lesson.module}.html"
            text = f"[Reference: `llm_course.{page.lesson.module}`]({url})"
            cells.append(markdown(f"{text}, all its functions and classes with their parameters."))
    return {**prepared, "cells": with_ids(top + in_order(cells))}


def diagram() -> dict:
    "The road from text to an assistant, for the first page."
    from llm_course.drawing import draw_pipeline

    return markdown(f"```{{=html}}\n{draw_pipeline()._repr_html_()}\n```")


def with_ids(cells: list) -> list:
    for i, cell in enumerate(cells):
        cell.setdefault("id", f"page-{i}")
    return cells


# --- All pages ----------------------------------------------------------------------------------


def sidebar(course: Course, library: Library) -> dict:
    "The road by its layers, then the reference, then the engine rooms."

    def entry(page) -> dict:
        return {"text": page.title, "href": f"{page.name}.ipynb"}

    contents = [{"text": "llm-course", "href": "index.ipynb"}]
    for layer in dict.fromkeys(page.layer for page in course.road):
        inside = [entry(page) for page in course.road if page.layer == layer]
        contents.append({"section": layer, "contents": inside})
    extra = [entry(p) for p in course.pages.values() if not p.lesson.number and p.name != "index"]
    extra += [{"text": text, "href": file} for file, text in EXTRA.items() if file != "404.qmd"]
    contents.append({"section": "Look it up", "contents": extra})
    rooms = [entry(page) for page in course.engine_rooms]
    contents.append({"section": "Engine rooms", "contents": rooms})
    return {"website": {"sidebar": {"contents": contents}}}


EXTRA = {  # file in _proc -> its name in the sidebar
    "glossary.qmd": "Glossary",
    "notation.qmd": "Notation",
    "references.qmd": "References",
    "api/index.qmd": "Functions and classes",
    "troubles.qmd": "Troubles",
    "tested.qmd": "How lessons are tested",
    "contributing.qmd": "Contributing",
    "404.qmd": "Not found",
}


def extra_page(title: str, sentence: str, text: str, depth: int = 0) -> str:
    "A page that no notebook makes. The number is that of folders above it."
    facts = {"title": title, "description": sentence, "image": "../" * depth + "card.png"}
    facts |= {"image-alt": "llm-course: build a language model", "repo-actions": False}
    head = "".join(f"{k}: {json.dumps(v)}\n" for k, v in facts.items())
    return f"---\n{head}---\n\n{text.strip()}\n"


def own_text(name: str) -> tuple:
    "Title, sentence and text of a page in site/; it begins like a notebook."
    title, _, sentence, *rest = (SITE / name).read_text(encoding="utf-8").split("\n")
    return title.removeprefix("# "), sentence.removeprefix("> "), "\n".join(rest)


def write_extra_pages(course: Course, library: Library, glossary: Glossary, proc: Path) -> None:
    "Everything in the sidebar that is no notebook."

    def linked(text: str) -> str:
        return Linker(course, library, Glossary({}), None)(text)

    for name in ("notation", "troubles", "tested", "404"):
        title, sentence, text = own_text(f"{name}.md")
        write(proc / f"{name}.qmd", extra_page(title, sentence, linked(text)))
    title, sentence, _ = own_text("glossary.md")
    write(proc / "glossary.qmd", extra_page(title, sentence, linked(glossary.page())))
    title, sentence = "References", "Every paper that a lesson names, what it is for, and where."
    write(proc / "references.qmd", extra_page(title, sentence, linked(papers(course))))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n", 1)[1]
    sentence = "How a notebook becomes a module, a test and a page, and how to change one."
    write(proc / "contributing.qmd", extra_page("Contributing", sentence, linked(text)))
    for module in library.modules.values():
        home = course.by_module[module.name]
        text = ARXIV.sub(paper_link, module.page(home))
        text = extra_page(f"llm_course.{module.name}", home.sentence, text, depth=1)
        write(proc / "api" / f"{module.name}.qmd", text)
    names = ARXIV.sub(paper_link, library.index())
    title, sentence = "Functions and classes", "Every public name of the library, in one list."
    write(proc / "api" / "index.qmd", extra_page(title, sentence, names, depth=1))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def llms_txt(course: Course) -> str:
    "A list of all pages for programs that read the site (llmstxt.org)."
    keys = settings()
    base = keys["doc_host"] + keys["doc_baseurl"]
    lines = [f"# {keys['title']}", "", f"> {course.pages['index'].sentence}", ""]
    lines += ["Each page is also a notebook: /lessons/NAME.ipynb.", ""]
    for head, pages in (("Lessons", course.road), ("Optional", course.engine_rooms)):
        lines += [f"## {head}", ""]
        lines += [f"- [{p.title}]({base}/{p.url}): {p.sentence}" for p in pages] + [""]
    return "\n".join(lines)


def draw_card(path: Path) -> None:
    "The picture that is shown where somebody shares a link: a causal mask, and the title."
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="#1f4e79")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12), ylim=(0, 6.3))
    axes.axis("off")
    for row in range(8):
        for column in range(row + 1):
            share = 0.25 + 0.75 / (1 + row - column)
            axes.add_patch(
                matplotlib.patches.Rectangle(
                    (0.7 + 0.6 * column, 5.1 - 0.6 * row), 0.5, 0.5, color="white", alpha=share
                )
            )
    axes.text(6.2, 3.6, "llm-course", color="white", fontsize=58, weight="bold")
    axes.text(
        6.2,
        2.5,
        "Learn how large language models\nare built, by building one.",
        color="white",
        fontsize=24,
    )
    figure.savefig(path)


def prepare() -> list:
    "Write everything that Quarto reads into _proc; returns the faults found in it."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    import yaml

    proc_nbs(force=True, n_workers=2)
    refresh_quarto_yml()
    shutil.move(ROOT / "nbs" / "nbdev.yml", PROC / "nbdev.yml")
    course = Course()
    library = Library(ROOT / "llm_course", course, settings()["git_url"])
    glossary = Glossary.read(SITE / "glossary.md")
    for page in course.pages.values():
        path = PROC / f"{page.name}.ipynb"
        prepared = json.loads(path.read_text(encoding="utf-8"))
        made = make_page(course, page, prepared, Linker(course, library, glossary, page))
        write(path, json.dumps(made, ensure_ascii=False, indent=1) + "\n")
    write_extra_pages(course, library, glossary, PROC)
    write(
        PROC / "sidebar.yml",
        yaml.safe_dump(sidebar(course, library), sort_keys=False, allow_unicode=True),
    )
    write(PROC / "llms.txt", llms_txt(course))
    for name in ("site.css", "theme.scss", "scripts.html", "favicon.svg"):
        shutil.copy(SITE / name, PROC / name)
    draw_card(PROC / "card.png")
    return list(faults(PROC))


# --- What may be wrong --------------------------------------------------------------------------

LINK = re.compile(r"(?<!\\)(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]*)\)")
HREF = re.compile(r"<(?:a|img|script|link|iframe)\b[^>]*?(?:href|src)=[\"']([^\"']*)[\"']", re.I)
IMAGE = re.compile(r"<img\b[^>]*>", re.I)
FENCED = re.compile(r"^[ ]*(```+|~~~+).*?^[ ]*\1[ ]*$|(?<!`)`[^`\n]+`(?!`)", re.S | re.M)


def slug(heading: str) -> str:
    "The anchor that Pandoc gives a heading."
    text = re.sub(r"\]\([^)]*\)(\{[^}]*\})?|[\[\]`*]", "", heading)
    text = re.sub(r"[^\w\s.-]", "", text.lower()).strip()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text)) or "section"


def anchors(text: str) -> set:
    "What a link to a page may name behind #."
    text = re.sub(r"^[ ]*(```+).*?^[ ]*\1", "", text, flags=re.S | re.M)
    found, counts = set(re.findall(r"\{#([\w.-]+)", text)), {}
    for heading in re.findall(r"^#+ (.*?)(?: \{.*\})?$", text, flags=re.M):
        name = slug(heading)
        found.add(f"{name}-{counts[name]}" if name in counts else name)
        counts[name] = counts.get(name, 0) + 1
    return found | set(re.findall(r"id=[\"']([\w.-]+)", text))


def one_key_each(loader, node, deep=False):
    "A YAML mapping in which no key stands twice."
    import yaml

    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise yaml.YAMLError(f"twice in one mapping: {sorted(twice)}")
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


def strict_yaml(text: str):
    "What YAML says; a key that stands twice is an error, as it is for Quarto."
    import yaml

    class Strict(yaml.SafeLoader):
        pass

    Strict.add_constructor("tag:yaml.org,2002:map", one_key_each)
    return yaml.load(text, Strict)


def option_faults(source: str) -> list:
    "What is wrong with the lines `#| key: value` of a cell."
    lines = re.match(r"(?:#\|.*\n?)*", source)[0].splitlines()
    try:
        options = strict_yaml("\n".join(line[2:].strip() for line in lines)) or {}
    except Exception as error:
        return [f"options {lines}: {error}"]
    return [] if isinstance(options, dict) else [f"{lines} are no options"]


def texts(path: Path) -> list:
    "(where, text) of what readers see of a prepared page, code left out."
    if path.suffix == ".qmd":
        return [("", path.read_text(encoding="utf-8"))]
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            found.append((cell["id"], cell["source"]))
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/markdown", "")
            found.append((cell["id"], "".join(text)))
    return found


def link_faults(text: str, folder: str, known: dict) -> list:
    "Links of a page that lead nowhere; `known` maps each page to its anchors."
    plain = re.sub(r"(```+)\{=html\}\n(.*?)\n\1", r"\2", text, flags=re.S)
    plain = FENCED.sub(lambda found: "" if found[0].lstrip()[0] in "`~" else found[0], plain)
    wrong = []
    for mark, words, target in LINK.findall(plain):
        if mark and not words.strip():
            wrong.append(f"a picture without alternative text: {target}")
        wrong += target_faults(target, folder, known)
    for target in HREF.findall(plain):
        if target.startswith("data:image/"):
            continue
        wrong += target_faults(target, folder, known)
    wrong += [
        f"{tag[:60]} has no alt" for tag in IMAGE.findall(plain) if not re.search(r"alt=.\w", tag)
    ]
    return wrong


def target_faults(target: str, folder: str, known: dict) -> list:
    "Is there such a page, and such a place in it?"
    if re.match(r"[a-z]+:|lessons/|(?:\.\.?/)*$", target):
        return []
    file, _, anchor = target.partition("#")
    parts = [*Path(folder).parts, *Path(file).parts] if file else []
    while ".." in parts[1:]:
        i = parts.index("..", 1)
        del parts[i - 1 : i + 1]
    page = "/".join(parts)
    if file and page not in known:
        return [f"no page {target!r}"]
    if anchor and file and anchor not in known[page]:
        return [f"no place {target!r}"]
    return []


def third_parties(text: str) -> list:
    "What a reader's browser would fetch from somebody else."
    text = re.sub(r"<link\b[^>]*rel=.(?:canonical|alternate)[^>]*>", "", text)
    tags = re.findall(
        r"<(?:script|link|img|iframe|video|source)\b[^>]*(?:src|href)=.https?://[^>]*>", text
    )
    return tags + re.findall(r"@import[^;]*https?://[^;]*;", text)


def faults(proc: Path):
    "Everything that is wrong with the prepared pages, each in one line."
    pages = sorted([*proc.glob("*.ipynb"), *proc.glob("**/*.qmd")])
    known = {}
    for path in pages:
        every = texts(path)
        url = path.relative_to(proc).with_suffix(".html").as_posix()
        if path.suffix == ".ipynb":
            url = strict_yaml(every[0][1].strip("-\n"))["output-file"]
        known[url] = anchors("\n\n".join(text for _, text in every))
    for path in pages:
        folder = path.parent.relative_to(proc).as_posix().strip(".")
        for where, text in texts(path):
            for fault in link_faults(text, folder, known) + third_parties(text):
                yield f"{path.name} {where}: {fault}"
        if path.suffix == ".ipynb":
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                for fault in option_faults(cell["source"]) if cell["cell_type"] == "code" else []:
                    yield f"{path.name} {cell['id']}: {fault}"
    yield from project_faults(proc)


def files_named(node) -> list:
    "The files that Quarto's settings name, at any depth."
    if isinstance(node, dict):
        return [file for value in node.values() for file in files_named(value)]
    if isinstance(node, list):
        return [file for value in node for file in files_named(value)]
    return [node] if isinstance(node, str) and re.fullmatch(r"[\w./-]+\.(\w{2,5})", node) else []


def project_faults(proc: Path):
    "The settings parse, and what they name is there."
    for name in ("_quarto.yml", "nbdev.yml", "sidebar.yml"):
        try:
            said = strict_yaml((proc / name).read_text(encoding="utf-8"))
        except Exception as error:
            yield f"{name}: {error}"
            continue
        for file in files_named(said):
            if not (proc / file).exists():
                yield f"{name} names {file}, which is not there"


# --- The site -----------------------------------------------------------------------------------

INSTALL = """# Outside the course's own environment, for example on Colab, install it first.
import importlib.util
if importlib.util.find_spec("llm_course") is None:
    %pip install --quiet "llm-course=={version}"
"""


def write_lessons(folder: Path) -> None:
    "The notebooks for download, each with a cell that installs the course where it is missing."
    folder.mkdir(parents=True, exist_ok=True)
    source = INSTALL.format(version=settings()["version"])
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cell = {"cell_type": "code", "id": "install", "metadata": {}, "outputs": []}
        notebook["cells"].insert(
            1, {**cell, "execution_count": None, "source": source.splitlines(True)}
        )
        write(folder / path.name, json.dumps(notebook, ensure_ascii=False, indent=1) + "\n")


def write_try(path: Path) -> int:
    "The assistant that ships as one page, for visitors who have installed nothing; its bytes."
    from llm_course.pipeline.build import load_run
    from llm_course.pipeline.weights import share_run

    return share_run(path, load_run(None, "cpu", None))


def render() -> list:
    "Make the site, put the downloads beside it, and read what came out."
    said = []
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render", "--no-cache"], cwd=PROC, check=True)
        shutil.rmtree(DOCS, ignore_errors=True)
        shutil.move(PROC / DOCS.name, DOCS)
    else:
        said = plain_site.make_site(PROC, DOCS)
    write_lessons(DOCS / "lessons")
    write_try(DOCS / "try.html")
    archive = shutil.make_archive(str(PROC / "llm-course-site"), "zip", DOCS)
    shutil.move(archive, DOCS / "llm-course-site.zip")
    return [*said, *site_faults(DOCS)]


def site_faults(docs: Path):
    "Links that lead nowhere in the finished site, pictures without words, third parties."
    pages = {
        p.relative_to(docs).as_posix(): p.read_text(encoding="utf-8") for p in docs.rglob("*.html")
    }
    known = {name: set(re.findall(r"\bid=\"([^\"]+)", text)) for name, text in pages.items()}
    for name, text in pages.items():
        folder = Path(name).parent.as_posix().strip(".")
        for target in sorted(set(re.findall(r"<a\b[^>]*href=\"([^\"]+)\"", text))):
            file = html.unescape(target).removeprefix("./")
            if not re.search(r"\.(ipynb|zip|xml|txt)$|^[/?]", file):
                for fault in target_faults(file, folder, known):
                    yield f"{name}: {fault}"
        for tag in IMAGE.findall(text):
            if not re.search(r"alt=.[\w]", tag) and "navbar-logo" not in tag:
                yield f"{name}: a picture without words: {tag[:60]}"
        for fault in third_parties(text):
            yield f"{name}: fetches from a third party: {fault[:90]}"
    for path in docs.rglob("*.css"):
        for fault in third_parties(path.read_text(encoding="utf-8")):
            yield f"{path.name}: fetches from a third party: {fault[:90]}"


def not_done(quarto: bool, pandoc: bool) -> str:
    "What a machine without one of the two programs has not made; nothing with Quarto."
    if quarto:
        return ""
    install = f"Install Quarto {QUARTO} (https://quarto.org) and run make docs again."
    if pandoc:
        return (
            "NOT DONE, since Quarto is not on PATH: the theme, the sidebar and the search. The\n"
            f"pages are plain ones, made by pandoc alone. {install}\n"
        )
    return (
        "NOT DONE, since neither Quarto nor pypandoc_binary is here: the site itself, its\n"
        f"downloads and the assistant's page, try.html. {install} Options,\n"
        "links, anchors and pictures of the prepared pages were checked without it.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pages of the site.")
    parser.add_argument("--render", action="store_true", help="make the site with Quarto, too")
    options = parser.parse_args()
    wrong = prepare()
    print(f"{len(list(PROC.rglob('*.ipynb')))} notebooks and the reference are prepared in _proc")
    if options.render and not wrong:
        if shutil.which("quarto") or plain_site.pandoc():
            for fault in render():  # the site is there all the same: what is wrong in it is said
                print(fault)
            print(f"the site is in {DOCS.name}")
        print(not_done(bool(shutil.which("quarto")), bool(plain_site.pandoc())), end="")
    if wrong:
        sys.exit("\n".join([*wrong, f"{len(wrong)} faults in the pages"]))


if __name__ == "__main__":
    main()
