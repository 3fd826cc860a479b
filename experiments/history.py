"""Language models from 1948 to 2023 on one axis: nats above the story world's floor, at equal work.

    python experiments/history.py                        # repeats the n-grams, compares with the record
    python experiments/history.py --file llm_course/assets/history.json     # makes or continues it

The stories are of three of the village's twelve shapes (SHAPES), so that half a minute of training
is enough to get beyond the sentence: with all twelve, after 2,000 stories, no network had learned
anything about words more than 16 tokens back. Twelve models read them, one word a token: n-grams
of order 1 to 5, a network with a window of eight words, RNN, LSTM, GRU, a linear recurrence, a GPT,
and a GPT with experts. All networks are sized so that a token costs them as many operations in
training as it costs the GPT, within 4 %; so equal training FLOPs are equal stories.

Budget "flops": all read STORIES stories once. Budget "seconds": each trains for as long as the GPT
took for these, in seconds that the processor really worked (one thread), going by the median of
its runs so far; a slow model then reads fewer stories and a fast one more. Counting needs no
multiplications and takes a tenth of a second: with "flops" it gets the same stories, with "seconds"
as many as were sampled, MOST.

All are trained by the course's loop in float32, with one plain training step for all (the GPT
without its hand-written gradient): Muon for matrices of linear layers, AdamW for the rest. The one
rate of AdamW was chosen for each kind with another seed (`--tune`, 600 stories, out of RATES).
Each seed has its own stories, order and first weights. Judged by JUDGED unseen stories, of which
the grammar says for each word what it costs the best reader, and which earlier word settles it.

The record is written after each run, and what is in it is not made again. The last line is JSON;
`value` is the trigram's excess over the GPT's at equal FLOPs, and the bar is 1.
"""

import argparse
import datetime
import json
import platform
import re
import statistics
import time
from functools import lru_cache
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch
from torch import nn

from llm_course.core import asset, atomic_write
from llm_course.data.batches import DocumentBatches
from llm_course.data.shards import memory_shards
from llm_course.evaluate.history import excess_by_distance, linked_rows
from llm_course.model.experts import ExpertGPT, ExpertsConfig
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.model.kinds import training_flops
from llm_course.model.neuron import WindowModel
from llm_course.model.ngram import NGram
from llm_course.model.recurrent import RecurrentConfig, RecurrentModel
from llm_course.tokens.text import WordTokenizer
from llm_course.train.floor import shrink_embedding
from llm_course.train.loop import TrainConfig, train
from llm_course.world.grammar import Grammar
from llm_course.world.story import STORY_LISTS, STORY_RULES, make_facts

SHAPES = "lost", "repair", "quarrel"
STORIES, MOST, JUDGED, SEEDS, BATCH, CONTEXT = 3000, 20_000, 120, (0, 1, 2), 8, 224
NGRAMS = [f"{n}-gram" for n in range(1, 6)]
RATES = 0.006, 0.012, 0.024, 0.048, 0.096
LR = dict.fromkeys(("window", "lstm", "gru", "linear", "gpt", "moe"), 0.048) | {"rnn": 0.024}



@lru_cache
def prepare() -> tuple:
    "A village with some of its stories, and a tokenizer for it."
    start = "story: [" + "|".join(f"<{shape}>" for shape in SHAPES) + "]\n"
    rules = re.sub(r"^story: \[.*?\]\n", start, STORY_RULES, count=1, flags=re.S | re.M)
    world = Grammar(rules, STORY_LISTS, make_facts(0))
    return world, WordTokenizer.train(world.sample(4000, seed=10))


@lru_cache(maxsize=1)
def stories_of(seed: int, n: int) -> list:
    "What a run with this seed may learn from."
    return prepare()[0].sample(n, seed=100 + seed)


def make(kind: str, end: int, V: int) -> nn.Module:
    "A model of this kind, of about the GPT's cost per token."
    config = GPTConfig(V, CONTEXT, 64, 2, 2)
    if kind == "window":
        return WindowModel(V, 8, 48, 156, fill=end)
    if kind == "gpt":
        return shrink_embedding(GPT(config))
    if kind == "moe":
        return shrink_embedding(ExpertGPT(config, ExpertsConfig(n_experts=8, top_k=2)))
    width, layers = {"rnn": (164, 1), "lstm": (106, 1), "gru": (118, 1), "linear": (68, 2)}[kind]
    return RecurrentModel(RecurrentConfig(V, kind, width, layers))


def count(kind: str, stories: list) -> tuple:
    "Count an n-gram model: the model, its tokens, and the seconds of counting."
    _, tokenizer = prepare()
    end = tokenizer.end_id
    row = torch.tensor([end] + [i for s in stories for i in (*tokenizer.encode(s), end)])
    start = time.process_time()
    model = NGram(row, tokenizer.vocab_size, int(kind[0]))
    return model, len(row) - 1, time.process_time() - start


