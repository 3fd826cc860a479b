"""Full runs for lessons 76 to 79, three seeds each, recorded in `llm_course/assets/align.json`.

    python experiments/align.py                    one run of each method, checked against the bar
    python experiments/align.py --measure          every part anew (slow)
    python experiments/align.py --measure beta     one part
    python experiments/align.py --save llm_course/assets    the assistant that ships, by GRPO

The lessons draw the recorded runs. All of them start from the assistant and the reward model that
ship with the course. The parts:

    policy   REINFORCE, PPO and GRPO against the reward model; the true reward is only written down;
             and GRPO on a looser leash
    beta     GRPO against a reward model that was taught by people who like long answers and
             flattery, with
             KL coefficients from 0 up: over-optimisation, and the leash that prevents it
    pairs, best, refusal   for lessons 78 and 79, see `preference.py`

A run records a column for each quantity, and `looks` at held-out prompts on the way. KL is in nats
per answer. Each part is kept in the file as soon as it is there. The last line is JSON; `value` is
the smallest share of the gap between the assistant's true reward and the highest possible one that
PPO or GRPO closed at a KL below 15 nats, on held-out prompts; the bar is 0.25.
"""

import argparse
import copy
import json
import sys
import time
from functools import partial
from pathlib import Path

import preference
import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from record import chosen_parts, measure_parts
from llm_course.align.answers import draw_answers
from llm_course.align.policy_tuner import train_policy, village_reward
from llm_course.align.rlhf import evaluate_policy
from llm_course.align.judge import collect_pairs
from llm_course.align.reward import reward_function, train_reward
from llm_course.align.reward_model import RewardModel, load_reward
from llm_course.align.chat import load_assistant
from llm_course.core import asset
from llm_course.model.files import save_model
from llm_course.world.talk import Talk, make_annotators

FILE = Path(__file__).parent.parent / "llm_course" / "assets" / "align.json"
SEEDS = (0, 1, 2)
SETTINGS = {
    "reinforce": {"beta": 0.05, "kl_target": 5.0},
    "ppo": {"beta": 0.05, "kl_target": 5.0},
    "grpo": {"beta": 0.3, "kl_target": 3.0},
}
STEPS = 40
BETAS = (0.0, 0.1, 0.3, 1.0)
BETA_SETTINGS = {"lr": 2e-3, "steps": 30, "kl_target": None, "passes": 2}
LOOSE = {"beta": 0.1, "kl_target": 5.0, "passes": 2}
BIAS = {"length": 0.15, "flattery": 0.2}  # per ten words, and for a flattering phrase
COLUMNS = ("reward", "true", "kl", "length")


class Village:
    "Everything that all runs share; loaded when it is first needed."

    def __init__(self):
        self.talk = Talk()
        self.model, self.tokenizer = load_assistant()
        self.truth = village_reward(self.talk)
        self.prompts = self.talk.prompts(2000, seed=1)
        self.held = self.talk.prompts(300, seed=2, split="held-out")
        self._rewards = {}

    def reward(self, name: str):
        "The reward model that ships, or one that learned from people with a bias."
        if name not in self._rewards:
            self._rewards[name] = self._ship() if name == "ship" else self._biased()
        return self._rewards[name]

    def _ship(self):
        return reward_function(load_reward(asset("reward.safetensors")), self.tokenizer)

    def _biased(self):
        crowd = make_annotators(20, seed=1, **BIAS)
        pairs = collect_pairs(self.model, self.tokenizer, self.talk, 1200, seed=11, crowd=crowd)
        torch.manual_seed(0)
        model = RewardModel(self.model)
        train_reward(model, self.tokenizer, pairs, watch=None)
        return reward_function(model, self.tokenizer)

    def look(self, model, proxy, seed: int = 0) -> dict:
        "What a policy is worth on held-out prompts."
        rewards = {"true": self.truth, "reward": proxy}
        row = evaluate_policy(model, self.tokenizer, self.held, rewards, self.model, seed)
        return {name: round(row[name], 3) for name in (*COLUMNS, "finished")}


def samples(village: Village, model, proxy, n: int = 6) -> list:
    "Some held-out prompts, what the model answers, and both rewards."
    g = torch.Generator().manual_seed(0)
    r = draw_answers(model, village.tokenizer, village.held[:n], generator=g)
    both = zip(proxy(r.messages, r.answers).tolist(), village.truth(r.messages, r.answers).tolist())
    return [
        [m[-1]["content"], a, round(p, 2), round(t, 2)]
        for m, a, (p, t) in zip(r.messages, r.answers, both)
    ]


