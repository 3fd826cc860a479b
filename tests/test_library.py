"""What a library's user looks for, against torch, transformers, PEFT, and TRL's published formulas."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from llm_course.train.optim import SGD, AdamW, Muon

KINDS = {"sgd": (lambda p: SGD(p, 0.1, 0.9), lambda p: torch.optim.SGD(p, 0.1, 0.9)),
         "adamw": (lambda p: AdamW(p, 0.1), lambda p: torch.optim.AdamW(
             p, 0.1, (0.9, 0.95), weight_decay=0.0)),
         "muon": (lambda p: Muon(p, 0.1), None)}


def descend(make, schedule=None, steps=8, scaler=None, start=None):
    "Walk on a quadratic in double precision; returns the weights."
    g = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(4, 3, generator=g, dtype=torch.float64))
    goal = torch.randn(4, 3, generator=g, dtype=torch.float64)
    optimizer = make([w])
    scheduler = schedule and schedule(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (w - goal).square().sum()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        if scheduler:
            scheduler.step()
    return w.detach()


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=9)}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_torchs_schedulers_drive_our_optimisers(name, schedule):
    ours, theirs = KINDS[name]
    a, b = (descend(make, SCHEDULERS[schedule]) for make in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-7)
    assert not torch.allclose(a, descend(ours), atol=1e-3)


def test_torchs_schedulers_drive_muon():
    optimizer = Muon([nn.Parameter(torch.randn(4, 3))], 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for expected in (0.1, 0.05, 0.025):
        assert math.isclose(optimizer.lr, expected)
        optimizer.params[0].grad = torch.randn(4, 3)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_torchs_gradient_scaler_steps_our_optimisers(name):
    ours, theirs = KINDS[name]
    a, b = (descend(make, scaler=torch.amp.GradScaler("cpu")) for make in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_optimiser_goes_on_bit_for_bit(name):
    make, g = KINDS[name][0], torch.Generator().manual_seed(0)
    a = nn.Parameter(torch.randn(4, 3, generator=g))
    gradients = torch.randn(6, 4, 3, generator=g)
    first, b = make([a]), None
    for i, gradient in enumerate(gradients):
        if i == 3:
            saved, b = copy.deepcopy(first.state_dict()), nn.Parameter(a.detach().clone())
            second = make([b])
            second.load_state_dict(saved)
            first_copy = copy.deepcopy(first)
            assert first_copy.steps == first.steps and first_copy.lr == first.lr
        for p, optimizer in ((a, first), (b, b is not None and second)):
            if p is not None:
                p.grad = gradient.clone()
                optimizer.step()
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="other parameters"):
        make([nn.Parameter(torch.zeros(3, 3))]).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="another optimiser"):
        other = AdamW if name != "adamw" else SGD
        other([nn.Parameter(torch.zeros(4, 3))], 0.1).load_state_dict(first.state_dict())


def test_an_optimiser_does_not_load_torchs_compiler():
    code = ("import sys, torch; from llm_course.train.optim import AdamW; "
            "AdamW([torch.zeros(2, requires_grad=True)], 0.1); "
            "print('torch._dynamo' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr
