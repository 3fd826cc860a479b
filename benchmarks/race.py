"""Seven ways to train the same small language models, on equal terms.

    python benchmarks/race.py [--seeds 0 1 2 3 4] [--tokens 2000000] [--seconds 2]
        [--widths 8 16 32] [--methods NAME...] [--json FILE]

Random search, hill climbing, a genetic algorithm, an evolution strategy, CMA-ES (its diagonal
form), SGD and Adam train one-layer models of three sizes on the characters of the story world.
All start from the same weights and see the same batches in the same order. Each runs on one core
until it has used the budget of token evaluations (a token forward is 1, forward and backward 3)
and the seconds of that core. Before the race, each method tries six settings, three step sizes and
two batch sizes, with a quarter of both budgets and a seed of its own; the best one races. The loss
is measured on stories that nobody trained on.

The last line is JSON; `value` is how many nats per token the evolution strategy is behind Adam at
the end of the budget of token evaluations, in the largest model (median of seeds). It has no bar:
it is an answer, not an aim. `--json FILE` writes all curves, for the lesson; what the file has
already, of other widths and methods, stays in it.
"""

import argparse
import datetime
import json
import math
import platform
import statistics
from pathlib import Path

import torch

from llm_course.core import atomic_write
from llm_course.evolve.search import (
    GA,
    HillClimb,
    RandomSearch,
    flatten,
    population_loss,
)
from llm_course.evolve.strategies import CMAES, ES, gradient_step, search_step, trace
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.bpe import CharTokenizer
from llm_course.train.loop import keep_memory
from llm_course.world import World

CONTEXT, WIDTHS, ROWS = 32, (8, 16, 32), (4, 16)
STEPS = {  # what each method tries: its step size
    "random search": (0.03, 0.1, 0.3),
    "hill climbing": (0.01, 0.03, 0.1),
    "GA": (0.03, 0.1, 0.3),
    "ES": (0.01, 0.03, 0.1),
    "CMA-ES": (0.03, 0.1, 0.3),
    "SGD": (0.3, 1.0, 3.0),
    "Adam": (0.01, 0.03, 0.1),
}
SEARCHES = {
    "random search": lambda start, size, seed: RandomSearch(start, 64, size, seed),
    "hill climbing": lambda start, size, seed: HillClimb(start, 16, size, seed=seed),
    "GA": lambda start, size, seed: GA(start, 64, size, seed=seed),
    "ES": lambda start, size, seed: ES(start, 128, 0.05, size, seed),
    "CMA-ES": lambda start, size, seed: CMAES(start, size, 64, seed, diagonal=True),
}


