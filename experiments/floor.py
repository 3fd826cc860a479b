"""What the story world's model learns last: the excess of each kind of word, on the way.

    python experiments/floor.py [--tokens 1.5] [--file llm_course/assets/floor.json]

The model of `benchmarks/world_floor.py` is trained twice from one seed: once with first embeddings
as the style draws them, spread 1, and once with a spread of 0.1. After each eighth of the tokens it
reads 250 unseen stories, of which the grammar knows why each word stands there: words of the story
itself, something that was named before, a fact about somebody, or somebody's name again. Without
--file the end is compared with what was recorded. The last line is JSON; `value` is the excess
that the smaller start saves, in nats per token, and the bar is 0.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch
import torch.nn.functional as F

from record import made_by
from llm_course.core import asset, atomic_write
from llm_course.data.batches import DocumentBatches
from llm_course.data.shards import memory_shards
from llm_course.evaluate.history import find_owners
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.train.floor import shrink_embedding
from llm_course.train.loop import TrainConfig, train
from llm_course.train.transfer import rates_for_width, sizes_for_depth
from llm_course.world import World
from llm_course.world.grammar import DrawPart, ShowPart

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from world_floor import CONTEXT, DEPTH, prepare  # noqa: E402

KINDS = ["story", "fact", "thing again", "name again"]


def kind_of(part) -> str:
    "Why a word of this part stands where it stands."
    if not isinstance(part, ShowPart) or isinstance(part, DrawPart) or "-" in part.path:
        return "story"
    name, *relations = part.path.split(".")
    if relations:
        return "story" if relations[-1] in ("he", "him", "his") else "fact"
    return "name again" if name in "abcde" else "thing again"


def marked_stories(world: World, tokenizer, n: int, seed: int = 12) -> list:
    "Token ids, the kind of each, and what each costs a reader who knows everything."
    rng, rows = random.Random(seed), []
    for _ in range(n):
        parts, texts, _ = zip(*world.choices(rng))
        kinds, ids = [kind_of(part) for part in parts], tokenizer.encode("".join(texts))
        pieces = [tokenizer.decode([i]) for i in ids]
        of = [kinds[i] for i in find_owners(pieces, texts)]
        rows.append((ids, [*of, "story"], torch.tensor(world.surprises(pieces))))
    return rows


@torch.no_grad()
def excess_by_kind(model: GPT, tokenizer, rows: list) -> dict:
    "Nats per token of all tokens, kind by kind; they add up to the excess."
    total, count = dict.fromkeys(KINDS, 0.0), 0
    model.eval()
    for ids, kinds, floor in rows:
        logits = model(torch.tensor([[tokenizer.end_id, *ids]]))[0]
        nats = F.cross_entropy(logits, torch.tensor([*ids, tokenizer.end_id]), reduction="none")
        for kind, x in zip(kinds, (nats - floor).tolist()):
            total[kind] += x
        count += len(kinds)
    model.train()
    return {kind: round(x / count, 5) for kind, x in total.items()}


def run(std: float, tokens: float, world, tokenizer, stories: list, rows: list) -> list:
    "Train once; what was seen at each look."
    size, shards = sizes_for_depth(DEPTH), memory_shards(stories, tokenizer)
    batches = DocumentBatches(shards, size.batch_size, CONTEXT, pack=False)
    steps = round(1e6 * tokens * len(stories) / shards.n_tokens / size.batch_size)
    torch.manual_seed(0)
    sizes = size.d_model, DEPTH, size.n_heads
    model = shrink_embedding(GPT(GPTConfig(tokenizer.vocab_size, CONTEXT, *sizes)), std)
    looks = []

    def look(trainer):
        found = excess_by_kind(model, tokenizer, rows)
        looks.append({"tokens": trainer.progress.tokens, **found})
        print(f"{std:4} {looks[-1]['tokens'] / 1e6:6.2f} {sum(found.values()):7.4f}  "
              + "  ".join(f"{k} {x:.4f}" for k, x in found.items()), flush=True)

    config = TrainConfig(steps, **rates_for_width(size.d_model))
    train(model, batches, config, eval_every=-(steps // -8), watch=look)
    return looks


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=float, default=1.5, help="to learn from, in millions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--file", type=Path, help="where to record it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    world, tokenizer, stories, _ = prepare(round(8000 * args.tokens), 0)
    rows = marked_stories(world, tokenizer, 250)
    shares = [sum(kinds.count(kind) for _, kinds, _ in rows) for kind in KINDS]
    runs = [{"std": std, "looks": run(std, args.tokens, world, tokenizer, stories, rows)}
            for std in (1.0, 0.1)]
    record = {**made_by("python experiments/floor.py"),
              "share": {k: round(n / sum(shares), 4) for k, n in zip(KINDS, shares)}, "runs": runs}
    if args.file:
        with atomic_write(args.file, "w") as f:
            f.write(json.dumps(record, indent=1))
    ends = [sum(r["looks"][-1][k] for k in KINDS) for r in runs]
    if not args.file:
        before = json.loads(asset("floor.json").read_text(encoding="utf-8"))["runs"]
        print("recorded:", [round(sum(r["looks"][-1][k] for k in KINDS), 4) for r in before])
    row = {"name": "floor", "value": round(ends[0] - ends[1], 4), "unit": "nats per token",
           "bar": 0, "ends": [round(x, 4) for x in ends]}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
