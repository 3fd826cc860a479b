"""The story world: how close a small GPT comes to the best loss in 90 seconds on two cores.

    python benchmarks/world_floor.py [--seconds 90] [--seeds 3] [--threads 2] [--save FOLDER]

A tokenizer is trained on some stories of the world and on what its people say, and a GPT in the course's default style, with
the course's training loop and default settings, on others, each of which it sees once. The clock
runs during training only: sampling and encoding the stories comes before it. Then model and world
give their loss on the same unseen stories; the difference is the excess over the floor, which no
model can beat. --save keeps the tokenizer and the best of the models, in bfloat16.

The last line is JSON; `value` is the median excess of the seeds, in nats per token, and the bar
is 0.02.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from llm_course.data.batches import DocumentBatches
from llm_course.data.shards import memory_shards
from llm_course.model.files import save_model
from llm_course.model.gpt import GPT, GPTConfig, count_params
from llm_course.world.talk import Talk
from llm_course.tokens.bpe import BPETokenizer
from llm_course.train.floor import floor_excess
from llm_course.train.loop import TrainConfig, train
from llm_course.world import World

VOCAB_SIZE, CONTEXT, BATCH = 2880, 224, 16  # each word of stories and talk is one token


def neighbours(stories: list, seed: int) -> list:
    "Shuffle so that each batch holds stories of similar length: little padding, random otherwise."
    rng = random.Random(seed)
    stories = rng.sample(stories, len(stories))
    batches = []
    for start in range(0, len(stories), 16 * BATCH):
        some = sorted(stories[start : start + 16 * BATCH], key=len)
        batches += [some[i : i + BATCH] for i in range(0, len(some), BATCH)]
    rng.shuffle(batches)
    return [story for batch in batches if len(batch) == BATCH for story in batch]


def run(seed: int, stories: list, tokenizer, world, unseen: list, args) -> tuple:
    "Train once: what came out, and the model."
    shards = memory_shards(neighbours(stories, seed), tokenizer)
    batches = DocumentBatches(shards, BATCH, CONTEXT, pack=False, shuffle=False)
    torch.manual_seed(seed)
    sizes = {"d_model": args.d_model, "n_layers": args.n_layers, "n_heads": args.n_heads}
    model = GPT(GPTConfig(tokenizer.vocab_size, CONTEXT, **sizes))
    config = TrainConfig(minutes=args.seconds / 60)
    start = time.perf_counter()
    progress = train(model, batches, config, eval_every=500, watch=None)
    seconds = time.perf_counter() - start
    result = floor_excess(model, tokenizer, world, unseen)
    epochs = batches.place["epoch"] + batches.place["row"] / (shards.n_tokens / 200)
    print(
        f"{seed:4} {seconds:8.1f} {progress.step:6} {progress.tokens / 1e6:8.2f} {epochs:6.2f} "
        f"{result.model:7.4f} {result.floor:7.4f} {result.excess:7.4f}",
        flush=True,
    )
    return result, model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stories", type=int, default=50_000, help="to train on, each seen once")
    parser.add_argument("--unseen", type=int, default=1000, help="to judge by")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--n-layers", type=int, default=4)
    parser.add_argument("--n-heads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--save", type=Path, help="a folder for tokenizer and model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    world = World(seed=0)
    said = [" " + m["content"] for c in Talk(world).conversations(4000) for m in c]
    tokenizer = BPETokenizer.train(world.sample(4000, seed=10) + said, args.vocab_size)
    stories, unseen = world.sample(args.stories, seed=11), world.sample(args.unseen, seed=12)
    print(
        f"{'seed':>4} {'seconds':>8} {'steps':>6} {'M tokens':>8} {'epochs':>6} "
        f"{'model':>7} {'floor':>7} {'excess':>7}"
    )
    results = [run(seed, stories, tokenizer, world, unseen, args) for seed in range(args.seeds)]
    value = statistics.median(result.excess for result, _ in results)
    best, model = min(results, key=lambda pair: pair[0].excess)
    print(f"{count_params(model):,} parameters; median excess {value:.4f} nats per token")
    if args.save:
        tokenizer.save(args.save / "story.bpe")
        save_model(model, args.save / "story.safetensors", torch.bfloat16)
    print(
        json.dumps(
            {
                "name": "world_floor",
                "value": round(value, 4),
                "unit": "nats per token",
                "bar": 0.02,
                "excesses": [round(result.excess, 4) for result, _ in results],
                "floor": round(best.floor, 4),
                "seconds": args.seconds,
                "threads": args.threads,
            }
        )
    )


if __name__ == "__main__":
    main()