def learn(kind: str, seed: int, stories: list, lr: float | None = None) -> tuple:
    "Train a network, each story once: the model, its tokens, and the processor's seconds."
    _, tokenizer = prepare()
    shards = memory_shards(stories, tokenizer)
    batches = DocumentBatches(shards, BATCH, CONTEXT, seed, pack=False)
    torch.manual_seed(seed)
    model = make(kind, tokenizer.end_id, tokenizer.vocab_size)
    config = TrainConfig(len(stories) // BATCH, lr=lr or LR[kind], precision="float32")
    start = time.process_time()
    done = train(nn.Sequential(model), batches, config, eval_every=10**9, watch=None)
    return model, done.tokens, time.process_time() - start


def run(kind: str, seed: int, n: int, rows: list) -> dict:
    "One run, and how it was judged."
    stories = stories_of(seed, MOST)[:n]
    model, tokens, seconds = count(kind, stories) if kind in NGRAMS else learn(kind, seed, stories)
    model.eval()
    groups = excess_by_distance(model, rows)
    total = sum(c for _, c in groups.values())
    return {"kind": kind, "seed": seed, "stories": n, "tokens": tokens,
            "seconds": round(seconds, 2),
            "flops_per_token": training_flops(model, 75),  # words looked back on, on average
            "numbers": sum(p.numel() for p in model.parameters()) if kind not in NGRAMS else
            sum(b.numel() for b in model.buffers()),
            "excess": round(sum(x for x, _ in groups.values()) / total, 5),
            "groups": {k: [round(x, 3), c] for k, (x, c) in sorted(groups.items())}}


def runs_to_make(seeds: list) -> list:
    "Kind, seed, budget; the GPT's at equal FLOPs come first of each seed, since they set the time."
    networks = ["gpt", "lstm", "rnn", "window", "linear", "moe", "gru"]
    wanted = [(k, s, "flops") for s in seeds for k in [*NGRAMS, *networks]]
    return wanted + [(k, s, "seconds") for s in seeds for k in [*NGRAMS, *networks[1:]]]


def read(file: Path) -> dict:
    "The record so far, or an empty one."
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    return {"date": datetime.date.today().isoformat(), "torch": torch.__version__,
            "machine": platform.machine(), "threads": torch.get_num_threads(),
            "command": "python experiments/history.py --file llm_course/assets/history.json",
            "shapes": SHAPES, "stories": STORIES, "judged": JUDGED, "rates": LR, "runs": []}


def stories_for(kind: str, budget: str, runs: list) -> int:
    "How many stories: those of equal FLOPs, or as many as the GPT's seconds allow."
    if budget == "flops":
        return STORIES
    seconds = {k: statistics.median(r["seconds"] for r in runs
                                    if (r["kind"], r["budget"]) == (k, "flops"))
               for k in ("gpt", kind)}
    n = round(STORIES * seconds["gpt"] / max(seconds[kind], 1e-9))
    return min(MOST, n - n % BATCH)


def record(file: Path, minutes: float, budgets: list, seeds: list, kinds: list | None) -> dict:
    "Make the runs that are missing, and write the record after each."
    world, tokenizer = prepare()
    rows, start = linked_rows(world, tokenizer, JUDGED), time.monotonic()
    for kind, seed, budget in runs_to_make(seeds):
        made = {(r["kind"], r["seed"], r["budget"]) for r in read(file)["runs"]}
        skipped = budget not in budgets or kind not in (kinds or [kind])
        if skipped or (kind, seed, budget) in made:
            continue
        if time.monotonic() - start > 60 * minutes:
            break
        n = stories_for(kind, budget, read(file)["runs"])
        row = {"budget": budget, **run(kind, seed, n, rows)}
        print(f"{budget:<8}{kind:<8}{seed} {n:6} stories {row['seconds']:7.1f} s "
              f"excess {row['excess']:.4f}", flush=True)
        whole = read(file)  # again: another process may work on other runs
        whole["floor"] = round(float(sum(r.floor.sum() for r in rows))
                               / sum(len(r.floor) for r in rows), 5)
        whole["runs"].append(row)
        with atomic_write(file, "w") as f:
            f.write(json.dumps(whole).replace('{"budget"', '\n {"budget"'))
    return read(file)


def tune(kinds: list, n: int) -> None:
    "The excess with each rate, one seed that is not used later."
    world, tokenizer = prepare()
    rows = linked_rows(world, tokenizer, 30, seed=99)
    for kind in kinds:
        for lr in RATES:
            model, _, seconds = learn(kind, 9, stories_of(9, n), lr)
            groups = excess_by_distance(model.eval(), rows)
            excess = sum(x for x, _ in groups.values()) / sum(c for _, c in groups.values())
            print(f"{kind:<8}lr {lr:<6} {seconds:5.1f} s  excess {excess:.4f}", flush=True)


def mean_excess(runs: list, kind: str, budget: str) -> float:
    "Over the seeds."
    return statistics.mean(r["excess"] for r in runs if (r["kind"], r["budget"]) == (kind, budget))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--file", type=Path, help="make or continue this record")
    parser.add_argument("--minutes", type=float, default=1000, help="begin no run after so many")
    parser.add_argument("--budget", nargs="*", default=["flops", "seconds"])
    parser.add_argument("--kinds", nargs="*", help="only these")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--tune", nargs="*", help="try the rates for these kinds")
    parser.add_argument("--stories", type=int, default=600, help="for --tune")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.tune is not None:
        return tune(args.tune or list(LR), args.stories)
    if args.file:
        runs = record(args.file, args.minutes, args.budget, args.seeds, args.kinds)["runs"]
    else:
        made = json.loads(asset("history.json").read_text(encoding="utf-8"))
        runs, rows = made["runs"], linked_rows(*prepare(), made["judged"])
        for kind in NGRAMS:
            again = run(kind, 0, made["stories"], rows)["excess"]
            before = next(r["excess"] for r in runs if (r["kind"], r["seed"]) == (kind, 0))
            print(f"{kind}: {again:.4f}, recorded {before:.4f}")
            assert abs(again - before) < 1e-3, "the record is of another world or another model"
    row = {"name": "history", "unit": "times", "bar": 1, "value": round(
        mean_excess(runs, "3-gram", "flops") / mean_excess(runs, "gpt", "flops"), 3)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
