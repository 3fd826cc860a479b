"""The training step: the precision it is computed in, and its loss with less traffic."""

import itertools
import random
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_course.align import pair_tuner, policy_tuner
from llm_course.align.chat import add_chat_tokens
from llm_course.align.pair_tuner import PreferenceConfig, PreferenceTuner
from llm_course.align.policy_tuner import PolicyConfig, PolicyTuner
from llm_course.data.batches import RandomWindows
from llm_course.data.shards import memory_shards
from llm_course.model.block import COURSE, GPT2, LLAMA
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.model.lean import fits_lean, lean_nats
from llm_course.tokens.text import ByteTokenizer
from llm_course.train import precision, ranks, state
from llm_course.train.loop import TrainConfig, Trainer, evaluate, summed_loss
from llm_course.train.optim import Muon, newton_schulz
from llm_course.train.precision import bfloat16_units, pick_precision
from llm_course.train.scale import recompute_blocks
from llm_course.world.talk import AnswerPair
from llm_course.world.writers import say

CPU, LOW, HIGH = torch.device("cpu"), torch.bfloat16, torch.float32


@pytest.fixture
def fresh():
    "No decision from before, and none left behind."
    pick_precision.cache_clear()
    yield
    pick_precision.cache_clear()


def choose(dtype):
    "Stands for `pick_precision` on another computer."
    return lambda device: dtype


class DisturbedClock:
    "Products take `slow` and `fast` ms in turn, and something else runs in seven of ten."

    def __init__(self, seed, slow, fast):
        self.random, self.now, self.calls = random.Random(seed), 0.0, itertools.count()
        self.costs = itertools.cycle([slow, fast])

    def perf_counter(self):
        if next(self.calls) % 2:  # the end of a product
            self.now += next(self.costs) + (self.random.random() < 0.7) * self.random.uniform(1, 30)
        return self.now


@pytest.mark.parametrize("fast, units, wanted", [
    (1, "bf16", LOW), (1, "unknown", LOW), (4, "AMX", LOW), (4, "unknown", HIGH), (6, "bf16", HIGH)])
def test_a_busy_machine_does_not_decide_the_precision(fast, units, wanted, monkeypatch, fresh):
    monkeypatch.setattr(precision, "bfloat16_units", lambda: units)
    for seed in range(100):
        clock = DisturbedClock(seed, 5, fast)
        monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=clock.perf_counter))
        pick_precision.cache_clear()
        assert pick_precision(CPU) == wanted


def test_a_processor_without_the_instructions_is_believed(monkeypatch, fresh):
    monkeypatch.setattr(precision, "bfloat16_units", lambda: "none")
    monkeypatch.setattr(precision, "_race", lambda: pytest.fail("no race is needed"))
    assert pick_precision(CPU) == HIGH


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/cpuinfo")
def test_torch_and_the_kernel_say_the_same_of_the_processor():
    assert bfloat16_units() in (precision._flags_on_linux(), "unknown")


