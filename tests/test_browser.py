"""A lesson in a real browser: it runs to its last cell, and a slider that moves changes a plot.

JupyterLab is started the way `make lab` starts it, on a copy of the lesson.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSON = "31_model.attention.ipynb"
TOKEN = "a-token-for-the-test"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
ERROR = '[data-mime-type="application/vnd.jupyter.error"]'
ENV = {
    k: v for k, v in os.environ.items() if not k.startswith("MAKE")
}  # the tests may run under make

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def lab_command(folder: Path, *options: str) -> list:
    "`make lab` where it is set up, and the same server without make elsewhere."
    ready = (
        shutil.which("make")
        and subprocess.run(
            ["make", "-q", ".venv/.ready"], cwd=ROOT, env=ENV, capture_output=True
        ).returncode
        == 0
    )
    if ready and sys.prefix == str(ROOT / ".venv"):
        return ["make", "lab", f"LESSONS={folder}", "ARGS=" + " ".join(options)]
    root = ["--allow-root"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    return [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}", *root, *options]


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except (urllib.error.URLError, OSError):
        return False


def without_outputs(source: Path, target: Path) -> None:
    "Copy a notebook; what is seen in the copy was made there."
    notebook = json.loads(source.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    target.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture
def lab(tmp_path):
    "The address of a running JupyterLab that shows a folder with a copy of the lesson."
    folder, settings = tmp_path / "lessons", tmp_path / "settings"
    folder.mkdir()
    without_outputs(ROOT / "nbs" / LESSON, folder / LESSON)
    tracker = settings / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(
        json.dumps({"windowingMode": "none"}), encoding="utf-8"
    )  # keep every cell in the page
    port = free_port()
    command = lab_command(
        folder, "--no-browser", f"--port={port}", f"--IdentityProvider.token={TOKEN}"
    )
    env = {
        **ENV,
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
    }
    log = tmp_path / "log.txt"
    with log.open("w", encoding="utf-8") as out:
        server = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
        )
    try:
        end = time.monotonic() + 90
        while not answers(f"http://127.0.0.1:{port}/api?token={TOKEN}"):
            assert server.poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
        end = time.monotonic() + 30
        while answers(f"http://127.0.0.1:{port}/api?token={TOKEN}") and time.monotonic() < end:
            time.sleep(0.5)  # make is gone at once, the server a little later


@pytest.fixture
def page(lab):
    "The lesson, open in the browser, its kernel ready."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"{lab}/lab/tree/{LESSON}?token={TOKEN}&reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        page.locator("#jp-main-statusbar", has_text="ipykernel) | Idle").wait_for(timeout=90_000)
        yield page
        browser.close()


def run_all(page) -> None:
    "Choose Run All Cells from the menu, and wait until the last cell has run."
    page.locator(".lm-MenuBar-item", has_text="Run").click()
    page.locator(".lm-Menu-item", has_text="Run All Cells").first.click()
    page.wait_for_function(
        r"""() => {
        const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")];
        const shown = prompts.map(e => e.innerText).filter(p => p.trim());  // not the folded
        const last = [...document.querySelectorAll(".jp-CodeCell")].at(-1);
        return shown.every(p => /\[\d+\]/.test(p)) && last.querySelector(".jp-OutputArea-output")
            && document.querySelector('.jp-Notebook-ExecutionIndicator[data-status="idle"]');
    }""",
        timeout=180_000,
    )


def test_a_lesson_runs_and_a_slider_changes_its_plot(page):
    run_all(page)
    assert page.locator(ERROR).all_inner_texts() == []
    assert page.locator(".jp-Notebook .jp-OutputArea-output", has_text="Traceback").count() == 0

    explorer = page.locator(".widget-interact").first
    explorer.scroll_into_view_if_needed()
    picture = explorer.locator("img").first
    before = picture.get_attribute("src")
    explorer.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        """before => {
        const picture = document.querySelector(".widget-interact img");
        return picture && picture.src !== before && picture.complete && picture.naturalWidth > 0;
    }""",
        arg=before,
        timeout=30_000,
    )
    assert page.locator(ERROR).all_inner_texts() == []