def tuned(village: Village, proxy, method: str, seed: int, look_every: int = 10, **settings):
    "Tune a copy of the assistant; the copy, columns of its history, and looks on the way."
    model, looks, settings = copy.deepcopy(village.model), [], {"steps": STEPS, **settings}
    wall, start = time.perf_counter(), time.process_time()

    def watch(t):
        if t.step % look_every == 0:
            looks.append({"step": t.step, **village.look(t.model, proxy)})

    history = train_policy(
        model, village.tokenizer, village.prompts, proxy, method, judge=village.truth, seed=seed,
        watch=watch, **settings,
    )  # fmt: skip
    columns = {name: [round(row[name], 3) for row in history] for name in COLUMNS}
    last = looks[-1]
    print(
        f"{method:10} seed {seed} {settings}: true {last['true']:.3f}, proxy {last['reward']:.2f}, "
        f"KL {last['kl']:.1f}, {last['length']:.0f} tokens, {time.perf_counter() - wall:.0f} s "
        f"({time.process_time() - start:.0f} s of the processor)",
        flush=True,
    )
    return model, {
        "method": method,
        "seed": seed,
        "beta": settings["beta"],
        **columns,
        "looks": looks,
    }


def run(village: Village, proxy, method: str, seed: int, *args, **settings) -> dict:
    "What is recorded of a run; of seed 0, with samples."
    model, found = tuned(village, proxy, method, seed, *args, **settings)
    return {**found, "samples": samples(village, model, proxy)} if seed == 0 else found


def save_assistant(village: Village, folder: Path) -> None:
    "Make the assistant that ships: a run of GRPO that is twice as long."
    settings = {**SETTINGS["grpo"], "steps": 2 * STEPS}
    model, _ = tuned(village, village.reward("ship"), "grpo", 0, **settings)
    save_model(model, folder / "assistant.safetensors", torch.bfloat16)


def policy(village: Village) -> dict:
    "Three methods, three seeds, the reward model that ships."
    proxy = village.reward("ship")
    runs = [run(village, proxy, m, s, **SETTINGS[m]) for m in SETTINGS for s in SEEDS]
    loose = [run(village, proxy, "grpo", seed, **LOOSE) for seed in SEEDS]
    return {"start": village.look(village.model, proxy), "runs": runs, "loose": loose}


def beta(village: Village) -> dict:
    "GRPO against people who like long answers, on leashes of several lengths."
    proxy = village.reward("biased")
    cases = [(b, seed) for b in BETAS for seed in SEEDS]
    runs = [run(village, proxy, "grpo", seed, 5, beta=b, **BETA_SETTINGS) for b, seed in cases]
    return {"start": village.look(village.model, proxy), "runs": runs}


PARTS = {"policy": policy, "beta": beta, **preference.PARTS}


def gap_closed(start: float, look: dict) -> float:
    "The share of the gap to a reward of 1, if the KL is small enough."
    return (look["true"] - start) / (1 - start) if look["kl"] < 15 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="make assistant.safetensors")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    names = chosen_parts(parser, chosen.measure, PARTS)
    village = Village()
    if chosen.save:
        save_assistant(village, chosen.save)
        return
    parts = {name: partial(part, village) for name, part in PARTS.items()}
    tables = measure_parts(chosen.file, parts, names, "python experiments/align.py --measure")
    proxy = village.reward("ship")
    start, closed = village.look(village.model, proxy)["true"], []
    if names:
        runs = [r for r in tables["policy"]["runs"] if r["method"] != "reinforce"]
        closed = [gap_closed(start, r["looks"][-1]) for r in runs]
    else:
        for method in ("ppo", "grpo"):
            row = run(village, proxy, method, 0, **SETTINGS[method])
            closed.append(gap_closed(start, row["looks"][-1]))
    value = round(min(closed), 3)
    print(f"true reward of the assistant {start:.3f}; share of the gap closed: {closed}")
    print(json.dumps({"name": "align", "value": value, "unit": "of the gap", "bar": 0.25}))


if __name__ == "__main__":
    sys.exit(main())
