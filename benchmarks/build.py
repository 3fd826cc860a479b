"""From raw text to a graded assistant: how long `llm-course build` takes on the story world.

    python benchmarks/build.py [--out FOLDER] [--seed 0]

The command runs in a process of its own, in a fresh folder, with nothing chosen: tokenizer, tokens,
plan, pretraining, fine-tuning on conversations, reward model, policy, report card. The table gives
the seconds of each stage and what it is graded by; the clock of the last line also counts the start
of Python and the imports. With --out the run is kept, to be looked at and talked to.

The last line is JSON; `value` is the whole time in seconds, and the bar is 180.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRADES = {
    "tokenizer": ["vocab_size"],
    "model": ["steps", "valid"],
    "sft": ["before", "after", "reward", "facts", "refused", "helped"],
    "reward": ["pairs", "accuracy", "best"],
    "policy": ["method", "steps", "reward", "facts", "refused", "helped"],
    "report": ["excess", "possible"],
}


def shown(value) -> str:
    "A figure for people."
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="keep the run in this folder, which must be new")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch) / "run"
        if folder.exists():
            sys.exit(f"{folder} is there already; a run that is continued can't be timed")
        command = [sys.executable, "-m", "llm_course", "build", "--out", str(folder)]
        start = time.perf_counter()
        subprocess.run([*command, "--seed", str(args.seed)], check=True)
        seconds = time.perf_counter() - start
        facts = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    print(f"\n{'stage':<10} {'seconds':>8}  figures")
    for name, stage in facts.items():
        grades = "  ".join(f"{k} {shown(stage[k])}" for k in GRADES.get(name, []) if k in stage)
        print(f"{name:<10} {stage['seconds']:8.1f}  {grades}")
    print(f"{'all':<10} {seconds:8.1f}")
    row = {"name": "build", "value": round(seconds, 1), "unit": "seconds", "bar": 180}
    print(json.dumps(row | {"stages": {name: stage["seconds"] for name, stage in facts.items()}}))


if __name__ == "__main__":
    main()
