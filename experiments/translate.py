"""Translators of three kinds, and a transformer that summarises stories: what lesson 36 draws.

    python experiments/translate.py            repeat one run of the table, and compare
    python experiments/translate.py --measure sentences   three kinds, three seeds each (two minutes, one thread)
    python experiments/translate.py --measure stories     the summariser, three seeds (some minutes)
    python experiments/translate.py --save       train the model that ships

Each kind learns 6,000 sentences of the village with their translations, in the same number of steps, and
translates 500 others; graded by exact match, in all and by the length of the sentence. The summariser reads whole
stories; graded by the key facts that its one sentence keeps. The last line is JSON; `value` is the share of
held-out sentences that the worst seed of attention translates exactly, and the bar is 0.95.
"""

import argparse
import json
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin

import torch

from llm_course.core import atomic_write, set_seed
from llm_course.model.gpt import count_params
from llm_course.model.pairs import (
    PairRows,
    fill_rows,
    pair_batches,
    save_translator,
    translator_flops,
    write_greedily,
)
from llm_course.model.translate import TranslatorConfig, make_translator
from llm_course.tokens.text import WordTokenizer
from llm_course.train.loop import TrainConfig, train
from llm_course.world.labels import kept_facts, summarise_story
from llm_course.world.sister import Sister
from llm_course.world.story import World

ASSETS = Path(__file__).parent.parent / "llm_course" / "assets"
NAMES = ("<|endoftext|>", "<unk>", "<pad>")
KINDS, SEEDS, N, HELD = ("vector", "attention", "transformer"), (0, 1, 2), 6000, 500
STEPS = 300
RATES = {"vector": (None, 0.01), "attention": (None, 0.01), "transformer": (0.02, 0.01)}


def in_rows(texts: list, tokenizer, before=(), after=()) -> torch.Tensor:
    "Token ids, short rows filled with <pad>."
    return fill_rows([[*before, *tokenizer.encode(text), *after] for text in texts], tokenizer.special_tokens["<pad>"])


def learn(kind, tokenizer, sources, targets, steps, seed, size=64, layers=1):
    "A trained translator."
    set_seed(seed)
    pad = tokenizer.special_tokens["<pad>"]
    model = make_translator(TranslatorConfig(tokenizer.vocab_size, kind, n_layers=layers, pad_id=pad))
    lr_matrix, lr = RATES[kind]
    config = TrainConfig(steps, lr_matrix=lr_matrix, lr=lr, precision="float32")
    batches = pair_batches(sources, targets, pad, size, seed)
    train(PairRows(model, sources.shape[1]), batches, config, watch=None)
    return model.eval()


def sentence_pairs() -> tuple:
    "Sentences, translations, tokenizer, sources and targets; the last HELD are held out."
    sister = Sister()
    english = sister.sentences(N + HELD, seed=1)
    thistle = [sister.translate(sentence) for sentence in english]
    tokenizer = WordTokenizer.train(english[:N] + thistle[:N], special_tokens=NAMES)
    end = [tokenizer.end_id]
    return english, thistle, tokenizer, in_rows(english, tokenizer), in_rows(thistle, tokenizer, end, end)


def right_ones(model, tokenizer, sources, thistle) -> list:
    "Which held-out sentences are translated exactly?"
    got = write_greedily(model, sources[N:], tokenizer.end_id)
    return [tokenizer.decode(row) == want for row, want in zip(got, thistle[N:])]


