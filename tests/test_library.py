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


# --- From logits ------------------------------------------------------------------------------------

def test_numbers_from_logits_equal_torchs():
    from llm_course.generate.logits import entropy_of_logits, target_cross_entropy, token_log_probs
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=g, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(11, (3, 7), generator=g)
    assert torch.allclose(entropy_of_logits(logits),
                          torch.distributions.Categorical(logits=logits).entropy())
    whole = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    found = token_log_probs(logits, tokens, rows=4)
    assert torch.allclose(found, whole)
    assert torch.allclose(torch.autograd.grad(found.sum(), logits)[0],
                          torch.autograd.grad(whole.sum(), logits)[0])
    targets = tokens.masked_fill(torch.rand(3, 7, generator=g) < 0.5, -100)
    for smooth in (0.0, 0.1):
        ours = target_cross_entropy(logits, targets, label_smoothing=smooth)
        assert torch.allclose(ours, nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), label_smoothing=smooth))
    nothing = target_cross_entropy(logits, torch.full_like(targets, -100))
    assert nothing == 0 and not torch.autograd.grad(nothing, logits)[0].any()


def test_the_entropy_of_a_filtered_distribution_has_no_nan():
    from llm_course.generate.logits import entropy_of_logits
    logits = torch.tensor([[1.0, 1.0, -math.inf]], requires_grad=True)
    entropy = entropy_of_logits(logits)
    assert math.isclose(entropy.item(), math.log(2), rel_tol=1e-6)
    entropy.sum().backward()
    assert logits.grad.isfinite().all()


def test_perplexity_over_windows_counts_every_token_once():
    from llm_course.generate.logits import window_perplexity
    seen = []

    def uniform(tokens):
        seen.append(tokens.shape[1])
        return torch.zeros(*tokens.shape, 10)

    for n in (2, 7, 8, 9, 30):
        for stride in (None, 1, 3, 7):
            assert math.isclose(window_perplexity(uniform, [1] * n, 8, stride), 10, rel_tol=1e-5)
    assert max(seen) == 8


# --- Averages, advantages, losses: TRL's published formulas -------------------------------------------

def test_masked_means_variances_and_whitening_are_trls():
    from llm_course.align.masked import masked_mean, masked_variance, whiten
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(4, 6, generator=g), torch.rand(4, 6, generator=g) < 0.6
    mean = (x * mask).sum() / mask.sum()
    n = mask.sum()
    variance = (((x - mean) ** 2) * mask).sum() / n * n / (n - 1)
    assert torch.allclose(masked_mean(x, mask), mean)
    assert torch.allclose(masked_mean(x, mask, 1), (x * mask).sum(1) / mask.sum(1))
    assert torch.allclose(masked_variance(x, mask), variance, atol=1e-6)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    assert torch.allclose(whiten(x, mask)[mask], white[mask], atol=1e-5)
    assert torch.allclose(whiten(x, mask, shift_mean=False)[mask], (white + mean)[mask], atol=1e-5)


@pytest.mark.parametrize("smooth", [0.0, 0.2])
@pytest.mark.parametrize("free", [False, True])
def test_preference_losses_per_pair_are_the_published_formulas(smooth, free):
    from llm_course.align.dpo import dpo_loss, implicit_reward, ipo_loss, kto_loss, simpo_loss
    g, F, beta = torch.Generator().manual_seed(0), nn.functional, 0.3
    c, r, rc, rr = (-5 * torch.rand(4, 6, generator=g)).unbind()
    refs = (None, None) if free else (rc, rr)
    logits = (c - r) - (0 if free else rc - rr)
    dpo = -F.logsigmoid(beta * logits) * (1 - smooth) - F.logsigmoid(-beta * logits) * smooth
    found = dpo_loss(c, r, *refs, beta, smooth, reduction="none")
    assert found.shape == (6,) and torch.allclose(found, dpo, atol=1e-6)
    assert torch.allclose(dpo_loss(c, r, *refs, beta, smooth), dpo.mean(), atol=1e-6)
    ipo = (logits - 1 / (2 * beta)) ** 2
    assert torch.allclose(ipo_loss(c, r, *refs, beta, reduction="none"), ipo, atol=1e-4)
    assert torch.allclose(implicit_reward(c, refs[0], beta), beta * (c - (0 if free else rc)))
    n, m = torch.randint(1, 9, (2, 6), generator=g).unbind()
    x = beta * (c / n - r / m) - 0.5
    simpo = -F.logsigmoid(x) * (1 - smooth) - F.logsigmoid(-x) * smooth
    assert torch.allclose(
        simpo_loss(c, r, n, m, beta, 0.5, smooth, reduction="none"), simpo, atol=1e-6)
    kl, good = torch.tensor(0.7), torch.tensor([True, False] * 3)
    kto = torch.where(good, 1 - torch.sigmoid(beta * ((c - rc) - kl)),
                      2 * (1 - torch.sigmoid(beta * (kl - (c - rc)))))
    ours = kto_loss(c, rc, good, kl, beta, bad_weight=2.0, reduction="none")
    assert torch.allclose(ours, kto, atol=1e-6)


