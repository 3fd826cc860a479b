"Sampling with a real GPT, at its edges, and against transformers on more settings than the lesson."
import math

import pytest
import torch
from torch import nn

from llm_course.generate.sampling import chi_square, filter_logits, last_logits, sample_token
from llm_course.generate.steer import penalise
from llm_course.generate.write import generate, sample_batch
from llm_course.model.gpt import GPT, GPTConfig


@pytest.fixture(scope="module")
def model():
    "A small GPT with random weights and dropout, left in training mode."
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, context_length=16, d_model=32, n_layers=2, n_heads=2,
                          dropout=0.5))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape))
    return model.train()


class Other(nn.Module):
    "A model of another make: it gives the same logits, but no cache can stand in for it."

    def __init__(self, inner: GPT):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, tokens):
        return self.inner(tokens)


@pytest.fixture(scope="module")
def other(model):
    return Other(model).train()


@pytest.fixture(params=["model", "other"])
def either(request):
    return request.getfixturevalue(request.param)


PROMPTS = [[1], [2, 3, 4], list(range(14)), [39] * 15, list(range(30))]


def test_batch_equals_one_by_one(other):
    "Filling short prompts up on the right changes nothing, even where the window slides."
    together = sample_batch(other, PROMPTS, 8, temperature=0, batch_size=3).tokens
    alone = [list(generate(other, prompt, 8, temperature=0)) for prompt in PROMPTS]
    assert together == alone


def test_dropout_is_off_and_back_on(model):
    frozen = model.blocks[0].eval()
    first = last_logits(model, PROMPTS[:2])
    assert torch.equal(first, last_logits(model, PROMPTS[:2]))
    assert model.training and not frozen.training
    frozen.train()


def test_training_mode_survives_a_broken_model(model):
    with pytest.raises(ValueError, match="context_length"):
        last_logits(model, [list(range(30))])
    assert model.training


def test_long_prompts_are_cropped(either):
    long = list(range(30))
    cropped = list(generate(either, long[-16:], 5, temperature=0))
    assert list(generate(either, long, 5, temperature=0)) == cropped


def test_caller_keeps_gradients(either):
    "A half-read stream must not leave gradients switched off."
    stream = generate(either, [1], 5)
    next(stream)
    assert torch.is_grad_enabled() and either.training
    assert last_logits(either, [[1]]).requires_grad is False


def test_prompt_is_not_changed(either):
    prompts = [[1, 2], [3]]
    sample_batch(either, prompts, 3)
    list(generate(either, prompts[0], 3))
    assert prompts == [[1, 2], [3]]


def test_same_seed_same_text(either):
    def text(seed):
        return list(generate(either, [1], 20, generator=torch.Generator().manual_seed(seed)))
    assert text(1) == text(1) != text(2)


def test_stop_token_ends_each_row_on_its_own(other):
    free = sample_batch(other, PROMPTS, 8, temperature=0).tokens
    stop = free[0][3]
    cut = sample_batch(other, PROMPTS, 8, stop, temperature=0)
    assert cut.tokens == [full[:full.index(stop) + 1] if stop in full else full for full in free]
    assert cut.stopped.tolist() == [stop in full for full in free]


def test_processors_see_the_text_so_far(model, other):
    def never_again(logits, rows):
        return penalise(logits, rows, presence=math.inf)
    g = torch.Generator().manual_seed(0)
    for writer in (model, other):
        text = list(generate(writer, [0], 39, processors=[never_again], generator=g))
        assert sorted(text) == list(range(1, 40))
    for text in sample_batch(other, [[0], [1]], 30, processors=[never_again], n=2).tokens:
        assert len(set(text)) == 30
    for text in sample_batch(model, [[0], [1, 2]], 30, stop=5, processors=[never_again], n=9).tokens:
        assert len(set(text)) == len(text) <= 15


def test_zero_tokens_and_no_prompts(either):
    assert list(generate(either, [1], 0)) == []
    assert sample_batch(either, [], 5).tokens == []
    assert sample_batch(either, [[1]], 0).tokens == [[]]


def test_unknown_setting_is_refused(model):
    with pytest.raises(TypeError, match="top_q"):
        sample_batch(model, [[1]], 1, top_q=0.5)
    with pytest.raises(TypeError, match="top_q"):
        generate(model, [1], 1, top_q=0.5)


def test_log_probs_of_any_model_are_those_of_a_gpt(model, other):
    few = [[1], [2, 3, 4]]
    a, b = (sample_batch(m, few, 6, n=3, temperature=0.7, top_k=9,
                         generator=torch.Generator().manual_seed(2)) for m in (model, other))
    assert a.tokens == b.tokens
    torch.testing.assert_close(a.log_probs, b.log_probs, atol=1e-4, rtol=1e-4)


