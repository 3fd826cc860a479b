"""The course's own entries of the capstone, each made by one command.

    python experiments/capstone.py 1 [5 15]        make the entries of 1, 5 and 15 minutes
    python experiments/capstone.py 1 --save llm_course/assets

A minute is a minute of the reference machine, in CPU-seconds of one core (`96e_entries`). The
entry is judged from its file, as any other; the last line is JSON, and `value` is the excess over
the floor of the last one, in nats per token.
"""

import argparse
import json
from pathlib import Path


from llm_course.entries import course_recipe, judge_entry, make_entry, pack_entry, read_entry

import torch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("minutes", type=float, nargs="+")
    parser.add_argument("--save", type=Path, default=Path("runs"), help="where the entries go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for minutes in args.minutes:
        folder = Path("runs") / f"capstone-{minutes:g}"
        facts = make_entry(course_recipe, minutes, "the course", folder)
        path = pack_entry(folder, args.save / f"capstone-{minutes:g}.entry.zip")
        verdict = judge_entry(read_entry(path))
        steps = facts["log"][-1][1]
        print(
            f"{minutes:g} minutes: {verdict.excess:.4f} ({verdict.fresh:.4f} on new stories) "
            f"{facts['parameters']:,} parameters, {steps} steps, {path.stat().st_size >> 10} KB "
            f"{verdict.problem}",
            flush=True,
        )
    print(json.dumps({"name": "capstone", "value": verdict.excess, "unit": "nats per token"}))


if __name__ == "__main__":
    main()