def clean_rl_gae(rewards, values, ends, after, gamma, lam):
    "CleanRL's loop for one row."
    T, last, out = len(rewards), 0.0, [0.0] * len(rewards)
    for t in reversed(range(T)):
        following = after if t == T - 1 else values[t + 1]
        goes_on = 1.0 - ends[t]
        delta = rewards[t] + gamma * following * goes_on - values[t]
        out[t] = last = delta + gamma * lam * goes_on * last
    return out


def test_gae_with_ends_of_episodes_and_bootstrap_is_clean_rls():
    from llm_course.align.rl import gae
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 8, generator=g).unbind()
    ends, after = torch.rand(5, 8, generator=g) < 0.3, torch.randn(5, generator=g)
    lengths = torch.tensor([8, 1, 5, 3, 7])
    mask = torch.arange(8) < lengths[:, None]
    values[~mask] = torch.nan  # beyond the end anything may stand
    found, returns = gae(rewards, values, mask, 0.9, 0.8, ends, after)
    for i, n in enumerate(lengths.tolist()):
        expected = clean_rl_gae(*(x[i, :n].tolist() for x in (rewards, values)),
                                ends[i, :n].float().tolist(), after[i].item(), 0.9, 0.8)
        assert torch.allclose(found[i, :n], torch.tensor(expected), atol=1e-5)
    assert (found[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_whole_numbers_give_what_floats_give():
    "A tensor made like the user's own takes its kind: 0.95 becomes 0 among whole numbers."
    from llm_course.align import dpo, masked, rl
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(-4, 5, (2, 4, 6), generator=g).unbind()
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    calls = {
        "gae": lambda a, b: rl.gae(a, b, mask)[0], "returns": lambda a, b: rl.gae(a, b, mask)[1],
        "groups": lambda a, b: rl.group_advantages(a[:, 0], 2),
        "one left out": lambda a, b: rl.leave_one_out(a[:, 0], 2),
        "average": lambda a, b: rl.average_tokens(a, mask),
        "kl": lambda a, b: rl.kl_estimates(a, b).k3,
        "clip": lambda a, b: rl.clipped_policy_loss(a, b, a),
        "token rewards": lambda a, b: rl.token_rewards(a[:, 0], b, mask, 0.5),
        "mean": lambda a, b: masked.masked_mean(a, mask, 1),
        "white": lambda a, b: masked.whiten(a, mask),
        "dpo": lambda a, b: dpo.dpo_loss(a[:, 0], a[:, 1], b[:, 0], b[:, 1]),
        "ipo": lambda a, b: dpo.ipo_loss(a[:, 0], a[:, 1], b[:, 0], b[:, 1])}
    for name, call in calls.items():
        whole, floats = call(x, y), call(x.float(), y.float())
        assert torch.allclose(whole.float(), floats, atol=1e-6), name


def test_the_rest_of_policy_gradients_is_as_published():
    from llm_course.align.rl import (
        PolicyOutputs, group_advantages, policy_gradient_loss, ppo_loss, token_rewards)
    g = torch.Generator().manual_seed(0)
    kl, score = torch.rand(3, 5, generator=g), torch.randn(3, generator=g)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    paid = -0.2 * kl * mask
    for i, n in enumerate([5, 2, 3]):
        paid[i, n - 1] += score[i]
    assert torch.allclose(token_rewards(score, kl, mask, 0.2), paid)
    logp = -torch.rand(3, 5, generator=g)
    assert torch.allclose(policy_gradient_loss(logp, paid, mask), -(logp * paid)[mask].mean())
    old, new = (PolicyOutputs(logp, None, torch.randn(3, 5, generator=g)) for _ in range(2))
    returns = torch.randn(3, 5, generator=g)
    for clip in (0.1, 1.0, math.inf):
        held = torch.clamp(new.values, old.values - clip, old.values + clip)
        error = torch.max((new.values - returns) ** 2, (held - returns) ** 2)
        found = ppo_loss(new, old, paid, returns, mask, clip=0.2, value_clip=clip)
        assert torch.allclose(found.value, 0.5 * error[mask].mean(), atol=1e-6)
    rewards = torch.randn(8, generator=g).view(2, 4)
    expected = (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 0.5)
    assert torch.allclose(group_advantages(rewards.flatten(), 4, eps=0.5), expected.flatten())


# --- Parts of the model -------------------------------------------------------------------------------

def test_angles_are_right_at_position_131071():
    from llm_course.model.embedding import Rope, sinusoidal
    d, at = 64, torch.tensor([0, 1000, 131_071])
    speeds = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    exact = at.double()[:, None] * speeds
    waves = sinusoidal(at, d)
    assert waves.dtype == torch.float32
    assert (waves - torch.cat([exact.sin(), exact.cos()], 1)).abs().max() < 1e-7
    x = torch.randn(2, 3, 3, d, generator=torch.Generator().manual_seed(0))
    a, b = x.double().chunk(2, -1)
    turned = torch.cat([a * exact.cos() - b * exact.sin(), b * exact.cos() + a * exact.sin()], -1)
    assert (Rope(16, d)(at=at)(x) - turned).abs().max() < 1e-5
    rows = torch.stack([at, at.flip(0)])[:, None]  # other positions in each row of the batch
    both = Rope(16, d)(at=rows)(x)
    assert torch.allclose(both[0], Rope(16, d)(at=at)(x)[0])
    assert torch.allclose(both[1], Rope(16, d)(at=at.flip(0))(x)[1])


def test_both_gelus_are_torchs():
    from llm_course.model.block import FeedForward, gelu, gelu_erf
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert torch.equal(gelu_erf(x), nn.GELU()(x)) and torch.equal(gelu(x), nn.GELU("tanh")(x))
    assert (gelu(x) - gelu_erf(x)).abs().max() > 1e-4
    assert FeedForward(8, activation="gelu-erf").bend is gelu_erf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7), (2, 4, 5, 7)])
