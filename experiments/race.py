"""Seven ways to train the same small language models, on equal terms.

    python experiments/race.py [--seeds 0 1 2 3 4] [--tokens 2000000] [--seconds 2]
        [--widths 8 16 32] [--methods NAME...] [--json FILE]
    python experiments/race.py --shapes [--seeds 0 1 2 3 4] [--trainings 48] [--seconds 0.3]

Random search, hill climbing, a genetic algorithm, an evolution strategy, CMA-ES (its diagonal
form), SGD and Adam train one-layer models of three sizes on the characters of the story world.
All start from the same weights and see the same batches in the same order. Each runs on one core
until it has used the budget of token evaluations (a token forward is 1, forward and backward 3)
and the seconds of that core. Before the race, each method tries six settings, three step sizes and
two batch sizes, with a quarter of both budgets and a seed of its own; the best one races. The loss
is measured on stories that nobody trained on.

With `--shapes`, another race: who finds the better architecture and hyperparameters for a small GPT
that is trained for a fraction of a second, evolution or random search? Nine choices (step size,
rows, width, layers, heads, hidden width, activation, positions, token shift), each method makes the
same number of trainings, and the winners are trained again with another seed, because the best of
many trainings is lucky, too.

The last line is JSON; `value` is how many nats per token the evolution strategy is behind Adam at
the end of the budget of token evaluations, in the largest model (median of seeds), and with
`--shapes` how many nats the evolved winner is ahead of that of random search. It has no bar:
it is an answer, not an aim. `--json FILE` writes all curves, for the lesson; what the file has
already, of other widths and methods, stays in it.
"""

