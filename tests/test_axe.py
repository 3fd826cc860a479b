"""axe on the pages: nothing serious in either theme. Where Quarto is, on all pages of the site."""

import shutil
from pathlib import Path

import pytest
from test_browser import CHROMIUM, FLAGS

import pages

axe = pytest.importorskip("axe_playwright_python.sync_playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


def serious(files: list, theme: str) -> list:
    "What axe calls serious or critical on pages from disk: '31.html: rule: the element'."
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(color_scheme=theme)
        for file in files:
            page.goto(file.as_uri())
            for fault in axe.Axe().run(page).response["violations"]:
                if fault["impact"] in ("serious", "critical"):
                    where = fault["nodes"][0]["html"][:80]
                    found.append(f"{file.name}, {theme}: {fault['id']}: {where}")
        browser.close()
    return found


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("quarto"), reason="Quarto is not installed")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_serious_on_any_page(theme):
    assert pages.prepare() == [] and pages.render() == []
    files = sorted(pages.DOCS.rglob("*.html"))
    assert files and serious(files, theme) == []


def page(body: str, folder: Path) -> Path:
    "A page with our colours."
    css = (pages.SITE / "site.css").read_text(encoding="utf-8")
    path = folder / "page.html"
    head = f"<title>A page</title><style>{css}</style>"
    path.write_text(f"<!DOCTYPE html><html lang=en><head>{head}</head><body>{body}</body></html>",
                    encoding="utf-8")
    return path


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_faults_are_found(tmp_path, theme):
    good = "<main><h1>Attention</h1><p>Some <code>code</code> and <a href=x>a link</a>.</p></main>"
    assert serious([page(good, tmp_path)], theme) == []
    bad = "<main><h1>A</h1><p style='color:#aaa;background:#fff'>pale</p><button></button></main>"
    rules = {line.split(": ")[1] for line in serious([page(bad, tmp_path)], theme)}
    assert {"color-contrast", "button-name"} <= rules
