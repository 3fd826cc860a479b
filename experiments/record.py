"""What the scripts beside this share: the file of a recorded run, and where it was made."""

import datetime
import json
import platform
import time
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from llm_course.core import atomic_write


def made_by(command: str) -> dict:
    "With what, when and where figures were made."
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def chosen_parts(parser, given: list | None, parts: dict) -> list:
    "The parts named behind --measure: all if there are none, nothing without it."
    if unknown := set(given or ()) - set(parts):
        parser.error(f"there is no part {unknown}; choose from {list(parts)}")
    return [] if given is None else given or list(parts)


def measure_parts(file: Path, parts: dict, names: list, command: str) -> dict:
    "Measure some parts; each is in the file as soon as it is there. Returns the whole file."
    for name in names:
        start = time.monotonic()
        found = parts[name]()
        # Read again: somebody else may have measured another part meanwhile.
        tables = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        with atomic_write(file, "w") as f:
            json.dump({**tables, name: found, "made": made_by(command)}, f)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
