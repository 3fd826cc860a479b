"""Six ways to read four times as far: what a planted word costs, by the length of the text.

    python experiments/context.py [--file llm_course/assets/context.json]

The story model reads a few interrupted stories of at most 224 tokens (24 steps; three trainings, on
other stories each), and is then asked for words that stand before 0 to 60 sentences of gossip, in
texts of up to 740 tokens: as it is, with a window, and with four kinds of stretched rotation. Each
training is asked ten texts of its own for each length, the same ones in all six ways. Written down
are the nats for a planted word and the nats per token above the floor, one number a training.
Without --file the first training is repeated and compared with what was recorded. The last line is
JSON; `value` is what a planted word costs as it is, at the greatest length (mean of the trainings).
"""

import argparse
import json
import statistics
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from record import made_by
from llm_course.core import asset, atomic_write
from llm_course.data.batches import DocumentBatches
from llm_course.data.shards import memory_shards
from llm_course.generate.context import interrupted_stories, ntk_base, recall_cost, stretch_context
from llm_course.model.files import load_model
from llm_course.model.rotation import RopeScaling
from llm_course.tokens.exchange import load_tokenizer
from llm_course.train.loop import TrainConfig, train

T, LONG, GOSSIP, TEXTS = 224, 896, (0, 2, 5, 15, 35, 60), 10
SEEDS = (50, 60, 70)  # of what is taught; asked are the texts of seed - 47: 3, 13, 23


def all_ways(model) -> dict:
    "The same weights, read in six ways."
    d_head = model.config.d_model // model.config.n_heads
    base = ntk_base(model.config.style.rope_base, d_head, 4)
    ways = {"as it is": {}, "window": {"window": T},
            "linear": {"scaling": RopeScaling("linear", 4, T)}, "NTK": {"rope_base": base},
            "dynamic NTK": {"scaling": RopeScaling("dynamic", 1, T)},
            "YaRN": {"scaling": RopeScaling("yarn", 4, T)}}
    return {name: stretch_context(model, LONG, **how) for name, how in ways.items()}


def gossiping(tokenizer, seed: int):
    "The story model, trained a little on interrupted stories of less than T tokens."
    told = [text for n in range(4) for text in interrupted_stories(n).sample(60, seed=seed + n)]
    told = [text for text in told if len(tokenizer.encode(text)) < T]
    model = load_model(asset("story.safetensors"))
    batches = DocumentBatches(memory_shards(told, tokenizer), 8, T, pack=False)
    train(model, batches, TrainConfig(24, lr_matrix=0.005, lr=0.002), watch=None)
    return model.eval()


def measure(seed: int) -> dict:
    "One training: name -> [(nats for a planted word, above the floor, tokens)] by length."
    tokenizer = load_tokenizer(asset("story.bpe"))
    found = {}
    for name, model in all_ways(gossiping(tokenizer, seed)).items():
        found[name] = [recall_cost(model, tokenizer, n, TEXTS, seed - 47) for n in GOSSIP]
        print(f"{seed} {name:12}", "".join(f"{cost:7.2f}" for cost, _, _ in found[name]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="measure all trainings and write this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(seed) for seed in (SEEDS if args.file else SEEDS[:1])]
    if args.file:
        part = lambda i: {way: [[round(row[way][n][i], 4) for row in rows]
                                for n in range(len(GOSSIP))] for way in rows[0]}
        record = {**made_by("python experiments/context.py --file llm_course/assets/context.json"),
                  "texts": TEXTS, "gossip": GOSSIP, "planted": part(0), "above": part(1),
                  "tokens": part(2)["as it is"]}
        with atomic_write(args.file, "w") as f:
            f.write(json.dumps(record))
    else:
        known = json.loads(asset("context.json").read_text(encoding="utf-8"))["planted"]
        off = [abs(known[way][n][0] - rows[0][way][n][0]) for way in known
               for n in range(len(GOSSIP))]
        print(f"largest difference from what was recorded: {max(off):.3f}")
    value = statistics.mean(row["as it is"][-1][0] for row in rows)
    print(json.dumps({"name": "context-record", "value": round(value, 2),
                      "unit": "nats for a planted word at 740 tokens, as it is"}))


if __name__ == "__main__":
    main()