def test_a_watched_model_is_used_as_it_is(model):
    "Whoever hooks the model or a block sees and changes every pass."
    plain, seen = list(generate(model, [1], 5, temperature=0)), []
    hook = model.blocks[1].register_forward_hook(lambda block, args, out: seen.append(1) or -out)
    turned = list(generate(model, [1], 5, temperature=0))
    together = sample_batch(model, [[1]], 5, temperature=0).tokens[0]
    hook.remove()
    assert len(seen) == 10 and turned == together != plain


@pytest.mark.parametrize("settings", [
    dict(), dict(temperature=0.6), dict(temperature=1.8), dict(top_k=9), dict(top_p=0.8),
    dict(min_p=0.1), dict(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02)])
def test_fifty_tokens_have_their_exact_distribution(settings):
    "The expected probabilities are computed with plain floats, one token at a time."
    g = torch.Generator().manual_seed(7)
    logits = 2 * torch.randn(50, generator=g)
    temperature = settings.get("temperature", 1.0)
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits.tolist())}
    ranked = sorted(weights, key=weights.get, reverse=True)[:settings.get("top_k", 50)]
    total, kept, reached = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        if reached < settings.get("top_p", 1.0) - 1e-12:
            kept.append(i)
        reached += weights[i] / total
    kept = [i for i in kept if weights[i] >= settings.get("min_p", 0.0) * weights[ranked[0]]]
    expected = torch.zeros(50, dtype=torch.float64)
    for i in kept:
        expected[i] = weights[i] / sum(weights[j] for j in kept)
    drawn = sample_token(logits.expand(20_000, -1), generator=g, **settings)
    assert chi_square(drawn.bincount(minlength=50), expected) > 0.001


def test_chi_square_against_the_printed_tables():
    "Critical values of the 5 % and 1 % columns for 1, 2 and 10 degrees of freedom."
    table = [(1, 3.841, 0.05), (2, 5.991, 0.05), (10, 18.307, 0.05), (2, 9.210, 0.01)]
    for freedom, critical, p in table:
        n = 10_000 * (freedom + 1)
        shift = math.sqrt(critical * 10_000 / 2)
        counts = torch.full((freedom + 1,), 10_000.0, dtype=torch.float64)
        counts[0] += shift
        counts[1] -= shift
        assert counts.sum() == n
        even = torch.full((freedom + 1,), 1 / (freedom + 1))
        assert chi_square(counts, even) == pytest.approx(p, rel=1e-2)


def test_rare_outcomes_are_pooled():
    probs = torch.tensor([0.999] + [0.00001] * 100)
    assert chi_square(torch.tensor([9990] + [1] * 10 + [0] * 90), probs) > 0.5
    assert chi_square(torch.tensor([9900] + [1] * 100), probs) < 1e-9


def test_extreme_logits_stay_finite():
    logits = torch.tensor([1e4, -1e4, 0.0, -math.inf])
    for temperature in (1e-40, 1e-3, 1.0, 1e6):
        probs = filter_logits(logits, temperature, 3, 0.9, 0.01).softmax(dim=0)
        assert probs.isfinite().all() and probs[0] > 0 and probs[3] == 0


def test_half_precision_logits_are_computed_in_full():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert filter_logits(logits, 0.7, 5).dtype == torch.float32
    assert sample_token(logits, 0.7).shape == (5,)


def test_all_that_random_logits_can_do_to_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    g = torch.Generator().manual_seed(11)
    for scale in (0.1, 1.0, 8.0):
        tied = (scale * torch.randn(20, 300, generator=g)).round(decimals=1)
        for temperature, top_k, top_p, min_p in [
                (0.2, 5, 0.5, 0.1), (1.0, 300, 0.95, 0.0), (3.0, 50, 0.01, 0.9)]:
            theirs = transformers.TemperatureLogitsWarper(temperature)(None, tied)
            theirs = transformers.TopKLogitsWarper(top_k)(None, theirs)
            theirs = transformers.TopPLogitsWarper(top_p)(None, theirs)
            theirs = transformers.MinPLogitsWarper(min_p)(None, theirs)
            assert torch.equal(filter_logits(tied, temperature, top_k, top_p, min_p), theirs)


def test_repetition_penalty_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    g = torch.Generator().manual_seed(12)
    logits, rows = torch.randn(4, 20, generator=g), torch.randint(20, (4, 9), generator=g)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(rows, logits)
    torch.testing.assert_close(penalise(logits, rows.tolist(), repetition=1.3), theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_refused(bad):
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match="largest logit"):
            sample_token(torch.tensor([[0.0, 1.0], [0.0, bad]]), temperature)
    with pytest.raises(FloatingPointError, match="largest logit"):
        sample_token(torch.full((3,), -math.inf))
