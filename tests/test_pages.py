"""The pages of the site, as far as they are made without Quarto (tools/pages.py)."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

import pages
import plain_site
from reference import Glossary
from test_browser import CHROMIUM, FLAGS

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
        if not (prepared / "api" / name).exists():
            left = {m[1] for m in pages.NUMBERS.finditer(plain)} & COURSE.by_number.keys()
            assert left <= {name.split("_")[0]}, f"{name}: lessons {left} without link"


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
    assert "(tokens.bpe.html)" in link("## A heading\n\nA text below it, and `22_tokens.bpe`.")
    assert "(tokens.hub.html)" in link("Engine room 22c.")


def test_a_term_of_capitals_is_no_common_word():
    glossary = Glossary({"FSDP": (["FSDP", "ZeRO"], "Cut weights. Lesson 46."),
                         "Muon": (["Muon"], "M.")})  # fmt: skip
    said = glossary.link("From zero to hero, Zero, muon, ZeRO.", set())
    assert "zero to" in said and ", Zero," in said and "[ZeRO](" in said and "[muon](" in said


@pytest.mark.skipif(not shutil.which("quarto"), reason="Quarto is not installed")
def test_the_site_is_whole(prepared):
    assert pages.render() == []


# --- The pages as pandoc makes them, which is what Quarto calls ----------------------------------


@pytest.fixture(scope="module")
def site(prepared, tmp_path_factory):
    "The pages as HTML, made by pandoc alone."
    if not plain_site.pandoc():
        pytest.skip("pypandoc_binary is not installed")
    docs = tmp_path_factory.mktemp("site")
    said = plain_site.make_site(prepared, docs)
    assert not said, "\n".join(said[:20])
    pages.write(docs / "try.html", "<title>the assistant's page, which share writes</title>")
    return docs


def html_faults(text: str) -> list:
    "What is wrong with a page that pandoc made, as far as its text shows it."
    body = re.sub(r"<(script|style)\b.*?</\1>", "", text.split("<main>")[1], flags=re.S)
    words = re.sub(r"<(pre|code|math|svg)\b.*?</\1>", "", body, flags=re.S)
    ids = re.findall(r'\bid="([^"]*)"', body)
    found = [f"two places are called {one!r}" for one in set(ids) if ids.count(one) > 1]
    formulas = re.findall(r'class="math[^>]*>[^<]', body)
    found += [f"a formula is left: {tex}" for tex in formulas]
    heads = re.findall(r"<h[1-4]\b[^>]*>(.*?)</h[1-4]>", body, flags=re.S)
    found += [f"two headings {one!r}" for one in set(heads) if heads.count(one) > 1]
    found += [f"a fold is open: {tag}" for tag in re.findall(r"<details[^>]*\bopen\b[^>]*>", body)]
    for part in re.findall(r"<p\b[^>]*>(.*?)</p>", words, flags=re.S):
        plain = re.sub(r"<[^>]*>", "", part)
        if re.search(r"^\s*\|.*\|\s*$|\|\s*:?---", plain, flags=re.M):
            found.append(f"a table is none: {plain[:60]!r}")
        if re.search(r"\n *(?:[-*+]|\d+\.) ", plain):
            found.append(f"a list is none: {plain[:60]!r}")
        if re.search(r"\$[^$]*[\\\\^_{][^$]*\$|\\\\(?:frac|sum|text|log|begin)\b", plain):
            found.append(f"raw TeX: {plain[:60]!r}")
        if re.search(r":::|```|\]\([^)\s]*\)|\*\*\w[^*\n]*\w\*\*", plain):
            found.append(f"raw Markdown: {plain[:60]!r}")
    return found


def test_pandoc_makes_every_page(site, prepared):
    made = [p for p in site.rglob("*.html") if p.name != "try.html"]
    assert len(made) == len([*prepared.glob("*.ipynb"), *prepared.glob("**/*.qmd")])
    found = [f"{p.name}: {f}" for p in made for f in html_faults(p.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_each_page_says_what_it_is(site):
    found = {}
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        said = re.search(r'<meta name="description" content="([^"]+)">', text)
        assert said or path.name == "try.html", f"{path.name} has no description"
        if said and path.parent == site:
            assert said[1] not in found, f"{path.name} is described like {found[said[1]]}"
            found[said[1]] = path.name


def test_links_of_the_finished_pages_lead_somewhere(site):
    found = list(pages.site_faults(site))
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        ids = set(re.findall(r'\bid="([^"]+)"', text))
        inside = set(re.findall(r'<a\b[^>]*href="#([^"]+)"', text)) - ids
        found += [f"{path.name}: no place #{anchor}" for anchor in sorted(inside)]
    assert not found, "\n".join(found)


def test_faults_of_a_page_of_pandoc_are_found():
    good = "<h2>A</h2><details><summary>b</summary></details><p>a | b costs $5, 2 ** 3 ** 4</p>"
    good += '<span class="math inline"><math>x</math></span><pre>| a |\n- b $x_i$</pre>'
    assert html_faults(f"<main>{good}</main>") == []
    for bad in (
        "<h2>A</h2><h3>A</h3>",
        '<p id="a"></p><p id="a"></p>',
        "<details open><summary>b</summary></details>",
        "<p>| a | b |\n|---|---|</p>",
        "<p>so:\n- one\n- two</p>",
        '<span class="math inline">x_i</span>',
        "<p>the sum $x_i$ is</p>",
        "<p>a [link](b.html)</p>",
        "<p>a **bold** word</p>",
    ):
        assert html_faults(f"<main>{bad}</main>"), bad


LAYOUT = """() => {
    const found = [], wide = document.documentElement.scrollWidth;
    if (wide > innerWidth) found.push(`scrolls sideways: ${wide} in ${innerWidth}`);
    const kinds = "main :is(p, pre, h1, h2, h3, table, img, svg, summary)";
    const boxes = [...document.querySelectorAll(kinds)]
        .map((element) => ({ element, box: element.getBoundingClientRect() }))
        .filter(({ element, box }) => element.checkVisibility() && box.width > 1 && box.height > 1)
        .sort((a, b) => a.box.top - b.box.top);
    boxes.forEach((a, i) => {
        for (const b of boxes.slice(i + 1)) {
            if (b.box.top > a.box.bottom - 3) break;
            const right = Math.min(a.box.right, b.box.right);
            if (right - Math.max(a.box.left, b.box.left) < 3) continue;
            if (a.element.contains(b.element)) continue;
            const text = a.element.textContent.slice(0, 40);
            found.push(`${a.element.tagName} lies on ${b.element.tagName}: ${text}`);
        }
    });
    return found;
}"""


CUT = """() => [...document.querySelectorAll("main pre")]
    .filter((pre) => pre.checkVisibility() && pre.scrollWidth > pre.clientWidth + 2)
    .map((pre) => `cut: ${pre.textContent.slice(0, 40)}`)"""


def seen(files: list) -> list:
    "What a browser finds wrong with pages: on a phone and a desk, in light and dark."
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("pageerror", lambda error: found.append(f"{page.url}: {error}"))
        errors = lambda said: said.type == "error" and found.append(f"{page.url}: {said.text}")
        page.on("console", errors)
        fetched = lambda r: re.match("file:|data:", r.url) or found.append(f"fetches {r.url}")
        page.on("request", fetched)
        for file in files:
            for theme, width in (("light", 1280), ("dark", 390), ("dark", 1280), ("light", 390)):
                page.set_viewport_size({"width": width, "height": 900})
                page.emulate_media(color_scheme=theme)
                if (theme, width) != ("dark", 1280):  # it has been loaded in the dark
                    page.goto(file.as_uri())
                found += [f"{file.name}, {theme}, {width}: {f}" for f in page.evaluate(LAYOUT)]
            page.emulate_media(media="print")
            found += [f"{file.name}, on paper: {f}" for f in page.evaluate(CUT)]
            page.emulate_media(media="screen")
        browser.close()
    return found


SAMPLE = ["start", "index", "glossary", "references", "api/index", "world.story", "model.attention"]
SAMPLE += ["data.files", "train.loop", "generate.steer", "align.rl", "ship.serve"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_pages_look_right_on_a_phone_and_on_a_desk(site):
    assert seen([site / f"{name}.html" for name in SAMPLE]) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_are_for_everyone(site, theme):
    from test_axe import serious

    names = ("start", "model.attention", "glossary")
    assert serious([site / f"{name}.html" for name in names], theme) == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_all_pages_look_right(site):
    found = seen(sorted(p for p in site.rglob("*.html") if p.name != "try.html"))
    assert not found, "\n".join(found)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_what_a_browser_finds(tmp_path):
    head = "<meta name=viewport content='width=device-width'><main>"
    fold = "<details><summary>a</summary><p>one</p><p style='margin-top:-9px'>two</p></details>"
    good, bad = f"<p>word</p><table><tr><td>1</table><svg width=9></svg>{fold}", [
        "<pre>" + "x" * 300 + "</pre>",
        "<p>one</p><p style='margin-top:-30px'>two</p>",
        "<img alt=a src='https://x.example/a.png'>",
        "<script>missing()</script>",
    ]
    for i, body in enumerate([good, *bad]):
        pages.write(tmp_path / f"{i}.html", head + body)
        assert bool(seen([tmp_path / f"{i}.html"])) == (i > 0), body


def test_what_is_not_done_is_said():
    assert pages.not_done(True, False) == pages.not_done(True, True) == ""
    assert "sidebar" in pages.not_done(False, True) and "try.html" in pages.not_done(False, False)


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