def measure_translation(kinds=KINDS, seeds=SEEDS) -> dict:
    "Exact match of each kind, a list of one for each seed, and by words of the sentence."
    english, thistle, tokenizer, sources, targets = sentence_pairs()
    words = [len(sentence.split()) for sentence in english[N:]]
    found = {"sentences": N, "held_out": HELD, "steps": STEPS, "lengths": sorted(set(words)), "kinds": {}}
    for kind in kinds:
        rows = []
        for seed in seeds:
            model = learn(kind, tokenizer, sources[:N], targets[:N], STEPS, seed)
            rows.append(right_ones(model, tokenizer, sources, thistle))
            print(f"{kind:12} seed {seed}: {sum(rows[-1]) / HELD:.3f}", flush=True)
        by_length = [
            [round(sum(r for r, w in zip(row, words) if w == n) / words.count(n), 3) for row in rows]
            for n in found["lengths"]
        ]
        c = model.config
        found["kinds"][kind] = {"exact": [round(sum(row) / HELD, 4) for row in rows],
                                "by_length": by_length, "parameters": count_params(model),
                                "flops": translator_flops(c)}  # fmt: skip
    return found


STORIES, TEST, SUMMARY_STEPS = 4000, 200, 300


def story_pairs() -> tuple:
    "Stories with their true summaries, tokenizer, sources, targets; the last TEST are held out."
    world = World(seed=0)
    stories = world.sample(STORIES + TEST, seed=11)
    true = [summarise_story(world, story) for story in stories]
    texts = stories[:STORIES] + [s.text for s in true[:STORIES]]
    tokenizer = WordTokenizer.train(texts, 1500, special_tokens=NAMES)
    end = [tokenizer.end_id]
    return stories, true, tokenizer, in_rows(stories, tokenizer), in_rows([s.text for s in true], tokenizer, end, end)


def measure_summary(seeds=SEEDS, steps=SUMMARY_STEPS) -> tuple:
    "Key facts kept, and whole summaries right, one for each seed; and the last model."
    stories, true, tokenizer, sources, targets = story_pairs()
    kept, whole = [], []
    for seed in seeds:
        model = learn("transformer", tokenizer, sources[:STORIES], targets[:STORIES], steps, seed, 16, 2)
        got = [tokenizer.decode(row) for row in write_greedily(model, sources[STORIES:], tokenizer.end_id)]
        kept.append(round(sum(map(kept_facts, got, true[STORIES:])) / TEST, 4))
        whole.append(round(sum(g == s.text for g, s in zip(got, true[STORIES:])) / TEST, 4))
        print(f"summaries    seed {seed}: key facts {kept[-1]:.3f}, exact {whole[-1]:.3f}", flush=True)
    lead = [kept_facts(story.split(". ")[0], s) for story, s in zip(stories[STORIES:], true[STORIES:])]
    found = {"stories": STORIES, "held_out": TEST, "steps": steps, "kept": kept, "exact": whole,
             "first_sentence": round(sum(lead) / TEST, 4), "parameters": count_params(model),
             "examples": [{"story": stories[STORIES + i], "written": got[i]} for i in (0, 1, 2)]}  # fmt: skip
    return {"summary": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--measure", choices=["sentences", "stories"])
    parser.add_argument("--save", action="store_true")
    args, file = parser.parse_args(), ASSETS / "translate.json"
    if args.measure:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        parts = {"sentences": measure_translation, "stories": measure_summary}
        found = known | parts[args.measure]()
        with atomic_write(file, "w") as f:
            f.write(json.dumps(found, indent=1) + "\n")
    elif not args.save:
        found, again = json.loads(file.read_text(encoding="utf-8")), measure_translation(("attention",), (0,))
        was = found["kinds"]["attention"]["exact"][0]
        print(f"recorded {was}, now {again['kinds']['attention']['exact'][0]}")
    if args.save:
        _, thistle, tokenizer, sources, targets = sentence_pairs()
        model = learn("transformer", tokenizer, sources[:N], targets[:N], 500, seed=0)
        print(f"transformer: {sum(right_ones(model, tokenizer, sources, thistle)) / HELD:.3f} exact")
        save_translator(model, ASSETS / "translate.safetensors", torch.bfloat16)
        found = json.loads(file.read_text(encoding="utf-8"))
    value = min(found["kinds"]["attention"]["exact"])
    print(json.dumps({"name": "translate", "value": value, "unit": "share exact, worst of three seeds", "bar": 0.95}))


if __name__ == "__main__":
    main()
