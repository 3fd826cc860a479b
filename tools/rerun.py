"""Run a lesson twice in one kernel; the second time, each quick cell twice in a row.

    python tools/rerun.py nbs/31_model.attention.ipynb

A learner changes a cell and runs it again, and goes back to the top when lost: neither may fail
because of what an earlier run left behind. What took longer than `QUICK` seconds is run once a pass.
Seconds depend on the machine and on what else it does; so the first pass also counts what `Trainer`
learns from, 6 operations for each token and parameter, and a lesson may take `WORK` of them.
"""

import os
import sys
import time
from pathlib import Path

QUICK = 1
WORK = 650e9  # about fifteen seconds of one thread; the most is 593, of 42_train.floor


def code_cells(path: Path) -> list:
    "The cells that a test runs: (id, source)."
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    return [
        (cell.id, cell.source)
        for cell in cells
        if cell.cell_type == "code" and "#| eval: false" not in cell.source
    ]


def count_work() -> list:
    "A list whose only number grows with each step that `Trainer` takes in this process."
    from llm_course.model.gpt import count_params
    from llm_course.train.loop import Trainer

    work, step = [0], Trainer.take_step

    def counted(trainer):
        before = trainer.progress.tokens
        result = step(trainer)
        work[0] += 6 * count_params(trainer.model) * (trainer.progress.tokens - before)
        return result

    Trainer.take_step = counted
    return work


def run_twice(path: Path, most: float = WORK) -> str:
    "What went wrong; empty if nothing did."
    os.environ["IN_TEST"] = "1"
    work = count_work()
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
        if turn == 1 and work[0] > most:
            return f"trains for {work[0] / 1e9:,.0f} billion operations, at most {most / 1e9:,.0f}"
    return ""


if __name__ == "__main__":
    failures = {name: run_twice(Path(name).resolve()) for name in sys.argv[1:]}
    sys.exit("\n\n".join(f"{name}: {text}" for name, text in failures.items() if text) or 0)
