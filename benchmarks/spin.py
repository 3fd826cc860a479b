"""How long torch's threads should spin while they wait: one training step, quiet and busy.

    python benchmarks/spin.py [--rounds 5] [--settings GOMP_SPINCOUNT=10000 ...]

A thread that waits can spin (answers at once, but keeps its core) or sleep (frees it, but wakes up
late). Where other processes want the cores, spinning waits for a thread that is not running. Each
setting gets a process of its own; they take their steps in turn, first with nothing of ours beside
them, then beside one busy process per core. Medians; the last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

OWN = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS"]
SETTINGS = [
    "KMP_BLOCKTIME=200",  # torch's own default: another runtime's setting keeps the package's away
    "GOMP_SPINCOUNT=1000",
    "GOMP_SPINCOUNT=10000",
    "GOMP_SPINCOUNT=100000",
    "OMP_WAIT_POLICY=PASSIVE",
    "OMP_NUM_THREADS=1",
    "",  # what the package chooses
]
BAR = 0.4  # busy, at least this share of the quiet speed


def serve() -> None:
    "Child: for each line that comes in, take so many steps and print the median seconds."
    import llm_course.core  # noqa: F401  before torch: this is where the package chooses
    import torch

    from llm_course.model.gpt import GPT, GPTConfig
    from llm_course.threads import StepPace
    from llm_course.train.loop import TrainConfig, Trainer

    torch.manual_seed(0)
    model = GPT(GPTConfig(4096, 256, d_model=128, n_layers=4, n_heads=2))
    tokens = torch.randint(4096, (16, 256))
    batches = iter(lambda: (tokens, tokens, None), 0)
    trainer = Trainer(model, batches, TrainConfig(steps=10**6))
    trainer.take_step()
    pace = StepPace()  # does something where the spin is the package's
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            trainer.take_step()
            times.append(time.perf_counter() - start)
            pace.after_step(times[-1])
        print(statistics.median(times), flush=True)


def start(setting: str) -> subprocess.Popen:
    "A child with this setting and no other."
    environment = {k: v for k, v in os.environ.items() if k not in OWN}
    environment |= dict([setting.split("=")]) if setting else {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__, "--serve"], env=environment, **pipes)


def ask(child: subprocess.Popen, steps: int) -> float:
    "Seconds of a step."
    child.stdin.write(f"{steps}\n")
    child.stdin.flush()
    return float(child.stdout.readline())


def measure(children: dict, rounds: int, steps: int) -> dict:
    "Setting -> median seconds; the settings take turns."
    found = {setting: [] for setting in children}
    for _ in range(rounds):
        for setting, child in children.items():
            found[setting].append(ask(child, steps))
    return {setting: statistics.median(times) for setting, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="in a row, in each round")
    parser.add_argument("--settings", nargs="*", default=SETTINGS)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    children = {setting: start(setting) for setting in args.settings}
    threads = {setting: int(child.stdout.readline()) for setting, child in children.items()}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    quiet = measure(children, args.rounds, args.steps)
    spinner = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spinner) for _ in range(cores)]
    try:
        busy = measure(children, args.rounds, args.steps)
    finally:
        for process in [*others, *children.values()]:
            process.kill()
    print(f"{cores} cores, load before {load:.1f}; milliseconds of a step")
    print(f"{'setting':28}{'threads':>8}{'quiet':>8}{'busy':>8}{'share':>8}")
    for setting in children:
        share = quiet[setting] / busy[setting]
        name = setting or "the package's choice"
        print(f"{name:28}{threads[setting]:8}{1000 * quiet[setting]:8.0f}"
              f"{1000 * busy[setting]:8.0f}{share:8.0%}")
    if "" in children:
        value = round(quiet[""] / busy[""], 2)
        print(json.dumps({"name": "spin", "value": value, "unit": "share of the quiet speed",
                          "bar": BAR, "cores": cores, "load": round(load, 1)}))


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