def test_muon_computes_in_what_is_fast_here():
    x = torch.randn(3, 24, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(newton_schulz(x), newton_schulz(x, dtype=pick_precision(CPU)))
    assert not torch.equal(newton_schulz(x, dtype=HIGH), newton_schulz(x, dtype=LOW))


def make_trainer(auto="auto"):
    torch.manual_seed(0)
    shards = memory_shards(["the cat sat on the mat " * 20], ByteTokenizer())
    model = GPT(GPTConfig(shards.vocab_size, 32, 32, 1, 2))
    return Trainer(model, RandomWindows(shards, 4, 32), TrainConfig(steps=9, precision=auto))


def make_chat():
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    return add_chat_tokens(tokenizer, GPT(GPTConfig(tokenizer.vocab_size, 64, 32, 1, 2)))


def make_policy():
    tokenizer, model = make_chat()
    reward = lambda messages, answers: torch.tensor([float(len(a)) for a in answers])  # noqa: E731
    config = PolicyConfig(steps=9, batch_size=4, group=2, max_new_tokens=4)
    return PolicyTuner(model, tokenizer, [say("Hi")], reward, config)


def make_pairs():
    tokenizer, model = make_chat()
    pairs = [AnswerPair(say(f"{n} and {n}?"), "Yes.", "Go away.") for n in range(6)]
    return PreferenceTuner(model, tokenizer, pairs, PreferenceConfig(steps=9, batch_size=2))


JOBS = {"train": make_trainer, "policy": make_policy, "pairs": make_pairs}


@pytest.mark.parametrize("make", JOBS.values(), ids=JOBS)
@pytest.mark.parametrize("here, there", [(LOW, HIGH), (HIGH, LOW)])
def test_a_run_keeps_its_precision_on_another_machine(make, here, there, monkeypatch):
    def machine(dtype):
        for module in ranks, policy_tuner, pair_tuner:
            monkeypatch.setattr(module, "pick_precision", choose(dtype))
        return make()

    job = machine(here)
    job.take_step()
    tensors, facts = job.state()
    tensors = {name: t.clone() for name, t in tensors.items()}
    assert facts["dtype"] == str(here).removeprefix("torch.")
    other = machine(there)
    assert other.dtype == there
    other.load_state(tensors, facts)
    assert other.dtype == here
    for one in job, other:
        one.take_step()
    for a, b in zip(job.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_optimizers_products_have_the_runs_precision(name):
    muon, _ = make_trainer(name).optimizer.optimizers
    assert isinstance(muon, Muon)
    assert muon.dtype == (HIGH if name == "float16" else getattr(torch, name))


def model_of(style=COURSE, **changes):
    g = torch.Generator().manual_seed(1)
    model = GPT(GPTConfig(60, 24, 32, 2, 4, style=style, **changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=g)
    return model


def gradients(f, model, tokens, targets, dtype):
    model.zero_grad()
    loss = f(model, tokens, targets, dtype)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


MASKS = {
    "all": lambda g: torch.ones(3, 20, dtype=torch.bool),
    "padding": lambda g: torch.arange(20) < torch.tensor([[20], [7], [1]]),
    "answers": lambda g: torch.rand(3, 20, generator=g) < 0.3,
    "an empty row": lambda g: (torch.arange(3) != 1)[:, None].expand(3, 20),
    "nothing": lambda g: torch.zeros(3, 20, dtype=torch.bool),
    "the first only": lambda g: (torch.arange(20) == 0).expand(3, 20)}
KINDS = {"course": {}, "gpt2": {"style": GPT2}, "llama": {"style": LLAMA}, "shared": {
    "n_kv_heads": 2}, "window": {"window": 5}, "odd": {"d_hidden": 56}}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_lean_loss_is_the_loss(kind, mask):
    g, model = torch.Generator().manual_seed(0), model_of(**kind)
    tokens = torch.randint(60, (3, 20), generator=g)
    targets = torch.randint(60, (3, 20), generator=g).masked_fill(~mask(g), -100)
    assert fits_lean(model, HIGH)
    nats, slope = gradients(lean_nats, model, tokens, targets, HIGH)
    plain, usual = gradients(summed_loss, model, tokens, targets, HIGH)
    assert nats == pytest.approx(plain, rel=1e-5, abs=1e-4)
    assert (slope - usual).norm() <= 1e-5 * usual.norm()
    short, low = gradients(summed_loss, model, tokens, targets, LOW)
    nats, slope = gradients(lean_nats, model, tokens, targets, LOW)
    assert abs(nats - plain) <= 2 * abs(short - plain) + 0.003 * abs(plain)
    assert (slope - usual).norm() <= 1.5 * (low - usual).norm() + 1e-6


def test_an_impossible_target_has_a_finite_loss():
    model = model_of()
    with torch.no_grad():
        model.head.weight.mul_(1000)
    tokens, targets = torch.arange(20)[None], torch.arange(1, 21)[None]
    nats, slope = gradients(lean_nats, model, tokens, targets, HIGH)
    plain, usual = gradients(summed_loss, model, tokens, targets, HIGH)
    assert nats == pytest.approx(plain, rel=1e-5) and plain > 1000
    assert (slope - usual).norm() <= 1e-4 * usual.norm()


def test_what_was_changed_computes_its_own_loss():
    assert fits_lean(model_of(), LOW)
    assert not fits_lean(model_of(), torch.float16) and not fits_lean(model_of().double(), HIGH)
    assert not fits_lean(recompute_blocks(model_of()), HIGH)
    assert not fits_lean(nn.DataParallel(model_of()), HIGH)
    model = model_of()
    model.blocks[1].register_full_backward_hook(lambda *_: None)
    assert not fits_lean(model, HIGH)
    model, tokens = model_of(), torch.arange(20)[None]
    layer = model.blocks[0].feed_forward
    layer.up = nn.Sequential(layer.up, nn.Hardtanh(-0.1, 0.1))  # as an adapter is put in
    logits = model(tokens)[0, :-1]
    plain = F.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    assert lean_nats(model, tokens, targets).item() == pytest.approx(plain, rel=1e-5)


def test_looking_has_the_same_loss_and_leaves_no_gradient():
    trainer = make_trainer()
    batch = next(trainer.batches)
    assert evaluate(trainer.model, [batch]) == pytest.approx(
        summed_loss(trainer.model, *batch[:2]).item() / batch[1].numel(), rel=1e-5)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert state.common_precision(CPU) == pick_precision(CPU)