def test_attention_takes_any_mask_also_one_that_hides_all(shape, dtype):
    from llm_course.model.attention import attend
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=g).to(dtype).requires_grad_() for n in (5, 7, 7))
    mask = torch.rand(shape, generator=g) < 0.5
    mask[..., 2, :] = False
    out = attend(q, k, v, mask=mask)
    full = mask.expand(2, 4, 5, 7)
    scores = (q.double() @ k.double().transpose(-2, -1) / 8**0.5).masked_fill(~full, -1e30)
    expected = (scores.softmax(-1) * full) @ v.double()
    assert (out - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)
    assert not out[:, :, 2].any()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v)) and not q.grad[:, :, 2].any()


# --- Adapters -----------------------------------------------------------------------------------------

def adapted(style, seed=0):
    "A model, and a copy with a trained-looking adapter."
    from llm_course.align.lora import LoRA, add_lora
    from llm_course.model.gpt import GPT, GPTConfig
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    base = GPT(GPTConfig(30, 16, 16, 2, 2, style=style)).eval()
    for p in base.parameters():
        p.data.normal_(generator=g).mul_(0.2)
    model = add_lora(copy.deepcopy(base), rank=3, alpha=5.0)
    for m in model.modules():
        if isinstance(m, LoRA):
            m.up.data.normal_(generator=g)
    return base, model


