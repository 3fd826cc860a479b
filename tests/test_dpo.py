"""Lessons 77 to 79: losses against hand and textbook; pairs, tuning, best of n, refusals."""

import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm_course.align.answers import answer_mask
from llm_course.align.choose import best_of_n, best_of_n_expected, best_of_n_kl
from llm_course.align.dpo import answer_log_probs, dpo_loss, ipo_loss, orpo_loss, simpo_loss
from llm_course.align.pair_tuner import (
    PAIR_METHODS,
    PreferenceConfig,
    _PairScorer,
    preference_loss,
    sample_pairs,
    train_dpo,
)
from llm_course.align.refuse import refusal_errors
from llm_course.evaluate.scores import wilson_interval
from llm_course.align.chat import add_chat_tokens, render
from llm_course.world.writers import say
from llm_course.core import asset
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.text import ByteTokenizer

METHODS = list(PAIR_METHODS)


def pair(question: str, chosen: str, rejected: str) -> SimpleNamespace:
    return SimpleNamespace(messages=say(question), chosen=chosen, rejected=rejected)


@pytest.fixture(scope="module")
def start() -> tuple:
    "A small model that knows nothing, and its tokenizer."
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    model = GPT(GPTConfig(tokenizer.vocab_size, 64, 32, 2, 2))
    tokenizer, model = add_chat_tokens(tokenizer, model)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def pairs() -> list:
    names = ["Ada", "Bo", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal", "Ida", "Jo"]
    return [pair(f"Who is {name}?", f"{name}, please.", "Go away.") for name in names]


def test_losses_equal_numbers_worked_out_by_hand():
    c, r, rc, rr = (torch.tensor([x]) for x in (-4.0, -6.0, -5.0, -5.0))
    # the chosen one gained 1 nat and the rejected one lost 1: a lead of 2
    assert math.isclose(dpo_loss(c, r, rc, rr, 0.5), math.log(1 + math.exp(-1)), abs_tol=1e-6)
    assert math.isclose(ipo_loss(c, r, rc, rr, 0.5), 1.0, abs_tol=1e-6)  # (2 - 1)^2
    n, m = torch.tensor([2.0]), torch.tensor([6.0])
    # means per token are -2 and -1: a lead of -1, times 2, minus 1
    assert math.isclose(simpo_loss(c, r, n, m, 2.0, 1.0), math.log(1 + math.exp(3)), abs_tol=1e-5)
    p, q = math.exp(-2), math.exp(-1)
    ratio = (p / (1 - p)) / (q / (1 - q))
    expected = 2 + 0.1 * math.log(1 + 1 / ratio)
    assert math.isclose(orpo_loss(c, r, n, m, 0.1), expected, abs_tol=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_a_model_that_is_the_reference_pays_ln_2(beta):
    x, y = -10 * torch.rand(2, 5)
    assert math.isclose(dpo_loss(x, y, x, y, beta), math.log(2), abs_tol=1e-6)
    assert math.isclose(ipo_loss(x, y, x, y, beta), (1 / (2 * beta)) ** 2, rel_tol=1e-5)


def textbook(method: str, c: list, r: list, n: list, m: list, rc: list, rr: list, beta: float):
    "The papers' formulas, pair by pair, in float64."
    losses = []
    for i in range(len(c)):
        if method == "dpo":
            h = beta * (c[i] - rc[i]) - beta * (r[i] - rr[i])
            losses.append(-torch.log(1 / (1 + torch.exp(-h))))
        elif method == "ipo":
            h = torch.log(torch.exp(c[i]) * math.exp(rr[i]) / (torch.exp(r[i]) * math.exp(rc[i])))
            losses.append((h - 1 / (2 * beta)) ** 2)
        elif method == "simpo":
            h = beta / n[i] * c[i] - beta / m[i] * r[i] - 1.0
            losses.append(-torch.log(1 / (1 + torch.exp(-h))))
        else:
            good, bad = torch.exp(c[i] / n[i]), torch.exp(r[i] / m[i])
            ratio = torch.log(good / (1 - good) / (bad / (1 - bad)))
            losses.append(-c[i] / n[i] - beta * torch.log(1 / (1 + torch.exp(-ratio))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_equal_the_textbook(method, seed):
    g = torch.Generator().manual_seed(seed)
    told, reference = (-8 * torch.rand(2, 5, 2, generator=g, dtype=torch.float64) - 0.1).unbind()
    lengths = torch.randint(1, 9, (5, 2), generator=g)
    told.requires_grad_()
    config = PreferenceConfig(method, beta=0.3, steps=1)
    loss = preference_loss(config, told, reference, lengths)
    (gradient,) = torch.autograd.grad(loss, told)
    columns = [x.T for x in (told, lengths, reference)]
    expected = textbook(method, *columns[0], *columns[1], *columns[2].tolist(), 0.3)
    (wanted,) = torch.autograd.grad(expected, told)
    assert torch.allclose(loss, expected)
    assert torch.allclose(gradient, wanted)
    if method != "ipo":  # which lowers what is too far ahead
        assert (gradient[:, 0] < 0).all() and (gradient[:, 1] > 0).all()


def test_log_probs_count_the_answer_and_its_end_only(start):
    model, tokenizer = start
    messages = say("Hi <|assistant|> there", "Good day.", "And now?")
    whole = [*messages, {"role": "assistant", "content": "Bye."}]
    tokens = render(tokenizer, whole).tokens
    prompt = render(tokenizer, messages, reply=True).tokens
    padded = torch.tensor([tokens + [-1] * 3, tokens[:4] + [-1] * (len(tokens) - 1)])
    padded[1, 2] = tokenizer.special_tokens["<|assistant|>"]
    mask = answer_mask(padded, tokenizer.special_tokens["<|assistant|>"])
    assert mask[0].nonzero()[:, 0].tolist() == list(range(len(prompt), len(tokens)))
    assert mask[1].nonzero()[:, 0].tolist() == [3]
    found = answer_log_probs(model, padded, mask)
    log_probs = model(torch.tensor([tokens]))[0].log_softmax(dim=-1)
    expected = sum(log_probs[i - 1, tokens[i]] for i in range(len(prompt), len(tokens)))
    assert torch.allclose(found[0], expected, atol=1e-4)


def test_scores_do_not_depend_on_who_else_is_in_the_batch(start, pairs):
    model, tokenizer = start
    mixed = [*pairs, pair("Hm?", "a", "a much longer answer than that")]
    scorer = _PairScorer(model, tokenizer, mixed, torch.float32)
    with torch.no_grad():
        alone = [scorer.score(model, [i])[0] for i in range(len(mixed))]
    assert torch.allclose(torch.cat(alone), scorer.reference, atol=1e-4)
    assert scorer.lengths[-1].tolist() == [3, 32]  # a space before, an end behind


@pytest.mark.parametrize("method", METHODS)
def test_tuning_prefers_what_people_prefer(method, start, pairs):
    model, tokenizer = copy.deepcopy(start[0]), start[1]
    settings = dict(steps=30, batch_size=5, lr=3e-3, max_new_tokens=8)
    settings |= dict(valid=pairs[7:], eval_every=15)
    rows = train_dpo(model, tokenizer, pairs[:7], method, **settings)
    assert [row["step"] for row in rows] == list(range(30))
    assert rows[0]["margin"] == 0 and rows[0]["accuracy"] == 0.5
    assert rows[-1]["valid_accuracy"] == 1 and rows[-1]["valid_margin"] > 1
    assert rows[-1]["kl"] > 0 and "kl" in rows[14] and "kl" not in rows[13]
    assert not model.training


def test_the_first_dpo_loss_is_ln_2_and_the_reference_stays(start, pairs):
    model, tokenizer = copy.deepcopy(start[0]), start[1]
    before = {name: w.clone() for name, w in start[0].state_dict().items()}
    rows = train_dpo(model, tokenizer, pairs, reference=start[0], steps=3, batch_size=4)
    assert math.isclose(rows[0]["loss"], math.log(2), abs_tol=1e-5)
    assert all(torch.equal(w, before[name]) for name, w in start[0].state_dict().items())
    assert any(not torch.equal(w, before[name]) for name, w in model.state_dict().items())


class Stop(Exception):
    pass


def stop_at(step: int):
    def watch(t):
        if t.step == step:
            raise Stop

    return watch


def test_a_run_that_was_killed_goes_on_to_the_last_bit(start, pairs, tmp_path):
    settings = dict(steps=12, batch_size=3, lr=3e-3, max_new_tokens=6, seed=3)
    settings |= dict(eval_every=4, save_every=4, valid=pairs[7:])

    def run(folder=None, watch=None, **more):
        model = copy.deepcopy(start[0])
        rows = train_dpo(
            model, start[1], pairs[:7], folder=folder, watch=watch, **{**settings, **more}
        )
        return rows, model.state_dict()

    rows, weights = run()
    with pytest.raises(Stop):
        run(tmp_path, stop_at(7))
    again, others = run(tmp_path)
    assert again == rows
    assert all(torch.equal(w, others[name]) for name, w in weights.items())
    assert run(tmp_path)[0] == rows  # a finished run is only read
    with pytest.raises(ValueError, match="lr was 0.003 and is 0.001"):
        run(tmp_path, lr=1e-3)
    with pytest.raises(ValueError, match="seed was 3 and is 4"):
        run(tmp_path, seed=4)


def test_misuse_is_named(start, pairs):
    model, tokenizer = start
    with pytest.raises(ValueError, match="method is 'dop'"):
        train_dpo(model, tokenizer, pairs, "dop", steps=1)
    with pytest.raises(ValueError, match="beta is -1"):
        train_dpo(model, tokenizer, pairs, beta=-1, steps=1)
    with pytest.raises(ValueError, match="budget"):
        train_dpo(model, tokenizer, pairs)
    same = [pair("Who?", "I.", "I."), pair("x" * 99, "I.", "You.")]
    with pytest.raises(ValueError, match="1 have two answers that are alike"):
        train_dpo(model, tokenizer, same, steps=1)


def test_best_of_n_keeps_the_best(start):
    model, tokenizer = start
    prompts = [say("Who?"), say("What is it?")]

    def longest(conversations, answers):
        assert len(conversations) == len(answers) == 10
        return torch.tensor([float(len(answer)) for answer in answers])

    g = torch.Generator().manual_seed(0)
    best = best_of_n(model, tokenizer, prompts, longest, 5, 12, generator=g)
    assert best.every.shape == (2, 5) and len(best.answers) == 2
    assert best.rewards.tolist() == best.every.amax(dim=1).tolist()
    assert [len(a) for a in best.answers] == best.rewards.tolist()
    assert math.isclose(best.kl, math.log(5) - 4 / 5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_best_of_n_never_keeps_an_answer_whose_reward_is_no_number(start, value):
    model, tokenizer = start
    prompts = [say("Who?"), say("What is it?")]
    rewards = torch.tensor([1.0, value, 3.0, value, 2.0, value, -5.0, value, value, value])
    best = best_of_n(model, tokenizer, prompts, lambda m, a: rewards, 5, 12)
    assert best.rewards.tolist() == [3.0, -5.0]
    rewards[6] = value
    with pytest.raises(ValueError, match="no answer to prompt 1 has a reward that is a number"):
        best_of_n(model, tokenizer, prompts, lambda m, a: rewards, 5, 12)
    good = torch.ones(1, 4)
    for proxy, true in [(good, good * value), (good * value, good)]:
        with pytest.raises(ValueError, match="NaN or infinite"):
            best_of_n_expected(proxy, true, 2)


def test_the_bound_of_best_of_n_holds_and_is_sharp_for_many_answers():
    assert best_of_n_kl(1) == 0
    for n in (2, 4, 16):
        for size in (2, 5, 1000):  # answers, all of the same probability, the last one best
            cdf = torch.arange(size + 1, dtype=torch.float64) / size
            best = (cdf**n).diff()
            kl = (best * (best * size).log()).nansum().item()
            assert kl <= best_of_n_kl(n) + 1e-9
        assert kl > 0.98 * best_of_n_kl(n)


def test_best_of_curve_equals_drawing(start):
    g = torch.Generator().manual_seed(0)
    proxy = torch.randint(6, (2, 12), generator=g).float()
    true = torch.rand(2, 12, generator=g)
    for n in (1, 2, 5):
        found = best_of_n_expected(proxy, true, n)
        draws = torch.randint(12, (40_000, n), generator=g)
        p, t = proxy[:, draws], true[:, draws]  # (2, 40000, n)
        noise = 1e-3 * torch.rand(p.shape, generator=g)  # equal ones are chosen by chance
        best = (p + noise).argmax(dim=-1, keepdim=True)
        assert math.isclose(found[0], p.amax(dim=-1).mean(), abs_tol=0.02)
        assert math.isclose(found[1], t.gather(-1, best).mean(), abs_tol=0.01)
        assert -1e-9 < found[2] <= best_of_n_kl(n) + 1e-9
    assert best_of_n_expected(proxy, true, 1)[2] == pytest.approx(0, abs=1e-9)


def test_pairs_of_own_answers(start):
    model, tokenizer = start
    prompts = [say("Who?"), say("What is it?")]
    seen = []

    def compare(messages, a, b):
        seen.append((messages, a, b))
        return None if len(seen) == 1 else pair(messages[0]["content"], a, b)

    found = sample_pairs(model, tokenizer, prompts, compare, n=3, max_new_tokens=8)
    assert len(found) == len(seen) - 1 and len(seen) <= 6
    assert all(a != b for _, a, b in seen)
    again = sample_pairs(model, tokenizer, prompts, pair_of, n=3, max_new_tokens=8)
    assert [(p.chosen, p.rejected) for p in again] == [(a, b) for _, a, b in seen]


def pair_of(messages, a, b):
    return pair(messages[0]["content"], a, b)


@pytest.mark.parametrize("k, n", [(0, 20), (1, 20), (10, 20), (20, 20), (95, 100)])
def test_wilson_holds_the_shares_that_do_not_surprise(k, n):
    found = wilson_interval(k, n)
    assert 0 <= found.low <= k / n <= found.high <= 1
    for edge in (found.low, found.high):  # there, what was seen is 1.96 standard deviations away
        if 0 < edge < 1:
            assert abs(k / n - edge) == pytest.approx(1.96 * math.sqrt(edge * (1 - edge) / n))


def test_both_errors_of_refusing_are_counted(start):
    model, tokenizer = start
    harmful, harmless = [say("Tell me!")] * 4, [say("Please?")] * 6
    answers = iter([True, True, True, False, True, False, False, False, False, False])
    found = refusal_errors(
        model, tokenizer, harmful, harmless, lambda m, a: next(answers), max_new_tokens=4
    )
    assert found.answered.share == 0.25 and found.refused.share == pytest.approx(1 / 6)


# --- What was recorded --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict:
    "Full runs, made by `python experiments/align.py --measure pairs best refusal`."
    return json.loads(asset("align.json").read_text(encoding="utf-8"))


def gap_closed(start: float, run: dict) -> float:
    "The share of the gap to a reward of 1 on held-out prompts, if the KL is small enough."
    last = run["looks"][-1]
    return (last["true"] - start) / (1 - start) if last["kl"] < 15 else 0.0


def test_dpo_closes_a_quarter_of_the_gap_with_every_seed(recorded):
    start = recorded["pairs"]["start"]["true"]
    runs = [r for r in recorded["pairs"]["runs"] if r["method"] == "dpo" and r["prompts"] == 1000]
    assert len({run["seed"] for run in runs}) >= 3
    assert min(gap_closed(start, run) for run in runs) >= 0.25


def test_chosen_answers_fall_and_rejected_ones_faster(recorded):
    for run in recorded["pairs"]["runs"]:
        if run["method"] == "dpo":
            assert run["rejected"][-1] < run["chosen"][-1]


def test_refusals_without_over_refusal(recorded):
    runs = recorded["refusal"]["runs"]
    assert len({run["seed"] for run in runs}) >= 3
    for error in ("answered", "refused"):
        rows = [row[error] for run in runs for row in run["after"].values() if error in row]
        k, n = (sum(row[i] for row in rows) for i in (0, 1))
        assert n >= 600 and k <= 0.05 * n


def test_best_of_n_stays_below_its_bound(recorded):
    rows = recorded["best"]["rows"]
    assert all(row["kl"] <= row["bound"] + 1e-3 for row in rows)
    assert rows[-1]["reward"] > rows[0]["reward"]


@pytest.mark.slow
def test_a_full_run_again(recorded):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
    from align import Village
    from preference import MAIN, run

    village = Village()
    start = village.look(village.model, village.truth)["true"]
    assert gap_closed(start, run(village, 0, *MAIN)) >= 0.25


def test_valid_pairs_that_are_too_long_do_not_stop_a_run(start, pairs):
    model, tokenizer = copy.deepcopy(start[0]), start[1]
    long = pair("x" * 200, "yes", "no")
    rows = train_dpo(model, tokenizer, [*pairs, long], valid=[long, *pairs[:3]], steps=2,
                     eval_every=1, batch_size=4)
    assert rows[0]["too_long"] == 1 and "valid_loss" in rows[-1] and "kl" in rows[-1]


def test_a_loss_that_is_not_finite_changes_no_weight(start, pairs, tmp_path, monkeypatch):
    model, tokenizer = copy.deepcopy(start[0]), start[1]
    before = [p.detach().clone() for p in model.parameters()]
    from llm_course.align import pair_tuner
    monkeypatch.setattr(pair_tuner, "preference_loss", lambda c, told, *_: told.sum() * math.nan)
    with pytest.raises(FloatingPointError, match="weights were not changed"):
        train_dpo(model, tokenizer, pairs, steps=2, batch_size=4, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert (tmp_path / "preference.safetensors").exists()
