"A recording in a real browser: it is played by keys and by buttons, and fetches nothing."

import shutil

import pytest

from llm_course.replay import film, record

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def add_up(numbers):
    total = 0
    for n in numbers:
        total += n
    return total


@pytest.fixture(scope="module")
def page():
    "A page with a recording and a film, as a lesson shows them, one above the other."
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    from playwright.sync_api import sync_playwright

    shown = record(add_up, [2, 3])._repr_html_() + film(["one", "two"], "Two words")._repr_html_()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.troubles = []
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("request", lambda request: page.troubles.append(request.url))
        page.set_content(f"<!doctype html><title>x</title><body>{shown}")
        yield page
        browser.close()


def where(page, which: int = 0) -> str:
    return page.locator(".where").nth(which).inner_text()


def test_keys_and_buttons_step(page):
    assert where(page) == "step 1 of 8"
    player = page.locator(".llm-player").first
    player.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert where(page) == "step 5 of 8" and "total += n" in page.locator(".now").inner_text()
    assert "total\t\t2" in page.locator("tr", has_text="total").inner_text()
    page.keyboard.press("ArrowLeft")
    assert where(page) == "step 4 of 8" and where(page, 1) == "step 1 of 2"
    player.locator("[data-go='-1']").click()
    assert where(page) == "step 3 of 8"
    player.locator("input").fill("7")
    assert where(page) == "step 8 of 8" and "returns" in player.locator(".fresh").inner_text()
    player.locator("[data-go='1']").click()
    assert where(page) == "step 8 of 8"


def test_it_plays_to_its_end_and_stops(page):
    play = page.locator(".llm-player").nth(1).locator("[data-go='0']")
    play.click()
    assert play.inner_text() == "stop"
    page.wait_for_function("document.querySelectorAll('.where')[1].innerText === 'step 2 of 2'")
    page.wait_for_function("document.querySelectorAll(\"[data-go='0']\")[1].innerText === 'play'")
    assert page.locator(".film").inner_text() == "two"


def test_nothing_is_fetched_and_nothing_fails(page):
    assert page.troubles == []
