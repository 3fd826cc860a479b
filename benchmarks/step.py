"""What a training step costs beside its own matrix products, quiet and on a busy machine.

    python benchmarks/step.py [--busy] [--precision auto] [--threads 2] [--rounds 15]

The model is the one that `llm-course build` trains by default (4 layers, 2 heads, width 128, a
vocabulary of 2,880; batches of 16 rows of 224 tokens from the story world) and the step is the
training loop's: batch to device, forward, loss, backward, clipping, Muon and AdamW. Its time is
put over that of the model's products and attention alone: forward and backward, of the same
shapes, in the same precision, with as many threads. Everything else is overhead: what moves
memory, what is computed for padding, and the products of the optimiser. Both sides take turns in
one run; medians count.

With --busy, it also starts one process per core that does nothing but count, and measures again.

The last line is JSON; `value` is the ratio when nothing else runs, and the bar is 2.0.
`busy_share` is the speed beside the busy processes over the quiet one (bar: 0.4).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from llm_course.core import set_seed
from llm_course.data.batches import DocumentBatches, one_pass
from llm_course.data.shards import memory_shards
from llm_course.model.attention import attend
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.threads import StepPace
from llm_course.tokens.bpe import BPETokenizer
from llm_course.train.loop import TrainConfig, Trainer
from llm_course.train.precision import PRECISIONS
from llm_course.train.runner import keep_memory
from llm_course.world import World
from llm_course.world.talk import Talk

CONFIG, BATCH = GPTConfig(2880, 224, 128, 4, 2), 16


class Cycle:
    "The same few batches, over and over."

    def __init__(self, batches: list):
        self.some, self.endless = batches, itertools.cycle(batches)

    def __next__(self):
        return next(self.endless)


def _words(world: World) -> list:
    "Texts with every word of the world."
    said = [" " + m["content"] for c in Talk(world).conversations(4000) for m in c]
    return world.sample(4000, seed=10) + said


def make_trainer(precision: str) -> Trainer:
    "The default model and its training loop, ready to step."
    world = World(0)
    tokenizer = BPETokenizer.train(_words(world), CONFIG.vocab_size)
    shards = memory_shards(world.sample(600, seed=11), tokenizer)
    batches = DocumentBatches(shards, BATCH, CONFIG.context_length)
    some = list(itertools.islice(one_pass(batches), 8))
    set_seed(0)
    model = GPT(CONFIG).train()
    config = TrainConfig(steps=1_000_000, schedule="constant", precision=precision)
    return Trainer(model, Cycle(some), config)


class Products:
    "The products of a step, for an average batch without its padding, and nothing between them."

    def __init__(self, batches: list, dtype: torch.dtype):
        c, (B, T) = CONFIG, batches[0][0].shape
        n = round(statistics.mean(int(mask.sum()) for *_, mask in batches))
        T = round(statistics.mean(int(mask.any(dim=0).sum()) for *_, mask in batches))
        C, V, L, D = c.d_model, c.vocab_size, c.n_layers, c.d_model // c.n_heads
        shapes = [(C, C)] * 4 * L + [(C, 4 * C), (4 * C, C)] * L + [(C, V)]
        make = lambda *shape: torch.randn(*shape).mul_(0.1).to(dtype)
        given = {s: (make(n, s[0]), make(s[1], s[0]), make(n, s[1])) for s in set(shapes)}
        self.linear = [given[shape] for shape in shapes]
        self.results = [[torch.empty_like(x) for x in given[shape]] for shape in shapes]
        heads = B, c.n_heads, T, D
        self.qkv = [make(*heads).requires_grad_() for _ in range(3)]
        self.gradient = make(*heads)

    def step(self) -> None:
        "Forward and backward."
        for (x, weight, gradient), (dx, dw, y) in zip(self.linear, self.results):
            torch.mm(x, weight.T, out=y)
            torch.mm(gradient, weight, out=dx)
            torch.mm(gradient.T, x, out=dw)
        for _ in range(CONFIG.n_layers):
            torch.autograd.grad(attend(*self.qkv), self.qkv, self.gradient)


def measure(sides: dict, rounds: int) -> dict:
    "The median time of each side in ms; they take turns, and threads are watched as in a job."
    times = {name: [] for name in sides}
    with StepPace() as pace:
        for _ in range(rounds):
            for name, step in sides.items():
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
                pace.after_step(times[name][-1])
    return {name: 1000 * statistics.median(t[2:] or t) for name, t in times.items()}


def instructions() -> str:
    "What this processor has for sixteen bits."
    has = lambda name: bool(getattr(torch.cpu, name, lambda: False)())
    return "AMX" if has("_is_amx_tile_supported") else (
        "bf16" if has("_is_avx512_bf16_supported") else "neither")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--busy", action="store_true", help="also beside one process per core")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    trainer = make_trainer(args.precision)
    products = Products(trainer.batches.some, trainer.dtype)
    sides = {"step": trainer.take_step, "products": products.step}
    loads = {"quiet": measure(sides, args.rounds)}
    if args.busy:
        count = [sys.executable, "-c", "while True: pass"]
        others = [subprocess.Popen(count) for _ in range(os.cpu_count())]
        try:
            loads["busy"] = measure(sides, args.rounds)
        finally:
            for process in others:
                process.kill()
                process.wait()
    dtype = str(trainer.dtype).removeprefix("torch.")
    print(f"{dtype}, {args.threads} threads; instructions for sixteen bits: {instructions()}")
    print(f"{'load':6} {'step ms':>8} {'products ms':>12} {'ratio':>6}")
    for load, ms in loads.items():
        ratio = ms["step"] / ms["products"]
        print(f"{load:6} {ms['step']:8.1f} {ms['products']:12.1f} {ratio:6.2f}")
    quiet, busy = loads["quiet"], loads.get("busy")
    share = round(quiet["step"] / busy["step"], 2) if busy else None
    row = {"name": "step", "value": round(quiet["step"] / quiet["products"], 2), "unit": "ratio",
           "bar": 2.0, "busy_share": share, "busy_bar": 0.4, "precision": dtype,
           "threads": args.threads, "instructions": instructions()}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