import argparse
import datetime
import json
import math
import platform
import statistics
import time
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from llm_course.core import atomic_write
from llm_course.evolve.population import population_loss
from llm_course.evolve.race import gradient_step, search_step, trace_loss
from llm_course.evolve.runs import evolve, score_one_by_one
from llm_course.evolve.search import GA, HillClimb, RandomSearch
from llm_course.evolve.vectors import flatten_model
from llm_course.evolve.cma import CMAES
from llm_course.evolve.strategies import ES
from llm_course.model.block import Style
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.text import CharTokenizer
from llm_course.train.runner import keep_memory
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
    start = flatten_model(model)
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

    points = trace_loss(
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
        n = len(flatten_model(make_model(text, width, 0)))
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


GENES = {  # name -> a number from 0 to 1 becomes a choice
    "step size": lambda u: 0.001 * 300**u,
    "rows": lambda u: round(2 * 32**u),
    "width": lambda u: 8 * (1 + int(8 * u)),
    "layers": lambda u: 1 + int(3 * u),
    "heads": lambda u: (1, 2, 4)[int(3 * u)],
    "hidden": lambda u: 1 + int(4 * u),
    "activation": lambda u: ("gelu", "relu2", "swiglu")[int(3 * u)],
    "position": lambda u: ("none", "learned", "rope")[int(3 * u)],
    "shift": lambda u: u >= 0.5,
}


def express(vector) -> dict:
    "The choices of a vector of numbers that are normally distributed in a random search."
    shares = torch.special.ndtr(vector).clamp(max=1 - 1e-6).tolist()
    return {name: rule(u) for (name, rule), u in zip(GENES.items(), shares)}


def train_shape(text, genes: dict, seconds: float, seed: int) -> float:
    "Loss on unseen stories after so many seconds of one core."
    style = Style("rms-plain", genes["position"], genes["activation"], shift=genes["shift"])
    torch.manual_seed(seed)
    width, batch = genes["width"], text.batches(genes["rows"], seed)
    heads = genes["heads"], None, width * genes["hidden"]
    model = GPT(
        GPTConfig(text.tokenizer.vocab_size, CONTEXT, width, genes["layers"], *heads, style)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=genes["step size"])
    begun, step, left = time.process_time(), 0, 1.0
    while left > 0:
        tokens, targets = batch(step)
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = genes["step size"] * left
        optimizer.step()
        step, left = step + 1, 1 - (time.process_time() - begun) / seconds
    loss = population_loss(model, flatten_model(model)[None], *text.valid).item()
    return loss if math.isfinite(loss) else 99.0


def search_shapes(text, method: str, trainings: int, seconds: float, seed: int) -> dict:
    "All losses in the order of training, the best choices, and their loss with other seeds."
    tried = []  # (loss, numbers)

    def score(vector):
        loss = round(train_shape(text, express(vector), seconds, seed), 4)
        tried.append((loss, vector.clone()))
        return -loss

    first = trainings if method == "random search" else trainings // 3
    search = RandomSearch(torch.zeros(len(GENES)), first, 1.0, seed)
    evolve(search, score_one_by_one(score), generations=1)
    if method == "evolution":  # the first third are the ancestors of the others
        search = GA(torch.zeros(len(GENES)), first, 0.5, pressure=0.25, seed=seed)
        search.memory |= {
            "pool": torch.stack([vector for _, vector in tried]),
            "scores": torch.tensor([-loss for loss, _ in tried]),
        }
        evolve(search, score_one_by_one(score), evaluations=trainings - first)
    losses = [loss for loss, _ in tried]
    genes = express(tried[losses.index(min(losses))][1])
    again = [round(train_shape(text, genes, seconds, 1000 + s), 4) for s in range(3)]
    return {"method": method, "seed": seed, "losses": losses, "best": genes, "again": again}


def race_shapes(args) -> None:
    "Evolution and random search look for a small GPT."
    text, found = Text(), []
    for seed in args.seeds:
        for method in ("random search", "evolution"):
            found.append(search_shapes(text, method, args.trainings, args.seconds, seed))
            row = found[-1]
            print(
                f"seed {seed}  {method:14s} {min(row['losses']):.3f}, again "
                f"{statistics.median(row['again']):.3f}  {row['best']}",
                flush=True,
            )
    end = {
        m: statistics.median([statistics.median(r["again"]) for r in found if r["method"] == m])
        for m in ("random search", "evolution")
    }
    if args.json:
        facts = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        seeds = " ".join(map(str, args.seeds))
        command = (
            f"python experiments/race.py --shapes --seeds {seeds} --trainings "
            f"{args.trainings} --seconds {args.seconds:g}"
        )
        facts["shapes"] = {"made": made_by(command), "seconds": args.seconds, "results": found}
        save(args.json, facts)
    gap = round(end["random search"] - end["evolution"], 3)
    print(json.dumps({"name": "race", "value": gap, "unit": "nats per token", "bar": None}))


def made_by(command: str) -> dict:
    "Where and when figures were made."
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": f"one core of {platform.machine()}, torch {torch.__version__}",
    }


def save(path: Path, facts: dict) -> None:
    "Write a file for the lesson."
    with atomic_write(path, "w") as f:
        json.dump(facts, f, separators=(",", ":"))


def write(args, found: list) -> None:
    "Put the curves into the file, beside those of other widths."
    facts = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    rows = {(r["parameters"], r["method"]): r for r in facts.get("results", []) + found}
    results = [rows[key] for key in sorted(rows, key=lambda k: (k[0], list(STEPS).index(k[1])))]
    seeds = " ".join(map(str, args.seeds))
    command = (
        f"python experiments/race.py --seeds {seeds} --tokens {args.tokens} "
        f"--seconds {args.seconds:g}"
    )
    facts |= {"made": made_by(command), "tokens": args.tokens, "seconds": args.seconds}
    save(args.json, {**facts, "results": results})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--trainings", type=int, default=48)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--methods", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.seconds = args.seconds or (0.3 if args.shapes else 2.0)
    torch.set_num_threads(1)
    keep_memory()
    if args.shapes:
        return race_shapes(args)
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
