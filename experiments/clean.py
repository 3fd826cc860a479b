"""What each rule of cleaning is worth: the table behind the lesson on it.

    python experiments/clean.py            repeat one run of the table, and compare
    python experiments/clean.py --measure  measure what the file lacks (ten minutes with one thread)

The same small model learns 100 steps from 800 pages of the invented crawl, cleaned by all rules, by none, or by
all but one, from three seeds each, and is graded on clean pages. The last line is JSON; `value` is the difference
from the file in nats per token, and the bar is 0.05, what another machine's rounding may do.
"""

import argparse
import json
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin

from llm_course.core import asset, atomic_write
from llm_course.data.shards import memory_shards
from llm_course.tokens.exchange import load_tokenizer
from llm_course.train.worth import WORTH_RULES, clean_pages, crawl_texts, learn_texts, page_loss
from llm_course.world.crawl import crawl
from llm_course.world.story import World

FILE = Path(__file__).parent.parent / "llm_course" / "assets" / "clean.json"
PAGES, STEPS, SEEDS = 800, 100, (0, 1, 2)
WAYS = {"all rules": WORTH_RULES, "no rule": ()}
WAYS |= {f"without {left}": tuple(r for r in WORTH_RULES if r != left) for left in WORTH_RULES}


def measure(ways: dict, seeds: tuple, told=print) -> dict:
    "Losses of each way, a list of one for each seed; and the floor."
    tokenizer, pages = load_tokenizer(asset("story.bpe")), crawl(PAGES, seed=0)
    valid, nats = clean_pages(World(0), 24, seed=987)
    found = {"pages": PAGES, "steps": STEPS, "seeds": list(seeds), "losses": {}, "tokens": {}}
    found["floor"] = round(nats / (memory_shards(valid, tokenizer).n_tokens - 1), 5)
    for name, rules in ways.items():
        texts = crawl_texts(pages, rules)
        found["tokens"][name] = memory_shards(texts, tokenizer).n_tokens
        losses = [
            page_loss(learn_texts(texts, tokenizer, STEPS, seed), valid, tokenizer)
            for seed in seeds
        ]
        found["losses"][name] = [round(loss, 4) for loss in losses]
        told(f"{name:20} {found['tokens'][name]:9,} tokens  {found['losses'][name]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        found = measure(WAYS, SEEDS)
        with atomic_write(FILE, "w") as file:
            file.write(json.dumps(found, indent=1) + "\n")
        difference = 0.0
    else:
        known = json.loads(FILE.read_text(encoding="utf-8"))
        found = measure({"all rules": WORTH_RULES}, (0,))
        difference = abs(found["losses"]["all rules"][0] - known["losses"]["all rules"][0])
    print(json.dumps({"name": "clean", "value": round(difference, 4), "unit": "nats per token from the file",
                      "bar": 0.05}))


if __name__ == "__main__":
    main()