@pytest.mark.parametrize("style", ["COURSE", "GPT2", "LLAMA"])
def test_an_adapter_is_saved_as_an_adapter_and_merged_when_asked(tmp_path, style):
    from llm_course.align.lora import load_lora, merge_lora, save_lora
    from llm_course.model import block
    from llm_course.model.files import load_model, save_model
    base, model = adapted(getattr(block, style))
    row = torch.randint(30, (2, 9))
    with pytest.raises(ValueError, match="save_lora"):
        save_model(model, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    save_lora(model, tmp_path)
    assert torch.equal(load_lora(copy.deepcopy(base), tmp_path)(row), model(row))
    save_model(merge_lora(copy.deepcopy(model)), tmp_path / "m.safetensors")
    assert torch.allclose(load_model(tmp_path / "m.safetensors")(row), model(row), atol=1e-4)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.allclose(theirs(row), model(row), atol=1e-4)


def test_an_adapter_that_peft_made_is_loaded(tmp_path):
    from llm_course.align.lora import load_lora
    from llm_course.model.block import LLAMA
    peft = pytest.importorskip("peft")
    base, _ = adapted(LLAMA)
    for more in ({}, {"use_rslora": True}):
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "down"],
                                 init_lora_weights=False, **more)
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        theirs.save_pretrained(str(tmp_path))
        row = torch.randint(30, (2, 9))
        ours = load_lora(copy.deepcopy(base), tmp_path)
        assert torch.allclose(ours(row), theirs(row), atol=1e-4)
        assert all(p.requires_grad == ("up" in n.split(".")[-1] or "down" == n.split(".")[-1])
                   for n, p in ours.named_parameters())


def test_an_adapter_of_another_model_is_refused_and_changes_nothing(tmp_path):
    from llm_course.align.lora import load_lora, save_lora
    from llm_course.model.block import COURSE, LLAMA
    base, model = adapted(LLAMA)
    save_lora(model, tmp_path)
    other, _ = adapted(COURSE)
    before = other.state_dict().keys()
    with pytest.raises(ValueError, match="does not fit"):
        load_lora(other, tmp_path)
    assert other.state_dict().keys() == before
    for name, text in (("adapter_config.json", "{}"), ("adapter_model.safetensors", "x")):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="no adapter"):
            load_lora(copy.deepcopy(base), tmp_path)
        (tmp_path / name).write_bytes(good)


# --- Answers ------------------------------------------------------------------------------------------

NASTY = [
    ("last_number", "", None), ("last_number", "The total is 1,234,567.", 1234567),
    ("last_number", "#### 72", 72), ("last_number", "She has $18.50 left!", 18.5),
    ("last_number", "5 + 3 = 8\n\nSo the answer is **8**.", 8), ("last_number", "x=-0.5", -0.5),
    ("last_number", "between 3-4", 4), ("last_number", "1/3", 1 / 3),
    ("last_number", "v1.2.3", None), ("last_number", "in 2024, he had 12 apples.", 12),
    ("last_number", "9" * 5000, None), ("last_number", "1e5", 100000), ("last_number", "NaN", None),
    ("last_number", "\u0663", 3), ("last_number", "1,2,3,4", 4), ("last_number", "100%", 100),
    ("choice_letter", "(C)", "C"), ("choice_letter", "A", "A"), ("choice_letter", "answer is: d.", "D"),
    ("choice_letter", "I think A or B", None), ("choice_letter", "ANSWER: B", "B"),
    ("choice_letter", "A cat sat. The answer is B) because A is wrong", "B"),
    ("choice_letter", "The answer is \\boxed{\\text{C}}", "C"), ("choice_letter", "ABCD", None),
    ("choice_letter", "**Answer**: D", "D"), ("choice_letter", "Answer: **D**", "D"),
    ("choice_letter", "Answer: Because", None), ("choice_letter", "B\n", "B"),
    ("boxed_answer", "\\boxed{{1}}", "{1}"), ("boxed_answer", "\\boxed {x}", "x"),
    ("boxed_answer", "\\boxed{a}} \\boxed{", "a"), ("boxed_answer", "}{\\boxed{", None),
    ("boxed_answer", "\\boxed{\\text{a } b}", "\\text{a } b"), ("boxed_answer", "\\boxed{}", "")]


@pytest.mark.parametrize("parser, text, answer", NASTY)
def test_answers_are_read_out_of_nasty_texts(parser, text, answer):
    from llm_course.evaluate import parse
    found = getattr(parse, parser)(text)
    assert found == answer


def test_parsers_take_linear_time():
    import time

    from llm_course.evaluate import parse
    for parser in (parse.last_number, parse.choice_letter, parse.boxed_answer):
        for piece in ("1", "1,", "1/", "answer ", "answer is", " ", "\\boxed{", "{", "}", "(A", "-"):
            start = time.process_time()
            parser(piece * (200_000 // len(piece)))
            assert time.process_time() - start < 2, (parser.__name__, piece)
