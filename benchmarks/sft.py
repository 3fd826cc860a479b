"""The assistant that ships, and the tables behind the lesson on supervised fine-tuning.

    python benchmarks/sft.py --save llm_course/assets   train the assistant (a minute or two)
"""

import argparse
import time
from pathlib import Path

import torch

from llm_course.align.sft import fine_tune, load_assistant
from llm_course.core import set_seed
from llm_course.model.gpt import save_model
from llm_course.talk import Talk
from llm_course.world import World


def ship(folder: Path) -> None:
    "Train the assistant from the base model and save it."
    set_seed(0)
    world = World(seed=0)
    model, tokenizer = load_assistant("story")
    conversations = Talk(world).conversations(12_000, seed=1)
    start = time.perf_counter()
    fine_tune(model, tokenizer, conversations, epochs=3, stories=world.sample(1200, seed=5))
    print(f"trained for {time.perf_counter() - start:.0f} s")
    save_model(model, folder / "sft.safetensors", torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, help="train the assistant, and save it in this folder")
    args = parser.parse_args()
    if args.save:
        ship(args.save)


if __name__ == "__main__":
    main()
