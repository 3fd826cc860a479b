"""The tables behind the lesson on hyperparameters: several hundred short trainings.

    python experiments/tune.py                      repeat a few of them, and compare
    python experiments/tune.py --measure [NAME...]  measure all, or some parts, anew

The task is the lesson's: predict the first 16 tokens of stories of the story world, one word a
token. Each number is the loss on 500 unseen openings, in nats per token, of one small GPT trained
from one seed; nothing is averaged here. The parts:

    search   learning rate x warm-up, AdamW
    batch    steps until the loss is 1.2, batch size x learning rate, AdamW, constant rate
    clip     learning rate x longest gradient, AdamW
    steps    learning rate x length of the run, AdamW
    depth    Muon's rate x number of layers
    adamw, muon, tables, embed, head
             a learning rate x width: AdamW's for everything; Muon's for the matrices; and beside
             Muon, AdamW's for embedding and head together, for the embedding, for the head
    muon256, tables256
             two of them at width 256

One thread is best: the models are too small for two. All parts take about twenty minutes on a
laptop; each is kept in the file as soon as it is there. Without --measure, one training of most
parts is repeated. The last line is JSON; `value` is the largest difference from the file in nats
per token, and the bar is 0.05, what another machine's rounding may do in 80 steps.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from record import chosen_parts, measure_parts
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.text import WordTokenizer
from llm_course.train.loop import TrainConfig, Trainer, evaluate
from llm_course.train.runner import keep_memory
from llm_course.train.optim import AdamW, Muon
from llm_course.train.recipes import OptimizerGroup, split_params
from llm_course.train.tune import RowBatches
from llm_course.world import World

FILE = Path(__file__).parent.parent / "llm_course" / "assets" / "tune.json"
SEEDS, TOKENS = (0, 1, 2), 16


def openings(n: int, seed: int) -> list:
    "The first tokens of `n` stories, as text."
    stories = [story[:300] for story in World(seed=0).sample(n, seed)]
    split = WordTokenizer.train(stories)
    return [split.decode(split.encode(story)[:TOKENS]) for story in stories]


def load() -> tuple:
    "Vocabulary size, rows to train on, rows to judge by."
    texts, unseen = openings(4000, seed=1), openings(500, seed=2)
    words = WordTokenizer.train(texts)
    table = torch.tensor([[words.end_id, *words.encode(text)] for text in texts])
    return words.vocab_size, table, torch.tensor([[words.end_id, *words.encode(t)] for t in unseen])


VOCAB, SEEN, UNSEEN = load()
VALID = [(UNSEEN[:, :-1], UNSEEN[:, 1:], None)]


def gpt(seed: int, d_model: int = 32, n_layers: int = 1) -> GPT:
    "A small GPT; heads are 16 wide."
    torch.manual_seed(seed)
    return GPT(GPTConfig(VOCAB, TOKENS, d_model, n_layers, max(2, d_model // 16)))


def loss_of(seed, d_model=32, n_layers=1, steps=80, lr_matrix=None, make=None, **settings):
    "Train one model; its loss on unseen openings, or None if it broke."
    config = TrainConfig(steps, lr_matrix=lr_matrix, precision="float32", **settings)
    trainer = Trainer(gpt(seed, d_model, n_layers).train(), RowBatches(SEEN, 16, seed), config)
    if make:
        trainer.optimizer = make(trainer.model)
    try:
        for _ in range(steps):
            trainer.take_step()
    except FloatingPointError:
        return None
    return round(evaluate(trainer.model, VALID), 4)


def steps_to(target: float, batch_size: int, lr: float, seed: int, most: int):
    "Steps until the loss on unseen openings is `target`, to 5 %; None if it takes too long."
    config = TrainConfig(10**6, lr_matrix=None, lr=lr, schedule="constant", precision="float32")
    trainer = Trainer(gpt(seed).train(), RowBatches(SEEN, batch_size, seed), config)
    look, before = 10, (0, math.log(VOCAB))
    while trainer.progress.step < most:
        trainer.take_step()
        step = trainer.progress.step
        if step >= look:
            loss, look = evaluate(trainer.model, VALID), math.ceil(1.05 * step)
            if loss <= target:
                share = (before[1] - target) / (before[1] - loss)
                return round(before[0] + share * (step - before[0]), 1)
            before = step, loss
    return None


def search() -> dict:
    "Learning rate x warm-up."
    rates, warmups = [round(10 ** (k / 3 - 3), 5) for k in range(10)], [0.0, 0.05, 0.1, 0.2, 0.4]
    losses = [[[loss_of(s, lr=r, warmup=w) for s in SEEDS] for w in warmups] for r in rates]
    return {"lr": rates, "warmup": warmups, "loss": losses}


def clip() -> dict:
    "Learning rate x longest gradient."
    rates, lengths = [0.02154, 0.04642, 0.1], [0.25, 0.5, 1.0, 2.0, 4.0]
    losses = [[[loss_of(s, lr=r, clip=c) for s in SEEDS] for c in lengths] for r in rates]
    return {"lr": rates, "clip": lengths, "loss": losses}


def batch() -> dict:
    "Steps to a loss of 1.2, for each batch size and rate."
    sizes, rates = [2, 4, 8, 16, 32, 64, 128], [0.004 * 2**k for k in range(7)]
    most = {size: min(1500, 16_000 // size) for size in sizes}
    steps = [[[steps_to(1.2, b, r, s, most[b]) for s in SEEDS] for r in rates] for b in sizes]
    return {"batch_size": sizes, "lr": rates, "target": 1.2, "steps": steps}


def three_rates(model: GPT, matrix: float, embed: float, head: float) -> OptimizerGroup:
    "Muon for the matrices; AdamW for the embedding and for the head, each with its own rate."
    matrices, others = split_params(model)
    own = {id(model.embed.weight), id(model.head.weight)}
    assert {id(p) for p in others} == own
    tables = AdamW([model.embed.weight], embed), AdamW([model.head.weight], head)
    return OptimizerGroup(Muon(matrices, matrix), *tables)


RATES = {  # the lowest, and how many, each twice the one before
    "adamw": (0.001, 8),
    "muon": (0.0075, 6),
    "tables": (0.00125, 8),
    "head": (0.00125, 8),
    "embed": (0.005, 8),
}


def width(name: str, widths=(32, 64, 128), rates=None) -> dict:
    "One rate x width; the other rates, if there are any, are near their best."
    rates = rates or [RATES[name][0] * 2**k for k in range(RATES[name][1])]
    near = 0.03 * 64

    def settings(rate: float, d: int) -> dict:
        "What `loss_of` is called with."
        if name == "adamw":
            return {"lr": rate}
        if name == "muon":
            return {"lr_matrix": rate, "lr": 0.02 * math.sqrt(64 / d)}
        if name == "tables":
            return {"lr_matrix": 0.06, "lr": rate}
        both = {"embed": 0.03, "head": near / d, name: rate}
        return {"make": lambda model: three_rates(model, 0.06, both["embed"], both["head"])}

    losses = [[[loss_of(s, d, 2, **settings(r, d)) for s in SEEDS] for r in rates] for d in widths]
    return {"d_model": list(widths), "lr": rates, "loss": losses}


def wide(name: str) -> dict:
    "The same at width 256, near the best."
    first = {"muon": 0.015, "tables": 0.0025}[name]
    return width(name, (256,), [first * 2**k for k in range(4)])


def depth() -> dict:
    "Muon's rate x layers."
    layers, rates = [1, 2, 4], [0.0075 * 2**k for k in range(6)]
    losses = [
        [[loss_of(s, 64, n, lr_matrix=r, lr=0.02) for s in SEEDS] for r in rates] for n in layers
    ]
    return {"n_layers": layers, "lr": rates, "loss": losses}


def steps() -> dict:
    "Learning rate x length of the run."
    lengths, rates = [40, 80, 160, 320], [0.004 * 2**k for k in range(7)]
    losses = [[[loss_of(s, steps=n, lr=r) for s in SEEDS] for r in rates] for n in lengths]
    return {"steps": lengths, "lr": rates, "loss": losses}


PARTS = {"search": search, "clip": clip, "batch": batch, "steps": steps, "depth": depth}
PARTS |= {name: partial(width, name) for name in ("adamw", "muon", "tables", "embed", "head")}
PARTS |= {f"{name}256": partial(wide, name) for name in ("muon", "tables")}


def check(tables: dict) -> float:
    "Repeat some trainings of the file; the largest difference."
    search, clip, steps = tables["search"], tables["clip"], tables["steps"]
    adamw, muon, depth = tables["adamw"], tables["muon"], tables["depth"]
    pairs = [
        (search["loss"][5][1][0], loss_of(0, lr=search["lr"][5], warmup=search["warmup"][1])),
        (clip["loss"][0][0][1], loss_of(1, lr=clip["lr"][0], clip=clip["clip"][0])),
        (steps["loss"][0][3][2], loss_of(2, steps=steps["steps"][0], lr=steps["lr"][3])),
        (adamw["loss"][1][4][0], loss_of(0, 64, 2, lr=adamw["lr"][4])),
        (muon["loss"][1][2][1], loss_of(1, 64, 2, lr_matrix=muon["lr"][2], lr=0.02)),
        (depth["loss"][0][3][2], loss_of(2, 64, 1, lr_matrix=depth["lr"][3], lr=0.02)),
    ]
    for before, now in pairs:
        print(f"measured before {before:.4f}, now {now:.4f}")
    return max(abs(before - now) for before, now in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs="*", metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--file", type=Path, default=FILE)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    names = chosen_parts(parser, chosen.measure, PARTS)
    tables = measure_parts(chosen.file, PARTS, names, "python experiments/tune.py --measure")
    worst = round(check(tables), 4)
    print(json.dumps({"name": "tune", "value": worst, "unit": "nats per token", "bar": 0.05}))


if __name__ == "__main__":
    main()
