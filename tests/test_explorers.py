"""Every explorer of the course in a real browser: each control is moved by the keyboard, and the result changes.

    pytest -m slow tests/test_explorers.py -s        # all lessons, in minutes; -s lists the controls

In each lesson: no traceback, no error in the browser's console, no request to another machine, a
label for each control, and an answer to each key that is pressed.
"""

import json
import re

import pytest
import rules
import test_browser as lab_test
from test_browser import CHROMIUM, ERROR, FLAGS, ROOT, TOKEN, run_all

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
QUICK = {"32_model.block", "50_generate.sampling"}  # the others are slow


def has_explorer(lesson) -> bool:
    "Does a cell of the lesson show controls as soon as it runs?"
    text = "\n".join(cell.source for cell in lesson.code_cells)
    shown = re.search(r"^(\w*explore\w*|interact)\(.*\);?$", text, re.M)
    return bool(lesson.number) and "interact(" in text and bool(shown)


LESSONS = [
    pytest.param(lesson.name, marks=() if lesson.name in QUICK else pytest.mark.slow)
    for lesson in rules.lessons()
    if has_explorer(lesson)
]

# What is seen of an explorer: pictures, text and tables, without the numbers beside the sliders.
SEEN = """explorer => [...explorer.querySelectorAll(".jp-OutputArea-output")].map(
    e => e.innerText + [...e.querySelectorAll("img, svg")].map(i => i.src || i.outerHTML).join())
    .join()"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "The address of one JupyterLab with copies of all lessons that have an explorer."
    names = [p.values[0] for p in LESSONS]
    make = lab_test.lab.__wrapped__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_test, "LESSON", names[0] + ".ipynb")
        running = make(tmp_path_factory.mktemp("lab"))
        address = next(running)
        yield address, lambda name: copy_into(running, name)
        next(running, None)


def copy_into(running, name: str) -> None:
    "Put a lesson without its outputs into the folder that the server shows."
    folder = running.gi_frame.f_locals["folder"]
    lab_test.without_outputs(ROOT / "nbs" / f"{name}.ipynb", folder / f"{name}.ipynb")


@pytest.fixture
def lesson_page(server, request):
    "(page, errors in the console, requests to other machines) of a lesson that has run."
    from playwright.sync_api import sync_playwright

    address, copy = server
    copy(request.param)
    console, outside = [], []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda m: console.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: outside.append(r.url) if is_outside(r.url) else None)
        page.goto(f"{address}/lab/tree/{request.param}.ipynb?token={TOKEN}&reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        page.locator("#jp-main-statusbar", has_text="ipykernel) | Idle").wait_for(timeout=90_000)
        run_all(page)
        yield page, console, outside
        browser.close()


def is_outside(url: str) -> bool:
    return url.startswith("http") and not re.match(r"https?://(127\.0\.0\.1|localhost)[:/]", url)


def press(page, control) -> str:
    "Move one control by the keyboard; what kind it is."
    if control.locator(".noUi-handle").count():
        handle = control.locator(".noUi-handle").first
        handle.focus()
        now, most = (handle.get_attribute(a) for a in ("aria-valuenow", "aria-valuemax"))
        page.keyboard.press("ArrowLeft" if now == most else "ArrowRight")
        return "slider"
    if control.locator("select").count():
        box = control.locator("select").first
        options = box.locator("option").all_inner_texts()
        now = box.evaluate("e => e.selectedIndex")
        box.select_option(index=(now + 1) % len(options))
        return "choice"
    if control.locator("input[type=checkbox]").count():
        control.locator("input[type=checkbox]").first.press("Space")
        return "checkbox"
    if control.locator("input[type=radio]").count():
        control.locator("input[type=radio]").last.press("Space")
        return "radio"
    box = control.locator("input, textarea").first
    box.fill(box.input_value() + " bees")
    box.press("Enter")
    return "text"


@pytest.mark.parametrize("lesson_page", LESSONS, indirect=True)
def test_every_control_moves_its_explorer(lesson_page, request):
    page, console, outside = lesson_page
    assert page.locator(ERROR).all_inner_texts() == []
    controls = page.locator(".widget-interact .widget-inline-hbox")
    assert controls.count(), "the lesson has run, and shows no control"
    for i in range(controls.count()):
        control = controls.nth(i)
        label = control.locator(".widget-label").first.inner_text()
        assert label.strip(), f"control {i} has no label"
        explorer = control.locator("xpath=ancestor::*[contains(@class,'widget-interact')]")
        control.scroll_into_view_if_needed()
        before = explorer.evaluate(SEEN)
        kind = press(page, control)
        page.wait_for_function(
            "([explorer, before]) => (" + SEEN + ")(explorer) !== before",
            arg=[explorer.element_handle(), before],
            timeout=60_000,
        )
        print(f"{request.node.callspec.id}: {kind} {label!r}")
        if kind == "text":  # put back: other controls need not answer to nonsense
            moved = explorer.evaluate(SEEN)
            box = control.locator("input, textarea").first
            box.fill(box.input_value().removesuffix(" bees"))
            box.press("Enter")
            page.wait_for_function(
                "([explorer, before]) => (" + SEEN + ")(explorer) !== before",
                arg=[explorer.element_handle(), moved],
                timeout=60_000,
            )
    assert page.locator(ERROR).all_inner_texts() == []
    assert page.locator(".jp-Notebook .jp-OutputArea-output", has_text="Traceback").count() == 0
    assert outside == [], f"requests left this machine: {outside}"
    ours = [text for text in console if "favicon" not in text]
    assert ours == [], json.dumps(ours, indent=1)
