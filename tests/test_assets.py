"""The files that ship are the files that llm_course/assets/README.md describes."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "llm_course" / "assets"
README = (ASSETS / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([^`]+)` \| ([\d.]+) \| (.+) \| (.+) \| (.+) \|$", re.M)
ROWS = {row[0]: row[1:] for row in ROW.findall(README)}


def source(name: str) -> str:
    "All code and text of the notebook `NN_name`; its number may change."
    found = [p for p in (ROOT / "nbs").glob("*.ipynb") if p.stem.partition("_")[2] == name]
    assert len(found) == 1, f"{len(found)} notebooks are called {name}"
    cells = json.loads(found[0].read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def test_every_asset_is_listed_and_every_listed_one_exists():
    there = {path.name for path in ASSETS.iterdir() if path.is_file()} - {"README.md"}
    assert there == set(ROWS)
    assert len(ROW.findall(README)) == len(ROWS), "a file is listed twice"


def test_sizes_are_about_right():
    wrong = {}
    for name, (listed, *_) in ROWS.items():
        size = (ASSETS / name).stat().st_size / 1024
        if abs(size - float(listed)) > max(1, size / 10):
            wrong[name] = f"{size:.1f} KB, listed {listed}"
    assert not wrong


def test_who_makes_a_file_and_who_reads_it_exists():
    for name, (_, _, maker, readers) in ROWS.items():
        for script in re.findall(r"\w+/\w+\.py", maker):
            assert (ROOT / script).is_file(), f"{name}: there is no {script}"
        for reader in re.findall(r"`([^`]+)`", readers):
            assert name in source(reader), f"{reader} does not mention {name}"
