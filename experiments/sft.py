"""The assistant that ships, and the table behind the lesson on supervised fine-tuning.

    python experiments/sft.py                            repeat one run of the table, and compare
    python experiments/sft.py --measure                  measure what the file lacks (ten minutes)
    python experiments/sft.py --save llm_course/assets   train the assistant (a minute or two)

The table: the base model learns from the same 6,000 conversations, seen twice, in five ways, from
three seeds each. Measured on phrasings that nobody trained on, always with the likeliest token:
the share of right answers to questions about facts, the mean true reward, and how far the model is
above the floor on stories of the world, which it was pretrained on, in nats per token. Memory
counts what training needs beside weights and activations: gradients and the optimiser's averages.
Seconds are the process's own, with one thread.

The last line is JSON; `value` is the largest difference from the file in the share of right
answers, and the bar is 0.15, what another machine's rounding may do.
"""

import argparse
import json
import time
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from llm_course.align.answers import draw_answers
from llm_course.align.chat import Rendered, load_assistant, render
from llm_course.align.lora import add_lora
from llm_course.align.sft import ChatBatches, PackedGPT, render_story, train_sft
from llm_course.core import atomic_write, set_seed
from llm_course.data.batches import one_pass
from llm_course.model.files import save_model
from llm_course.model.gpt import count_params
from llm_course.world.talk import Talk
from llm_course.train.floor import floor_excess
from llm_course.train.loop import TrainConfig, train
from llm_course.world import World

FILE = Path(__file__).parent.parent / "llm_course" / "assets" / "sft.json"
SEEDS, N = (0, 1, 2), 6000
WAYS = {
    "all weights": {},
    "all weights, with stories": {"stories": True},
    "all weights, with stories, loss on all text": {"stories": True, "everything": True},
    "LoRA, rank 16": {"rank": 16, "lr": 0.015},
    "LoRA, rank 16, with stories": {"stories": True, "rank": 16, "lr": 0.015},
}


def learn(model, tokenizer, chats, stories, seed, way) -> int:
    "Fine-tune; returns the bytes of gradients and of the optimiser's memory."
    seen = []

    def watch(trainer):
        optimizers = trainer.optimizer.optimizers
        seen.append(
            sum(4 * p.numel() for o in optimizers for p in o.params)
            + sum(4 * t.numel() for o in optimizers for m in o.memory.values() for t in m)
        )

    if not way.get("everything"):
        train_sft(
            model,
            tokenizer,
            chats,
            epochs=2,
            stories=stories,
            seed=seed,
            watch=watch,
            lr=way.get("lr", 0.02),
        )
        return seen[-1]
    texts = [render(tokenizer, chat).tokens for chat in chats]
    texts = [Rendered(tokens, [False] + [True] * (len(tokens) - 1)) for tokens in texts]
    texts += [render_story(tokenizer, story) for story in stories]
    batches = ChatBatches(texts, 8, model.config.context_length, seed)
    steps = 2 * sum(1 for _ in one_pass(batches))
    config = TrainConfig(steps=steps, lr_matrix=0.01, lr=0.02)
    train(PackedGPT(model, tokenizer.end_id), batches, config, watch=watch)
    return seen[-1]


def measure(way: dict, seed: int) -> dict:
    "One run of the table."
    set_seed(seed)
    world = World(seed=0)
    talk = Talk(world)
    model, tokenizer = load_assistant("story")
    if "rank" in way:
        add_lora(model, way["rank"], 2 * way["rank"], seed)
    stories = world.sample(N // 10, seed=50 + seed) if way.get("stories") else []
    start = time.process_time()
    memory = learn(model, tokenizer, talk.conversations(N, seed=10 + seed), stories, seed, way)
    seconds = time.process_time() - start
    prompts = talk.prompts(600, seed=77, split="held-out")
    answers = draw_answers(model.eval(), tokenizer, prompts, 1, 48, temperature=0).answers
    rewards = [talk.reward(p, a) for p, a in zip(prompts, answers)]
    facts = [r.correct for p, r in zip(prompts, rewards) if talk.read(p).kind == "fact"]
    excess = floor_excess(model, tokenizer, world, world.sample(64, seed=999)).excess
    return {
        "seed": seed,
        "facts": round(sum(facts) / len(facts), 3),
        "reward": round(sum(r.total for r in rewards) / len(rewards), 3),
        "excess": round(excess, 3),
        "learned": count_params(model),
        "megabytes": memory / 1e6,
        "seconds": round(seconds, 1),
    }


def measure_all() -> None:
    "Every way from every seed; what is in the file already is kept."
    old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"ways": {}}
    table = {name: old["ways"].get(name, []) for name in WAYS}
    for name, way in WAYS.items():
        for seed in SEEDS[len(table[name]) :]:
            table[name].append(measure(way, seed))
            print(name, table[name][-1], flush=True)
            with atomic_write(FILE, "w") as file:
                json.dump({"conversations": N, "epochs": 2, "ways": table}, file, indent=1)


def repeat() -> None:
    "One run again, beside the file."
    name = "LoRA, rank 16, with stories"
    old, new = json.loads(FILE.read_text(encoding="utf-8"))["ways"][name][0], measure(WAYS[name], 0)
    print(f"{name}: {new['facts']:.0%} of the facts, in the file {old['facts']:.0%}")
    print(
        json.dumps(
            {
                "name": "sft",
                "value": round(abs(new["facts"] - old["facts"]), 3),
                "unit": "share of right answers",
                "bar": 0.15,
            }
        )
    )


def ship(folder: Path) -> None:
    "Train the assistant from the base model and save it."
    set_seed(0)
    world = World(seed=0)
    model, tokenizer = load_assistant("story")
    conversations = Talk(world).conversations(12_000, seed=1)
    start = time.perf_counter()
    train_sft(model, tokenizer, conversations, epochs=3, stories=world.sample(1200, seed=5))
    print(f"trained for {time.perf_counter() - start:.0f} s")
    save_model(model, folder / "sft.safetensors", torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure what the file lacks")
    parser.add_argument("--save", type=Path, help="train the assistant, and save it in this folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.save:
        ship(args.save)
    elif args.measure:
        measure_all()
    else:
        repeat()


if __name__ == "__main__":
    main()
