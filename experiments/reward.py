"""The reward model that ships, and how many comparisons one needs.

    python experiments/reward.py                            train it, and measure it
    python experiments/reward.py --save llm_course/assets   the same, and keep it
    python experiments/reward.py --measure                  the recorded curve anew (ten minutes)

A crowd of 20 simulated people compares answers of the assistant that ships and of hired writers.
The model is measured on comparisons of writers' answers, and on comparisons of the assistant's own
answers, to phrasings that nobody trained on. Nobody can agree with these people more often than
somebody who knows the exact probability of each choice; `value` is the model's accuracy on the
writers' answers as a share of that, and the bar is 0.95.

The curve (llm_course/assets/reward.json): accuracy and loss on the writers' answers after learning
from so many comparisons, 21 of each prompt, in as many passes as make 60 steps, from three seeds
each. Seconds are the process's own.
"""

import argparse
import json
import math
import time
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch
import torch.nn.functional as F

from llm_course.align.answers import encode_pairs
from llm_course.align.judge import collect_pairs
from llm_course.align.reward import reward_margins, train_reward
from llm_course.align.reward_model import RewardModel, save_reward
from llm_course.align.chat import load_assistant
from llm_course.core import atomic_write, set_seed
from llm_course.world.talk import Talk, best_accuracy

FILE = Path(__file__).parent.parent / "llm_course" / "assets" / "reward.json"
PROMPTS, SAMPLED, WRITTEN, HELD = 2500, 3, 4, 1500
SIZES, SEEDS = (100, 300, 1000, 3000, 10000, 30000), (0, 1, 2)


def floor(pairs: list) -> float:
    "Nats per comparison that nobody can save: the choices are noisy."
    return -sum(
        p.prob * math.log(p.prob) + (1 - p.prob) * math.log1p(-p.prob)
        for p in pairs
        if 0 < p.prob < 1
    ) / len(pairs)


def measure(model, tokenizer, pairs: list) -> dict:
    "Accuracy and loss, and the best that is possible."
    leads = reward_margins(model, tokenizer, pairs)
    return {
        "accuracy": round((leads > 0).float().mean().item(), 4),
        "best": round(best_accuracy(pairs), 4),
        "nats": round(-F.logsigmoid(leads).mean().item(), 4),
        "floor": round(floor(pairs), 4),
    }


def learn(talk, assistant, tokenizer, prompts: int, seed: int, steps: int = 1) -> RewardModel:
    "Collect comparisons and learn from them, in one pass or in more, to make so many steps."
    start = time.process_time()
    pairs = collect_pairs(
        assistant, tokenizer, talk, prompts, seed + 1, sampled=SAMPLED, written=WRITTEN
    )
    collected = time.process_time()
    set_seed(seed)
    model = RewardModel(assistant)
    answers = sum(len(rows) for rows, _ in encode_pairs(pairs, tokenizer, 10**6).groups)
    epochs = max(1.0, 32 * steps / answers)
    train_reward(model, tokenizer, pairs, epochs, seed=seed, watch=None)
    seconds = collected - start, time.process_time() - collected
    print(f"{len(pairs):6} comparisons of {answers} answers, seed {seed}: collected in "
          f"{seconds[0]:.0f} s, learned in {seconds[1]:.0f} s", flush=True)  # fmt: skip
    return model


def write(found: dict) -> None:
    "Keep what was measured so far."
    with atomic_write(FILE, "w") as f:
        f.write(json.dumps(found) + "\n")


def curve(talk, assistant, tokenizer, held: list) -> None:
    "How good the model is after so many comparisons."
    rows, per_prompt = [], (SAMPLED + WRITTEN) * (SAMPLED + WRITTEN - 1) // 2
    for n in SIZES:
        for seed in SEEDS:
            model = learn(talk, assistant, tokenizer, n // per_prompt, seed, steps=60)
            rows.append({"n": n, "seed": seed, **measure(model, tokenizer, held)})
            print(f"       accuracy {rows[-1]['accuracy']:.3f}", flush=True)
            write({"rows": rows, "made": {"date": time.strftime("%Y-%m-%d"), "held": len(held)}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="the recorded curve anew")
    parser.add_argument("--save", type=Path, help="folder for reward.safetensors")
    args = parser.parse_args()
    talk = Talk()
    assistant, tokenizer = load_assistant()
    held = talk.pairs(HELD, seed=2, split="held-out")
    if args.measure:
        curve(talk, assistant, tokenizer, held)
        return
    own = collect_pairs(assistant, tokenizer, talk, HELD, 3, "held-out", sampled=2, written=0)
    model = learn(talk, assistant, tokenizer, PROMPTS, seed=0)
    rows = {"writers": measure(model, tokenizer, held), "own": measure(model, tokenizer, own)}
    print(f"{'answers of':12}{'accuracy':>10}{'best':>8}{'share':>8}{'nats':>8}{'floor':>8}")
    for name, row in rows.items():
        share = row["accuracy"] / row["best"]
        print(f"{name:12}{row['accuracy']:10.3f}{row['best']:8.3f}{share:8.3f}"
              f"{row['nats']:8.3f}{row['floor']:8.3f}")  # fmt: skip
    if args.save:
        save_reward(model, args.save / "reward.safetensors", torch.bfloat16)
    value = rows["writers"]["accuracy"] / rows["writers"]["best"]
    line = {"name": "reward", "value": round(value, 4), "unit": "share of the best accuracy"}
    print(json.dumps({**line, "bar": 0.95, **rows}))


if __name__ == "__main__":
    main()
