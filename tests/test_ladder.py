"""The ladder of recipes in llm_course/assets/ladder.json: complete, consistent, and it ends at the
course's own defaults."""

import importlib.util
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from llm_course.core import asset
from llm_course.data.batches import RandomWindows
from llm_course.data.shards import memory_shards
from llm_course.model.block import COURSE
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.text import CharTokenizer
from llm_course.train.loop import TrainConfig, train

LADDER = json.loads(asset("ladder.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent.parent / "experiments" / "ladder.py"
    spec = importlib.util.spec_from_file_location("ladder_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rung", LADDER["rungs"], ids=lambda rung: rung["name"])
def test_rung_is_complete(rung):
    assert len(rung["losses"]) == len(LADDER["seeds"]) >= 3
    assert statistics.median(rung["losses"]) <= LADDER["target"] < 2.0
    assert len(rung["milliseconds"]) >= 3
    expected = [rung["steps"] * ms / 1000 for ms in rung["milliseconds"]]
    assert rung["seconds"] == pytest.approx(expected, abs=0.01)
    assert rung["median_seconds"] == pytest.approx(statistics.median(expected), abs=0.01)


def test_savings_add_up():
    seconds = [rung["median_seconds"] for rung in LADDER["rungs"]]
    saved = [rung["saved"] for rung in LADDER["rungs"]]
    assert saved[0] is None
    assert saved[1:] == pytest.approx([a - b for a, b in zip(seconds, seconds[1:])], abs=0.011)
    assert seconds[0] >= 5 * seconds[-1]


def test_file_and_script_have_the_same_rungs(script):
    recorded = [(r["name"], r["change"], r["settings"]) for r in LADDER["rungs"]]
    assert recorded == [(name, words, s) for name, (words, _, s) in script.recipes().items()]


def test_each_rung_changes_something(script):
    settings = [rung["settings"] for rung in LADDER["rungs"]]
    changed = [{k for k in b if a[k] != b[k]} for a, b in zip(settings, settings[1:])]
    assert all(changed)
    assert changed == [set(changes) for _, _, changes in script.LADDER[1:]]


def test_other_changes_are_complete(script):
    assert [o["name"] for o in LADDER["others"]] == [name for name, _ in script.OTHERS]
    last = LADDER["rungs"][-1]["settings"]
    for other in LADDER["others"]:
        assert len(other["losses"]) == len(LADDER["seeds"])
        assert all(last[key] != value for key, value in other["changes"].items())


def test_last_rung_is_the_default_recipe():
    "Whoever changes a default climbs the ladder again, or says here why not."
    last = LADDER["rungs"][-1]["settings"]
    defaults = {**asdict(TrainConfig(steps=1)), **asdict(COURSE)}
    same = {key: value for key, value in last.items() if key in defaults}
    assert same == {key: defaults[key] for key in same}
    assert {"lr", "lr_matrix", "schedule", "warmup", "weight_decay", "precision"} < set(same)
    assert {"norm", "position", "activation", "tied_head", "shift", "init", "qk_norm"} < set(same)


def test_the_script_trains_as_the_course_does(script, monkeypatch):
    monkeypatch.setattr("llm_course.train.loop.fits_lean", lambda *_: False)  # it rounds otherwise
    text = "To be, or not to be, that is the question. " * 40
    shards = memory_shards([text], CharTokenizer.train([text]))
    settings = {**LADDER["rungs"][-1]["settings"], "precision": "float32", "batch_size": 2}
    run = script.Run(settings, shards, seed=3, steps=4)
    for part in run.optimizer.optimizers:
        part.dtype = torch.float32  # Muon's products, as a run in float32 has them
    for _ in range(4):
        run.step()
    torch.manual_seed(3)
    sizes = {k: settings[k] for k in ("d_model", "n_layers", "n_heads")}
    model = GPT(GPTConfig(shards.vocab_size, context_length=script.CONTEXT, **sizes))
    config = TrainConfig(steps=4, precision="float32")
    train(model, RandomWindows(shards, 2, script.CONTEXT, 3), config, watch=None)
    for ours, theirs in zip(run.model.parameters(), model.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-5)
