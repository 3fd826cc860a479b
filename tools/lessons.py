"""Run the lessons in a real Jupyter kernel.

    python tools/lessons.py                    run them all; say how long each took
    python tools/lessons.py 31 40_train.optim  run some, by name or number
    python tools/lessons.py --store [NAME...]  and store their outputs in the notebooks
    python tools/lessons.py --stale [NAME...]  name the cells whose stored outputs are old
    python tools/lessons.py --times            write the seconds into the table of the index

With --store, the same lesson stores the same bytes each time: seeds and threads are fixed, the
network and the accelerator are off, and what changes from run to run is left out of the outputs.
"""

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
STEADY = {
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "LLM_COURSE_DEVICE": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# A lesson's row in the index; the last of its five columns holds the seconds.
ROW = re.compile(r"^(?P<row>\| \[(?P<name>[\w.]+)\]\([^|]*\|[^|]*\|[^|]*\|[^|]*\|) \d+ \|$", re.M)


def find(names: list, folder: Path = NBS) -> list:
    "The notebooks with these names or numbers; all of them when there are none."
    every = sorted(folder.glob("*.ipynb"))
    if not names:
        return every
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        found = [p for p in every if stem in (p.stem, p.stem.split("_")[0])] or [
            p for p in every if p.stem.startswith(stem)
        ]
        if len(found) != 1:
            raise SystemExit(f"{name!r} names {len(found)} lessons of {[p.stem for p in every]}")
        chosen += found
    return chosen


def is_skipped(source: str) -> bool:
    "Is this the source of a cell that is for learners only?"
    return re.match(r"(#\|.*\n)*#\| eval: false", source) is not None


# Before the first cell, when outputs are stored: a figure is described by its titles and axes, and
# drawn with two dots a pixel.
DESCRIBE = """
def install():
    def describe(figure, printer, cycle):
        parts = []
        for axes in figure.axes:
            across, up = axes.get_xlabel(), axes.get_ylabel()
            words = [f"across: {across}" * bool(across), f"up: {up}" * bool(up)]
            parts.append(". ".join(filter(None, [axes.get_title(), *words])))
        printer.text(". ".join(filter(None, parts)).replace("\\n", " ") or "a drawing")
    def register(info):  # again and again: a backend that starts forgets it
        plain = get_ipython().display_formatter.formatters["text/plain"]
        plain.for_type_by_name("matplotlib.figure", "Figure", describe)
    get_ipython().events.register("pre_run_cell", register)
    get_ipython().config.InlineBackend.figure_formats = {"retina"}
install()
del install
"""


def execute(path: Path, env: dict, timeout: int = 300) -> tuple:
    "Run a notebook where it lies; returns it with fresh outputs, and the seconds it took."
    notebook = nbformat.read(path, as_version=4)
    runnable = [c for c in notebook.cells if c.cell_type != "code" or not is_skipped(c.source)]
    if env is STEADY:
        runnable.insert(0, nbformat.v4.new_code_cell(DESCRIBE))
    copy = nbformat.v4.new_notebook(cells=runnable, metadata=notebook.metadata)
    client = NotebookClient(
        copy,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    with tempfile.TemporaryDirectory() as home:
        start = time.perf_counter()
        own = {"IPYTHONDIR": home, "LLM_COURSE_PROGRESS": "off"}  # no person passes an exercise
        env = {**os.environ, **env, **own}
        client.execute(env=env, stderr=subprocess.DEVNULL)  # what goes there is the kernel's log
    notebook.metadata["widgets"] = copy.metadata.get("widgets", {})
    return notebook, time.perf_counter() - start


def steady_text(text: str) -> str:
    "Leave out what differs from run to run: overwritten lines, addresses, and folders."
    text = re.sub(r"[^\n]*\r(?!\n)", "", text)
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    for folder in (str(ROOT) + os.sep, str(Path.home()) + os.sep):
        text = text.replace(folder, "")
    return re.sub(re.escape(tempfile.gettempdir()) + r"[/\\]\w+", "...", text)


VIEW = "application/vnd.jupyter.widget-view+json"
PICTURES = 4  # a notebook stores at most so many (tools/rules.py)


def parts(model: str, models: dict) -> list:
    "(kind, state) of a widget and of all that it contains, in the order of the page."
    found = models[model.removeprefix("IPY_MODEL_")]
    inside = [part for child in found["state"].get("children", []) for part in parts(child, models)]
    return [(found["model_name"], found["state"]), *inside]


def as_html(text: str) -> dict:
    return nbformat.v4.new_output("display_data", {"text/html": text})


def small_picture(png: str, alt: str) -> dict:
    "A picture of few colours, sharp as far as its size allows, with words for who does not see it."
    from llm_course.core import _small_html

    picture, alt = base64.b64decode(png), f"The explorer as it begins. {alt}"
    text = _small_html(picture, alt, scale=2, most=12_000)
    if not text:
        full, smaller = Image.open(io.BytesIO(picture)), io.BytesIO()
        size = full.width // 2, full.height // 2
        full.convert("RGB").resize(size, Image.LANCZOS).save(smaller, format="png")
        text = _small_html(smaller.getvalue(), alt, scale=1, most=10**9)
    return as_html(text)


def still(output: dict, models: dict) -> list:
    "An explorer as a reader sees it who can't move it: its first picture, and what can be moved."
    if VIEW not in output.get("data", {}):
        return [output]
    shown, controls = [], []
    for kind, state in parts(output["data"][VIEW]["model_id"], models):
        if kind == "OutputModel":
            for inner in state["outputs"]:
                data = inner.get("data", {})
                if "image/png" in data:
                    inner = small_picture(data["image/png"], data["text/plain"])
                shown.append(nbformat.from_dict(inner))
        elif kind == "HTMLModel" and state["value"]:
            shown.append(as_html(state["value"]))
        elif state.get("description") and kind not in ("HTMLModel", "VBoxModel"):
            controls.append(state["description"])
    said = f"In the notebook you can change: {', '.join(controls)}."
    text = textwrap.fill(said, 76) + "\n"
    return [*shown, nbformat.v4.new_output("stream", name="stdout", text=text)]


def count_pictures(outputs: list) -> int:
    return len(re.findall(r"image/(?:png|jpeg)\"|data:image/", json.dumps(outputs)))


def hold_still(cells: list, models: dict) -> None:
    "Replace each explorer by a picture, as long as the notebook has room for one, and a sentence."
    left = PICTURES - sum(count_pictures(cell.get("outputs", [])) for cell in cells)
    for cell in cells:
        made = []
        for output in cell.get("outputs", []):
            for part in still(output, models):
                n = count_pictures([part]) if part is not output else 0
                if n <= max(left, 0):
                    made.append(part)
                    left -= n
        if "outputs" in cell:
            cell["outputs"] = made


def steady_output(output: dict) -> bool:
    "Clean one output in place; False when nothing of it is worth storing."
    output.pop("execution_count", None)
    if output["output_type"] == "execute_result":
        output["execution_count"] = None
    if output["output_type"] == "stream":
        output["text"] = steady_text(output["text"])
        return output["name"] == "stdout" and bool(output["text"])
    data = output.get("data", {})
    if "<progress" in data.get("text/html", ""):
        return False
    for kind in data:
        if kind.startswith("text/"):
            data[kind] = steady_text(data[kind])
    return bool(data)


def joined(outputs: list) -> list:
    "One text where a cell printed several times in a row: how it was cut up is chance."
    result = []
    for output in outputs:
        if output["output_type"] == "stream" and result and result[-1]["output_type"] == "stream":
            result[-1]["text"] += output["text"]
        else:
            result.append(output)
    return result


def fresh(path: Path) -> tuple:
    "Run a lesson; returns the notebook with its outputs, as it would be stored, and seconds."
    from nbdev.clean import clean_nb

    notebook, seconds = execute(path, STEADY)
    widgets = notebook.metadata.pop("widgets")
    state = widgets.get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    hold_still(notebook.cells, state)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined([o for o in cell.outputs if steady_output(o)])
    plain = json.loads(nbformat.writes(notebook))
    clean_nb(plain, allowed_cell_metadata_keys=["jupyter"])
    return plain, seconds


def store(path: Path) -> float:
    "Run a lesson and keep its outputs; an unchanged file is not touched. Returns seconds."
    from execnb.nbio import nb2str

    notebook, seconds = fresh(path)
    write_if_changed(path, nb2str(notebook))
    return seconds


def check_stored(path: Path) -> float:
    "Run a lesson; `ValueError` names the cells whose outputs are not those stored. Seconds."
    notebook, seconds = fresh(path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    old = [
        a["id"] for a, b in zip(cells, notebook["cells"]) if a.get("outputs") != b.get("outputs")
    ]
    if old:
        raise ValueError(f"old outputs in cells {old}: tools/lessons.py --store {path.stem}")
    return seconds


def run_only(path: Path) -> float:
    return execute(path, {})[1]


def write_if_changed(path: Path, text: str) -> None:
    "Replace a text file whole, or leave it alone."
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def write_times(seconds: dict) -> None:
    "Put the seconds into the last column of the index's table of lessons."
    path = NBS / "index.ipynb"
    notebook, found = json.loads(path.read_text(encoding="utf-8")), set()

    def put(match) -> str:
        name = match["name"]
        if name not in seconds:
            return match[0]
        found.add(name)
        return f"{match['row']} {seconds[name]:.0f} |"

    for cell in notebook["cells"]:
        text = ROW.sub(put, "".join(cell["source"]))
        cell["source"] = text.splitlines(keepends=True)
    if not found:
        raise SystemExit("nbs/index.ipynb has no row for these lessons")
    from execnb.nbio import nb2str

    write_if_changed(path, nb2str(notebook))


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the lessons in a real Jupyter kernel.")
    parser.add_argument(
        "names", nargs="*", help="names or numbers; all lessons when there are none"
    )
    parser.add_argument("--store", action="store_true", help="store the outputs in the notebooks")
    parser.add_argument("--stale", action="store_true", help="name cells with old outputs")
    parser.add_argument("--times", action="store_true", help="write the seconds into the index")
    parser.add_argument("--folder", type=Path, default=NBS, help="where the lessons lie")
    options = parser.parse_args()
    seconds, failed = {}, []
    for path in find(options.names, options.folder):
        try:
            run = store if options.store else check_stored if options.stale else run_only
            seconds[path.stem] = run(path)
            print(f"{path.stem:24} {seconds[path.stem]:5.1f} s", flush=True)
        except Exception as error:
            failed.append(path.stem)
            print(f"{path.stem:24} failed\n{error}", flush=True)
    if failed:
        sys.exit(
            f"{len(failed)} of {len(seconds) + len(failed)} lessons failed: {', '.join(failed)}"
        )
    if options.times:
        write_times(seconds)


if __name__ == "__main__":
    main()
