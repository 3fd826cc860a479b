"""The pages of the site, as far as they are made without Quarto (tools/pages.py)."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

import pages
from reference import Glossary

ROOT = Path(__file__).resolve().parent.parent
COURSE = pages.Course()


@pytest.fixture(scope="module")
def prepared():
    "The folder that Quarto gets; making it changes nothing else."
    kept = [ROOT / "README.md", ROOT / "nbs" / "index.ipynb", ROOT / "settings.ini"]
    before = [path.read_bytes() for path in kept]
    found = pages.prepare()
    assert [path.read_bytes() for path in kept] == before
    assert not found, "\n".join(["faults in the pages: see make docs", *found])
    return pages.PROC


def cells(prepared: Path, name: str) -> list:
    return json.loads((prepared / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def readable(prepared: Path) -> dict:
    "Name -> the text of a page, code left out."
    found = sorted([*prepared.glob("*.ipynb"), *prepared.glob("**/*.qmd")])
    return {path.name: "\n\n".join(text for _, text in pages.texts(path)) for path in found}


def test_every_notebook_has_its_page(prepared):
    assert {p.name for p in prepared.glob("*.ipynb")} == {
        p.name for p in (ROOT / "nbs").glob("*.ipynb")
    }
    said = pages.strict_yaml((prepared / "sidebar.yml").read_text(encoding="utf-8"))
    listed = [f for f in pages.files_named(said) if f.endswith(".ipynb")]
    assert sorted(listed) == sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb"))
    road = [page.name + ".ipynb" for page in COURSE.road]
    assert [name for name in listed if name in road] == road


@pytest.mark.parametrize("page", COURSE.road, ids=lambda page: page.name)
def test_a_page_shows_the_code(prepared, page):
    shown = "\n".join(c["source"] for c in cells(prepared, page.name) if c["cell_type"] == "code")
    for cell in page.lesson.exported:
        code = "\n".join(cell.source.splitlines()[len(cell.directives) :])
        assert code in shown, f"cell {cell.id} of {page.name} is not on its page"


@pytest.mark.parametrize("page", COURSE.road, ids=lambda page: page.name)
def test_hints_stand_apart_from_how_an_exercise_is_checked(prepared, page):
    sources = [c["source"] for c in cells(prepared, page.name)]
    for i, source in enumerate(sources):
        if found := pages.CHECKED.search(source):
            ast.parse(source)
            assert "hints=" not in source, f"{page.name}, exercise {found[1]}"
            hints = [
                s for s in sources[max(0, i - 4) : i] if s.startswith('<details class="hint">')
            ]
            assert hints, f"{page.name}, exercise {found[1]} shows no hint"
            assert pages.is_stub(sources[i - len(hints) - 1]), f"{page.name}: the stub comes first"


def test_hints_are_taken_wherever_they_stand():
    for source, rest in [
        ("Exercise('é', f, hints=['one', 'two'], cases=[1])", "Exercise('é', f, cases=[1])"),
        (
            "Exercise('a', f, cases=[1],\n    hints=['one',\n           'two'])",
            "Exercise('a', f, cases=[1])",
        ),
        (
            "x = 1\nExercise('a',\n    hints=['one', 'two'],\n    n=2)",
            "x = 1\nExercise('a',\n    n=2)",
        ),
    ]:
        assert pages.take_hints(source) == (["one", "two"], rest)
    assert pages.take_hints("Exercise('a', f)") == ([], "Exercise('a', f)")


def unlinked(text: str) -> str:
    "The text of a page without its links and without code that is more than a name."

    def keep(part) -> str:
        if part["code"]:
            return part[0] if part[0].strip("`") in COURSE.pages else ""
        return "" if part["fence"] or part["link"] or part["tag"] or part["heading"] else part[0]

    return pages.LINK.sub("", pages.PARTS.sub(keep, text))


def test_lessons_and_papers_are_links(prepared):
    for name, text in readable(prepared).items():
        plain = unlinked(text)
        assert not pages.ARXIV.search(plain), f"{name}: a paper without link"
        found = {lesson for lesson in pages.NAMED.findall(plain) if lesson in COURSE.pages}
        assert found <= {name.removesuffix(".ipynb")}, f"{name}: {found} without link"


def test_a_lesson_says_where_it_stands(prepared):
    first = cells(prepared, "31_model.attention")[:2]
    facts = pages.strict_yaml(first[0]["source"].strip("-\n"))
    assert facts["title"] == "31 Attention" and facts["output-file"] == "model.attention.html"
    for words in (
        "Lesson 31",
        "60 minutes",
        "medium",
        "Before it",
        "Afterwards you can",
        "Colab",
        "32 ",
    ):
        assert words in first[1]["source"]


def test_needs_come_before():
    for page in COURSE.road[1:]:
        needs = COURSE.needs(page)
        assert needs and all(need.name < page.name for need in needs)


def test_functions_are_listed_in_the_order_of_the_source(prepared):
    text = (prepared / "api" / "model.attention.qmd").read_text(encoding="utf-8")
    assert 0 < text.index("## split_heads") < text.index("## join_heads")
    assert "Pieces" not in text and "| `n_heads` | H, a divisor of C |" in text
    public = {
        name
        for page in COURSE.by_number.values()
        for name in map(lambda n: n.name, page.lesson.public())
    }
    index = (prepared / "api" / "index.qmd").read_text(encoding="utf-8")
    missing = [name for name in sorted(public) if f"[`{name}`]" not in index]
    assert not missing


def test_messages_of_the_troubles_page_exist():
    said = re.findall(
        r"^### `(.+)`$", (ROOT / "site" / "troubles.md").read_text(encoding="utf-8"), flags=re.M
    )
    foreign = {
        "No module named venv",
        "ModuleNotFoundError: No module named 'llm_course'",
        "NameError: name",
    }
    foreign |= {"CERTIFICATE_VERIFY_FAILED", "error: externally-managed-environment"}
    foreign |= {"Error displaying widget", "The kernel appears to have died", "CUDA out of memory"}
    sources = [
        *ROOT.glob("llm_course/**/*.py"),
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("tests/*.py"),
        ROOT / "Makefile",
    ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources if path != Path(__file__))
    text = re.sub(r'"\s*\\?\s*f?"', "", text)  # a message that goes on in the next line
    assert foreign < set(said)
    lost = [message for message in said if message not in foreign and message not in text]
    assert not lost, f"no code says {lost} any more"


def test_what_is_made_agrees_with_what_is_installed():
    assert f"version: {pages.QUARTO}" in (ROOT / ".github" / "workflows" / "docs.yml").read_text(
        encoding="utf-8"
    )


# --- Each check catches what it is for ----------------------------------------------------------


def test_options_that_quarto_refuses_are_found():
    assert pages.option_faults('#| code-fold: true\n#| code-summary: "A: b"\nx = 1') == []
    assert "twice" in pages.option_faults("#| code-fold: true\n#| code-fold: show\nx = 1")[0]
    assert pages.option_faults("#| code-summary: a: b\nx = 1")
    assert pages.option_faults("#| export\nx = 1")


def test_dead_links_and_pictures_without_words_are_found():
    known = {"a.html": {"here"}, "api/b.html": {"f"}}
    good = "[a](a.html#here) ![a cat](https://x/y.png) `[not](a link)` [b](api/b.html#f)"
    good += "<img alt='x' src='data:image/png;'>"
    assert pages.link_faults(good, "", known) == []
    assert pages.link_faults("[a](../a.html#here)", "api", known) == []
    for bad in (
        "[a](c.html)",
        "[a](a.html#there)",
        "![](a.html)",
        "<img src='data:image/png;base64,x'>",
        "[a](api/b.html#g)",
    ):
        assert len(pages.link_faults(bad, "", known)) == 1, bad
    assert pages.third_parties(
        '<script src="https://cdn.example/x.js">'
    ) and not pages.third_parties("<a href='https://x'>")


def test_headings_have_the_anchors_that_pandoc_gives():
    assert pages.anchors("# What you have now\n\n## `a_b` and *c*, 2.5\n\n## A\n\n## A") == {
        "what-you-have-now", "a_b-and-c-2.5", "a", "a-1",
    }  # fmt: skip


def test_terms_are_linked_once_and_not_in_code_or_formulas():
    glossary = Glossary(
        {"token": (["token", "tokens"], "A piece. Lesson 21."), "key": (["key"], "K.")}
    )
    link = pages.Linker(COURSE, type("None_", (), {"url": lambda self, name: ""})(), glossary, None)
    made = link("`token` $token$ [token](x) Two tokens, a token.\n\n```\ntoken\n```\n")
    assert made.count("glossary.html") == 1 and "Two [tokens](glossary.html#term-token)" in made
    assert "[51_generate.cache](generate.cache.html)" in link("see 51_generate.cache.")
    assert link("lessons 72 to 76").count(".html") == 2


@pytest.mark.skipif(not shutil.which("quarto"), reason="Quarto is not installed")
def test_the_site_is_whole(prepared):
    assert pages.render() == []


def contrast(one: str, other: str) -> float:
    "Of two colours like #1f4e79, as the guidelines for accessible pages define it."

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_their_ground():
    assert round(contrast("#000000", "#ffffff"), 6) == 21
    css = (ROOT / "site" / "site.css").read_text(encoding="utf-8")
    themes = re.findall(r"^(?::root|body\.quarto-dark) \{(.*?)\}", css, flags=re.M | re.S)
    assert len(themes) == 2
    for theme, ground in zip(themes, ("#ffffff", "#222222")):
        colours = dict(re.findall(r"--course-(\w+): (#\w{6});", theme))
        for name in ("ink", "quiet", "link", "code"):
            for behind in (ground, colours["soft"]):
                assert contrast(colours[name], behind) >= 4.5, f"{name} on {behind}"
    scss = (ROOT / "site" / "theme.scss").read_text(encoding="utf-8")
    bar = dict(re.findall(r"^\$navbar-(bg|fg): (#\w{6});", scss, flags=re.M))
    assert contrast(bar["bg"], bar["fg"]) >= 4.5


def test_a_downloaded_notebook_installs_the_course(tmp_path):
    pages.write_lessons(tmp_path)
    cells = json.loads((tmp_path / "31_model.attention.ipynb").read_text(encoding="utf-8"))["cells"]
    assert cells[0]["source"][0].startswith("# Attention")
    install = "".join(cells[1]["source"])
    assert f'"llm-course=={pages.settings()["version"]}"' in install
    ast.parse(install.replace("%pip", "pass  #"))
    names = {path.name for path in (ROOT / "nbs").glob("*.ipynb")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_faults_of_a_finished_site_are_found(tmp_path):
    good = '<p id="here"><a href="./b.html#x">b</a> <a href="../">up</a> <a href="lessons/a.ipynb">'
    write = pages.write
    write(tmp_path / "a.html", good + '<link rel="canonical" href="https://x/a.html">')
    write(tmp_path / "b.html", '<b id="x"> <a href="#cb1-1">1</a> <img alt="a cat" src="c.png">')
    write(tmp_path / "api" / "c.html", '<a href="../a.html#here">a</a>')
    assert list(pages.site_faults(tmp_path)) == []
    write(tmp_path / "api" / "d.html", '<a href="a.html"></a><img src="x.png">')
    write(tmp_path / "e.css", "@import url(https://fonts.example/x);")
    write(tmp_path / "f.html", '<script src="https://cdn.example/jquery.js"></script>')
    assert len(list(pages.site_faults(tmp_path))) == 4


def test_terms_name_lessons_that_exist():
    glossary = Glossary.read(ROOT / "site" / "glossary.md")
    assert len(glossary.meanings) > 60
    for term, (_, meaning) in glossary.meanings.items():
        said = re.search(r"(?:Lessons?|Engine room) ([\w, ]+)\.$", meaning)
        numbers = re.findall(r"\d\d[a-z]?", said[1]) if said else []
        assert set(numbers) <= COURSE.by_number.keys(), f"{term}: no notebook {numbers}"
