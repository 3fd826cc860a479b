"""Kinds of model: equal to torch at any size, saved and loaded whatever the dice say, and a record of
the comparison that is complete and consistent."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from llm_course.core import asset
from llm_course.evaluate.history import HISTORY, linked_rows, place_on_axis, tell_linked
from llm_course.model.experts import (
    ExpertGPT, Experts, ExpertsConfig, drop_beyond, route_tokens, run_experts)
from llm_course.model.gpt import GPTConfig
from llm_course.model.kinds import MODEL_KINDS, load_kind, make_kind, save_kind, training_flops
from llm_course.model.recurrent import RecurrentLayer, linear_scan
from llm_course.tokens.text import WordTokenizer
from llm_course.train.loop import TrainConfig, make_optimizer, train
from llm_course.world import World

ROOT = Path(__file__).resolve().parent.parent
RECORD = json.loads(asset("history.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("cell, theirs", [("rnn", nn.RNN), ("lstm", nn.LSTM), ("gru", nn.GRU)])
@pytest.mark.parametrize("seed", range(4))
def test_layers_equal_torchs(cell, theirs, seed):
    rng = random.Random(seed)
    B, T, C, H = (rng.randint(1, 9) for _ in range(4))
    torch.manual_seed(seed)
    ours, torchs = RecurrentLayer(C, H, cell), theirs(C, H, batch_first=True)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(B, T, C)
    torch.testing.assert_close(ours(x)[0], torchs(x)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_scan_equals_the_loop(seed):
    rng = random.Random(seed)
    B, T, C = rng.randint(1, 3), rng.randint(1, 70), rng.randint(1, 5)
    g = torch.Generator().manual_seed(seed)
    keep, new = torch.rand(B, T, C, generator=g).double(), torch.randn(B, T, C, generator=g).double()
    keep[torch.rand(B, T, C, generator=g) < 0.1] = 0.0
    state, states = torch.zeros(B, C).double(), []
    for t in range(T):
        state = keep[:, t] * state + new[:, t]
        states.append(state)
    torch.testing.assert_close(linear_scan(keep, new), torch.stack(states, dim=1))


def test_gradient_of_the_scan():
    keep = torch.rand(2, 9, 3, dtype=torch.float64, requires_grad=True)
    new = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_scan, (keep, new))


@pytest.mark.parametrize("seed", range(6))
def test_sorting_equals_asking_everybody(seed):
    rng = random.Random(seed)
    N, E, k = rng.randint(1, 40), rng.randint(1, 6), rng.randint(1, 2)
    k = min(k, E)
    torch.manual_seed(seed)
    layer = Experts(4, ExpertsConfig(E, k, d_hidden=5)).eval()
    x, probs = torch.randn(N, 4), torch.rand(N, E).softmax(dim=-1)
    weights, chosen = route_tokens(probs, k)
    for seen in (chosen, drop_beyond(chosen, E, 0.7)):
        right = torch.zeros(N, 4)
        for n in range(N):
            for w, e in zip(weights[n], seen[n].tolist()):
                right[n] += w * layer.experts[e](x[n:n + 1])[0] if e < E else 0
        torch.testing.assert_close(run_experts(layer.experts, x, weights, seen), right)


def test_capacity_is_kept():
    chosen = torch.randint(5, (200, 2), generator=torch.Generator().manual_seed(0))
    seen = drop_beyond(chosen, 5, 1.0)
    assert torch.bincount(seen.flatten(), minlength=6)[:5].max() <= 80
    assert ((seen == chosen) | (seen == 5)).all()


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_every_kind_learns_is_saved_and_comes_back(kind, tmp_path):
    torch.manual_seed(0)
    text = torch.tensor([1, 2, 3, 4, 5, 6] * 40)
    model = make_kind(kind, 8, 16, 1, 2, 32, text, 3)
    batch = text[None, :24].repeat(4, 1), text[None, 1:25].repeat(4, 1), None
    if kind != "ngram":
        class Same:
            def __iter__(self):
                return self

            def __next__(self):
                return batch

        train(model, Same(), TrainConfig(60, lr=0.03, precision="float32"), watch=None)
    model.eval()
    assert (model(batch[0])[:, 6:].argmax(-1) == batch[1][:, 6:]).all()
    assert training_flops(model, 32) > 0 or kind == "ngram"
    save_kind(model, tmp_path / "model.safetensors")
    again = load_kind(tmp_path / "model.safetensors")
    torch.testing.assert_close(again(batch[0]), model(batch[0]))


def test_a_file_of_another_kind_or_damaged(tmp_path):
    path = tmp_path / "x.safetensors"
    save_kind(make_kind("gru", 8, 4), path)
    data = path.read_bytes()
    for wrong in (data[:-5], b"x" + data, data.replace(b'"gru\\"', b'"gnu\\"'), b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="x.safetensors"):
            load_kind(path)


def test_optimisers_take_recurrent_matrices():
    model = make_kind("lstm", 8, 4)
    muon, adam = make_optimizer(model, TrainConfig(1)).optimizers
    assert sorted(p.shape[0] for p in muon.params) == [16, 16] and len(adam.params) == 4


def test_experts_write_with_the_cache():
    from llm_course.generate.write import generate

    torch.manual_seed(0)
    model = ExpertGPT(GPTConfig(20, 32, 16, 2, 2), ExpertsConfig(4, 2)).eval()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p)
    written = list(generate(model, [1, 2, 3], 12, temperature=0))
    with torch.no_grad():
        row = [1, 2, 3]
        for _ in range(12):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    assert written == row[3:]


def test_links_are_right():
    "What has a source hardly surprises the best reader; told as the world tells."
    world = World(seed=0)
    for seed in range(8):
        told = tell_linked(world, random.Random(seed))
        assert "".join(p.text for p in told) == world.tell(random.Random(seed))[0]
        assert all(p.source < i for i, p in enumerate(told))
    tokenizer = WordTokenizer.train(world.sample(600, seed=1))
    rows = linked_rows(world, tokenizer, 6, seed=3)
    settled = torch.cat([r.floor[r.distance > 0] for r in rows])
    assert settled.mean() < 0.15
    others = torch.cat([r.floor[[k == "draw" for k in r.kinds]] for r in rows])
    assert others.mean() > 1


def test_the_record_is_complete():
    assert [p.kind for p in place_on_axis("flops")] == [*HISTORY]
    assert {"gpt", "5-gram", "lstm"} <= {p.kind for p in place_on_axis("seconds")}
    for kind in HISTORY:
        runs = [r for r in RECORD["runs"] if (r["kind"], r["budget"]) == (kind, "flops")]
        assert sorted(r["seed"] for r in runs) == [0, 1, 2]
    networks = [r for r in RECORD["runs"] if r["budget"] == "flops" and "gram" not in r["kind"]]
    cost = [r["flops_per_token"] for r in networks]
    assert max(cost) < 1.05 * min(cost), "not at equal FLOPs"
    assert len({r["stories"] for r in networks}) == 1


def test_the_script_repeats_an_ngram():
    spec = importlib.util.spec_from_file_location("history_script", ROOT / "experiments/history.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert {k: v for k, v in script.LR.items()} == RECORD["rates"]
    model, tokens, _ = script.count("2-gram", script.stories_of(0, RECORD["stories"]))
    run = next(r for r in RECORD["runs"] if r["kind"] == "2-gram" and r["seed"] == 0)
    assert tokens == run["tokens"]
    assert sum(b.numel() for b in model.buffers()) == run["numbers"]


def test_the_table_is_made_by_one_command():
    said = subprocess.run([sys.executable, "benchmarks/history.py", "--no-counting"], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert all(kind in said for kind in HISTORY)


def test_train_arch_from_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from llm_course.cli import app

    text, run = tmp_path / "rhyme.txt", tmp_path / "run"
    text.write_text("The cat saw the moon.\nThe hen fed the dog.\n" * 200, encoding="utf-8")
    small = "--tokenizer char --steps 4 --width 16 --context 32 --batch-size 4 --device cpu".split()

    def call(*more):
        return CliRunner().invoke(app, ["train", "--out", str(run), *more])

    first = call("--data", str(text), "--arch", "gru", *small)
    assert first.exit_code == 0, first.output
    assert load_kind(run / "gru.safetensors").config.cell == "gru"
    assert "nothing left to do" in call().output  # it knows what it is
    other = call("--arch", "lstm")
    assert other.exit_code and "--arch gru" in " ".join(other.output.split())
    wrong = call("--arch", "rwkv")
    assert wrong.exit_code and "choose from" in " ".join(wrong.output.split())
