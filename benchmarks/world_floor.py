"""The story world: how close a small GPT comes to the best loss within two million tokens.

    python benchmarks/world_floor.py [--tokens 2] [--seeds 3] [--threads 2] [--save FOLDER]

A tokenizer is trained on some stories of the world and on what its people say, and a GPT in the
course's default style, as `llm-course build` trains it by default, on others, each of which it sees
once. Tokens are what a loss costs, on any machine; the seconds are those of training alone, for
information. Model and world give their loss on the same unseen stories; the difference is the
excess over the floor, which no model can beat. It is shown after each quarter of the tokens: on
the way the learning rate is still high, so a run that ends there does better. --save keeps the
tokenizer and the best of the models, in bfloat16.

The last line is JSON; `value` is the median excess of the seeds after all tokens, in nats per
token, and the bar is 0.02.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from llm_course.data.batches import DocumentBatches
from llm_course.data.shards import memory_shards
from llm_course.model.files import save_model
from llm_course.model.gpt import GPT, GPTConfig, count_params
from llm_course.tokens.bpe import BPETokenizer
from llm_course.train.floor import floor_excess, shrink_embedding
from llm_course.train.loop import TrainConfig, train
from llm_course.train.transfer import rates_for_width, sizes_for_depth
from llm_course.world import World
from llm_course.world.talk import Talk

VOCAB_SIZE, DEPTH, CONTEXT = 2880, 4, 224  # each word of stories and talk is one token


def prepare(n_stories: int, n_unseen: int, vocab_size: int = VOCAB_SIZE) -> tuple:
    "The world, a tokenizer of it, stories to train on and stories to judge by."
    world = World(seed=0)
    said = [" " + m["content"] for c in Talk(world).conversations(4000) for m in c]
    tokenizer = BPETokenizer.train(world.sample(4000, seed=10) + said, vocab_size)
    return world, tokenizer, world.sample(n_stories, seed=11), world.sample(n_unseen, seed=12)


def run(seed: int, stories: list, tokenizer, world, unseen: list, args) -> tuple:
    "Train once: what came out, and the model."
    shards, size = memory_shards(stories, tokenizer), sizes_for_depth(DEPTH)
    batch_size = args.batch_size or size.batch_size
    batches = DocumentBatches(shards, batch_size, CONTEXT, seed, pack=False)
    steps = round(1e6 * args.tokens / (shards.n_tokens / len(stories) * batch_size))
    torch.manual_seed(seed)
    width, heads = args.d_model or size.d_model, args.n_heads or size.n_heads
    model = GPT(GPTConfig(tokenizer.vocab_size, CONTEXT, width, args.n_layers, heads))
    shrink_embedding(model)
    rates = rates_for_width(width) | {k: v for k, v in vars(args).items() if k[:2] == "lr" and v}
    looks, start = [], time.perf_counter()

    def look(trainer):
        nonlocal start
        seconds = time.perf_counter() - start
        result = floor_excess(model, tokenizer, world, unseen)
        looks.append((trainer.progress.tokens, result))
        print(f"{seed:4} {trainer.step:6} {trainer.progress.tokens / 1e6:8.2f} {seconds:8.1f} "
              f"{result.model:7.4f} {result.floor:7.4f} {result.excess:7.4f}", flush=True)
        start = time.perf_counter() - seconds

    train(model, batches, TrainConfig(steps, **rates), eval_every=-(steps // -4), watch=look)
    return [result.excess for _, result in looks], time.perf_counter() - start, model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=float, default=2, help="to learn from, in millions")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--unseen", type=int, default=1000, help="stories to judge by")
    parser.add_argument("--batch-size", type=int, help="stories in a step; by default the dial's")
    parser.add_argument("--lr", type=float, help="AdamW's; by default what suits the width")
    parser.add_argument("--lr-matrix", type=float, help="Muon's")
    parser.add_argument("--d-model", type=int, help="by default the dial's")
    parser.add_argument("--n-layers", type=int, default=DEPTH)
    parser.add_argument("--n-heads", type=int, help="by default the dial's")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--save", type=Path, help="a folder for tokenizer and model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    n_stories = round(8000 * args.tokens)  # each is seen once, at most
    world, tokenizer, stories, unseen = prepare(n_stories, args.unseen, args.vocab_size)
    print("seed  steps M tokens  seconds   model   floor  excess")
    results = [run(seed, stories, tokenizer, world, unseen, args) for seed in range(args.seeds)]
    value = statistics.median(excesses[-1] for excesses, *_ in results)
    model = min(results, key=lambda result: result[0][-1])[-1]
    seconds = statistics.median(seconds for _, seconds, _ in results)
    print(f"{count_params(model):,} parameters; median excess {value:.4f} nats per token")
    if args.save:
        tokenizer.save(args.save / "story.bpe")
        save_model(model, args.save / "story.safetensors", torch.bfloat16)
    row = {"name": "world_floor", "value": round(value, 4), "unit": "nats per token", "bar": 0.02,
           "tokens": 1e6 * args.tokens, "seconds": round(seconds, 1), "threads": args.threads,
           "excesses": [[round(x, 4) for x in excesses] for excesses, *_ in results]}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
