"""What a number is worth: the spread of four metrics over seeds, and what a leaked test set does.

    python experiments/evaluate.py [--measure] [--threads 1]

*Seeds*: one small model (2 layers of width 64) learns from the story world for 60, 120 or 240
steps, with five seeds each. Each is asked four things: its loss and how often its first guess is
right on 100 unseen stories, how many of 80 facts it finds among all villagers' answers, and how
many characters it writes before a story becomes impossible.
*Leaks*: the same model learns from 300 stories for 500 steps, and 0, 1, 10 or 100 of the 100
stories of the test are among them, three seeds each; every 100 steps it is tested.
--measure writes llm_course/assets/evaluate.json; without it one training of each kind is repeated
and compared. The last line is JSON; `value` is by how many nats per token the whole leak flatters,
and the bar is 0.
"""

import argparse
import json

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch
import torch.nn.functional as F

from record import made_by
from llm_course.core import asset, atomic_write, set_seed
from llm_course.data.batches import DocumentBatches
from llm_course.data.shards import memory_shards
from llm_course.generate.confabulation import continuation_log_probs
from llm_course.generate.write import sample_batch
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.exchange import load_tokenizer
from llm_course.train.floor import shrink_embedding
from llm_course.train.loop import TrainConfig, train
from llm_course.world import World

STEPS, SEEDS, LEAKS = (60, 120, 240), range(5), (0, 1, 10, 100)
WORLD, TOKENIZER = World(seed=0), load_tokenizer(asset("story.bpe"))
TEST = WORLD.sample(100, seed=900_000)


def rows_of(stories: list) -> tuple:
    "Stories side by side, padded with the end; and which targets count."
    ids = [[TOKENIZER.end_id, *TOKENIZER.encode(s), TOKENIZER.end_id] for s in stories]
    width = max(map(len, ids))
    rows = torch.tensor([row + [TOKENIZER.end_id] * (width - len(row)) for row in ids])
    mask = torch.tensor([[j < len(row) - 1 for j in range(width - 1)] for row in ids])
    return rows, mask


ROWS, MASK = rows_of(TEST)
FLOOR = [-WORLD.log_prob(s) / n for s, n in zip(TEST, MASK.sum(1).tolist())]


@torch.no_grad()
def read_test(model: GPT) -> tuple:
    "Nats of each story of the test, and the share of first guesses that are right."
    model.eval()
    nats, right = [], 0
    for rows, mask in zip(ROWS.split(25), MASK.split(25)):
        logits, targets = model(rows[:, :-1]), rows[:, 1:]
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        nats += (loss * mask).sum(1).tolist()
        right += int(((logits.argmax(-1) == targets) & mask).sum())
    model.train()
    return nats, right / int(MASK.sum())


def facts_right(model: GPT) -> float:
    "Share of facts whose true answer is the likeliest of all answers of its kind."
    right = 0
    questions = WORLD.questions()[::2]
    for q in questions:
        prompt = [TOKENIZER.end_id, *TOKENIZER.encode(q.prompt)]
        answers = [TOKENIZER.encode(" " + a) for a in (q.answer, *q.alternatives)]
        right += int(continuation_log_probs(model, prompt, answers).argmax()) == 0
    return right / len(questions)


def possible_characters(model: GPT, seed: int) -> float:
    "How far its stories get before they become impossible, in characters."
    g = torch.Generator().manual_seed(seed)
    written = sample_batch(model, [[TOKENIZER.end_id]], 60, TOKENIZER.end_id, n=40, generator=g)
    lengths = []
    for row in written.tokens:
        text = TOKENIZER.decode([i for i in row if i != TOKENIZER.end_id])
        wrong = WORLD.explain(text)
        lengths.append(len(text) if wrong is None else wrong.position)
    return sum(lengths) / len(lengths)


def learn(stories: list, steps: int, seed: int, look=None, every: int = 100) -> GPT:
    "Train the small model."
    set_seed(seed)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, context_length=256, d_model=64, n_layers=2, n_heads=2))
    shards = memory_shards(stories, TOKENIZER)
    watch = look and (lambda trainer: look(model, trainer.progress.step))
    train(shrink_embedding(model), iter(DocumentBatches(shards, 8, 128, seed=seed)),
          TrainConfig(steps=steps), eval_every=every, watch=watch)
    return model.eval()


def seed_run(steps: int, seed: int) -> dict:
    "One model and its four metrics."
    model = learn(WORLD.sample(2000, seed=910_000), steps, seed)
    nats, right = read_test(model)
    row = {"steps": steps, "seed": seed, "nats": [round(x, 3) for x in nats],
           "loss": round(sum(nats) / int(MASK.sum()), 4), "first guess right": round(right, 4),
           "facts right": round(facts_right(model), 4),
           "possible characters": round(possible_characters(model, seed), 2)}
    print({k: v for k, v in row.items() if k != "nats"}, flush=True)
    return row


def leak_run(leak: int, seed: int) -> dict:
    "One model that has read `leak` stories of the test; losses on those and on the others."
    looks = []

    def look(model, step):
        nats, n = torch.tensor(read_test(model)[0]), MASK.sum(1)
        seen = (nats[:leak].sum() / n[:leak].sum()).item() if leak else None
        other = (nats[leak:].sum() / n[leak:].sum()).item() if leak < len(TEST) else None
        looks.append({"step": step, "test": round((nats.sum() / n.sum()).item(), 4),
                      "leaked": seen and round(seen, 4), "others": other and round(other, 4)})

    learn(WORLD.sample(300, seed=920_000) + TEST[:leak], 500, seed, look)
    print(leak, seed, looks[-1], flush=True)
    return {"leak": leak, "seed": seed, "looks": looks}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", action="store_true", help="all of it; writes the record")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        seeds = [seed_run(steps, seed) for steps in STEPS for seed in SEEDS]
        leaks = [leak_run(leak, seed) for leak in LEAKS for seed in range(3)]
        record = {**made_by("python experiments/evaluate.py --measure"),
                  "tokens": MASK.sum(1).tolist(),
                  "floor": round(sum(f * n for f, n in zip(FLOOR, MASK.sum(1).tolist()))
                                 / int(MASK.sum()), 4), "seeds": seeds, "leaks": leaks}
        with atomic_write(asset("README.md").with_name("evaluate.json"), "w") as f:
            f.write(json.dumps(record))
    else:
        record = json.loads(asset("evaluate.json").read_text(encoding="utf-8"))
        again = seed_run(60, 0), leak_run(100, 0)
        print("recorded:", next(r["loss"] for r in record["seeds"]),
              next(r for r in record["leaks"] if r["leak"] == 100)["looks"][-1])
        record["leaks"] = [r for r in record["leaks"] if r["leak"] != 100] + [again[1]]
    ends = {leak: [r["looks"][-1]["test"] for r in record["leaks"] if r["leak"] == leak]
            for leak in (0, 100)}
    value = sum(ends[0]) / len(ends[0]) - sum(ends[100]) / len(ends[100])
    print(json.dumps({"name": "evaluate", "value": round(value, 3), "unit": "nats per token",
                      "bar": 0}))


if __name__ == "__main__":
    main()
