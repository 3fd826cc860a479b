"""Run a lesson twice in one kernel; the second time, each quick cell twice in a row.

    python tools/rerun.py nbs/31_model.attention.ipynb

A learner changes a cell and runs it again, and goes back to the top when lost: neither may fail
because of what an earlier run left behind. What took longer than `QUICK` seconds is run once a pass.
"""

import os
import sys
import time
from pathlib import Path

QUICK = 1


def code_cells(path: Path) -> list:
    "The cells that a test runs: (id, source)."
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    return [
        (cell.id, cell.source)
        for cell in cells
        if cell.cell_type == "code" and "#| eval: false" not in cell.source
    ]


def run_twice(path: Path) -> str:
    "What went wrong; empty if nothing did."
    os.environ["IN_TEST"] = "1"
    from execnb.shell import CaptureShell

    shell, quick = CaptureShell(path=path.parent), {}
    for turn in (1, 2):
        for number, (key, source) in enumerate(code_cells(path)):
            for again in range(2 if turn == 2 and quick[key] else 1):
                start = time.perf_counter()
                shell.run(source)
                if error := shell.exc:
                    when = f"pass {turn}" + ", run again at once" * again
                    return f"cell {key}, {when}: {type(error).__name__}: {error}\n{source}"
                quick.setdefault(key, time.perf_counter() - start < QUICK)
    return ""


if __name__ == "__main__":
    failures = {name: run_twice(Path(name).resolve()) for name in sys.argv[1:]}
    sys.exit("\n\n".join(f"{name}: {text}" for name, text in failures.items() if text) or 0)