class Text:
    "Characters of the story world, cut into batches."

    def __init__(self):
        stories = World(0).sample(600, seed=1)
        self.tokenizer = CharTokenizer.train(stories)
        ids = [[self.tokenizer.end_id, *self.tokenizer.encode(s)] for s in stories]
        self.train, valid = (torch.tensor(sum(part, [])) for part in (ids[:500], ids[500:]))
        starts = torch.arange(256) * ((len(valid) - CONTEXT - 1) // 256)
        self.valid = self.cut(valid, starts)

    def cut(self, ids, starts):
        "Windows that begin at some places."
        at = starts[:, None] + torch.arange(CONTEXT)
        return ids[at], ids[at + 1]

    def batches(self, rows: int, seed: int):
        "A function step -> batch; the same for every method."

        def batch(step: int):
            g = torch.Generator().manual_seed(1_000_003 * seed + step)
            return self.cut(
                self.train, torch.randint(len(self.train) - CONTEXT - 1, (rows,), generator=g)
            )

        return batch


def make_model(text: Text, width: int, seed: int) -> GPT:
    "One layer, one head."
    torch.manual_seed(seed)
    return GPT(GPTConfig(text.tokenizer.vocab_size, CONTEXT, width, n_layers=1, n_heads=1))


def run(text, name, width, seed, size, rows, tokens, seconds) -> list:
    "One method on one model."
    model, batch = make_model(text, width, seed), text.batches(rows, seed)
    start = flatten(model)
    if name in SEARCHES:
        strategy = SEARCHES[name](start, size, seed)
        step = search_step(strategy, model, batch)

        def weights():
            return strategy.best[0] if name == "random search" else strategy.mean.float()

    else:
        kind = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[name]
        step = gradient_step(kind(model.parameters(), lr=size), model, batch)

        def weights():
            return start.detach()

    points = trace(
        step, lambda: population_loss(model, weights()[None], *text.valid).item(), tokens, seconds
    )
    return [
        (p.tokens, round(p.seconds, 4), round(p.loss, 4) if math.isfinite(p.loss) else 99.0)
        for p in points
    ]


def at(points: list, column: int, budget: float) -> float:
    "The loss when a budget was used up: between two looks, on a straight line of the logarithm."
    for before, after in zip(points, points[1:]):
        if after[column] >= budget:
            low, high = max(before[column], 1e-9), after[column]
            share = math.log(budget / low) / math.log(high / low)
            return before[2] + min(1.0, share) * (after[2] - before[2])
    return points[-1][2]


def spread(losses: list) -> str:
    "Median and range."
    return f"{statistics.median(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"


def choose(text, name, width, tokens, seconds) -> tuple:
    "The best of the settings, with a seed that does not race: by the mean of both budgets."

    def score(setting):
        points = run(text, name, width, 99, *setting, tokens, seconds)
        return at(points, 0, tokens) + at(points, 1, seconds)

    return min(((size, rows) for size in STEPS[name] for rows in ROWS), key=score)


def race(text, widths, methods, seeds, tokens, seconds) -> list:
    "All methods, sizes and seeds."
    found = []
    for width in widths:
        n = len(flatten(make_model(text, width, 0)))
        for name in methods:
            size, rows = choose(text, name, width, tokens / 4, seconds / 4)
            runs = [run(text, name, width, s, size, rows, tokens, seconds) for s in seeds]
            by_tokens = [at(r, 0, tokens) for r in runs]
            by_seconds = [at(r, 1, seconds) for r in runs]
            row = {"parameters": n, "method": name, "step": size, "rows": rows}
            found.append({**row, "by_tokens": by_tokens, "by_seconds": by_seconds, "runs": runs})
            print(
                f"{n:7,d}  {name:14s} step {size:<5g} rows {rows:2d}  "
                f"{spread(by_tokens)}  {spread(by_seconds)}",
                flush=True,
            )
    return found


def write(args, found: list) -> None:
    "Put the curves into the file, beside those of other widths."
    old = json.loads(args.json.read_text(encoding="utf-8"))["results"] if args.json.exists() else []
    rows = {(r["parameters"], r["method"]): r for r in old + found}
    results = [rows[key] for key in sorted(rows, key=lambda k: (k[0], list(STEPS).index(k[1])))]
    seeds = " ".join(map(str, args.seeds))
    made = {
        "command": f"python benchmarks/race.py --seeds {seeds} --tokens {args.tokens} "
        f"--seconds {args.seconds:g}",
        "date": datetime.date.today().isoformat(),
        "machine": f"one core of {platform.machine()}, torch {torch.__version__}",
    }
    facts = {"made": made, "tokens": args.tokens, "seconds": args.seconds, "results": results}
    with atomic_write(args.json, "w") as f:
        json.dump(facts, f, separators=(",", ":"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--methods", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    text = Text()
    print(
        "parameters, method, settings, loss in nats per token: median (range) of "
        f"{len(args.seeds)} seeds after {args.tokens:,} token evaluations, and after "
        f"{args.seconds:g} s of one core"
    )
    found = race(text, args.widths, args.methods, args.seeds, args.tokens, args.seconds)
    if args.json:
        write(args, found)
    largest = max(r["parameters"] for r in found)
    last = {
        r["method"]: statistics.median(r["by_tokens"]) for r in found if r["parameters"] == largest
    }
    gap = round(last["ES"] - last["Adam"], 3) if {"ES", "Adam"} <= last.keys() else None
    line = {
        "name": "race",
        "value": gap,
        "unit": "nats per token",
        "bar": None,
        "largest model": {k: round(v, 3) for k, v in last.items()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
