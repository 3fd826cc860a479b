"Steering and fast writing on any input: filters, patterns, beams, stops, company, guesses."
import itertools
import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm_course.generate.draft import PairDraft
from llm_course.generate.fast import accept_guesses, pages_needed, speculate
from llm_course.generate.pattern import (
    Constraint, TokenPattern, compile_pattern, expand_grammar, matches, pattern_of)
from llm_course.generate.sampling import chi_square, filter_logits, sample_token
from llm_course.generate.steer import beam_search, penalise, stop_at
from llm_course.generate.write import TextGenerator, generate, sample_batch
from llm_course.model.block import COURSE, GPT2, LLAMA
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.text import ByteTokenizer, CharTokenizer

STYLES = {"gpt2": GPT2, "llama": LLAMA, "course": COURSE}


def small(style=COURSE, vocab_size=40, seed=0, context_length=24) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, context_length, 32, 2, 4, style=style))
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model.eval()


# --- Filters --------------------------------------------------------------------------------------

numbers = st.floats(-30, 30, width=32) | st.just(-math.inf)


@settings(max_examples=150, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=9), st.sampled_from([0, 0.1, 0.7, 1, 3]),
       st.none() | st.integers(1, 12), st.none() | st.floats(0.01, 1),
       st.none() | st.floats(0, 0.99))
def test_what_is_kept_is_what_the_definition_says(row, temperature, top_k, top_p, min_p):
    assume(max(row) > -math.inf)
    logits = torch.tensor(row)
    kept = filter_logits(logits, temperature, top_k, top_p, min_p)
    probs = kept.softmax(dim=0)
    assert torch.allclose(probs.sum(), torch.tensor(1.0)) and probs.isfinite().all()
    assert logits[kept.argmax()] == logits.max()  # of equals, any may be dropped
    if temperature == 1 and top_p is None and min_p is None and top_k:
        bar = sorted(row, reverse=True)[min(top_k, len(row)) - 1]
        assert kept.isfinite().tolist() == [x >= bar and x > -math.inf for x in row]
    distinct = len({round(x, 3) for x in row}) == len(row)
    if temperature == 1 and top_k is None and min_p is None and top_p and distinct:
        said, order = logits.double().softmax(dim=0), logits.sort(descending=True).indices
        before = said[order].cumsum(dim=0) - said[order]
        clear = (before - top_p).abs() > 1e-5  # not on the edge, where a digit decides
        stays = kept[order].isfinite()
        assert (stays == (before < top_p))[clear & (said[order] > 0)].all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=9))
def test_limits_and_settings_that_change_nothing(row):
    logits = torch.tensor(row)
    assert torch.equal(filter_logits(logits, 1.0, len(row), 1.0, 0.0), logits)
    clear = logits.topk(min(2, len(row))).values
    if len(row) == 1 or clear[0] - clear[1] > 1e-2:
        cold = filter_logits(logits, 1e-5).softmax(dim=0)
        assert torch.equal(cold, filter_logits(logits, 0).softmax(dim=0))
        assert sample_token(logits, 0) == cold.argmax()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=9), st.floats(0, 2), st.floats(0, 2),
       st.floats(1, 3))
def test_penalties_by_plain_counting(used, frequency, presence, repetition):
    logits = torch.linspace(-2, 2, 6)
    got = penalise(logits[None], [used], repetition, frequency, presence)[0].tolist()
    for token, (x, y) in enumerate(zip(logits.tolist(), got)):
        n = used.count(token)
        shrunk = (x / repetition if x > 0 else x * repetition) if n else x
        assert y == pytest.approx(shrunk - frequency * n - presence * (n > 0), abs=1e-5)


# --- Patterns -------------------------------------------------------------------------------------

leaves = st.sampled_from(
    ["a", "b", "é", ".", "[ab]", "[^a]", r"\d", r"\W", r"[\D7]", "7", r"\.", "日", "[a-cé]"])
regexes = st.recursive(leaves, lambda inner: st.one_of(
    st.tuples(inner, inner).map("".join),
    st.tuples(inner, inner).map(lambda two: f"({'|'.join(two)})"),
    st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}"])).map(
        lambda two: f"(?:{two[0]}){two[1]}")), max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(regexes, st.text(alphabet="ab7é日.\n", max_size=6))
def test_patterns_mean_what_they_mean_to_python(pattern, text):
    assert matches(compile_pattern(pattern), text) == bool(re.fullmatch(pattern, text, re.ASCII))


@settings(max_examples=40, deadline=None)
@given(regexes, st.integers(0, 9))
def test_with_a_constraint_every_output_matches(pattern, seed):
    tokenizer = ByteTokenizer()
    model = lambda tokens: torch.randn(*tokens.shape, tokenizer.vocab_size)  # noqa: E731
    only = Constraint(TokenPattern(tokenizer, pattern), 1, tokenizer.end_id)
    torch.manual_seed(seed)
    found = sample_batch(model, [[65]], 40, tokenizer.end_id, n=4, processors=[only])
    for new, stopped in zip(found.tokens, found.stopped):
        if stopped:
            text = bytes(new[:-1]).decode()
            assert re.fullmatch(pattern, text, re.ASCII), (pattern, text)


def test_a_pattern_that_admits_nothing():
    for make in (lambda: pattern_of([]), lambda: expand_grammar({"start": "{start}"}),
                 lambda: compile_pattern("a{3,1}"), lambda: compile_pattern("[^é]")):
        with pytest.raises(ValueError):
            make()
    few = CharTokenizer.train("abc")
    stuck = Constraint(TokenPattern(few, "x"), 1, few.end_id)
    with pytest.raises(ValueError, match="no token of this vocabulary"):
        next(generate(lambda tokens: torch.zeros(*tokens.shape, 4), [1], 5, processors=[stuck]))


# --- Beams and stops ------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_a_wide_beam_finds_the_best_of_all_texts(seed, power):
    torch.manual_seed(seed)
    table = (2 * torch.randn(4, 4)).log_softmax(dim=-1)
    model = lambda tokens: table[tokens]  # noqa: E731
    best = []
    for n in (1, 2, 3):
        for text in itertools.product(range(4), repeat=n):
            if 0 not in text[:-1] and (text[-1] == 0 or n == 3):
                total = sum(table[a, b].item() for a, b in zip((1, *text), text))
                best.append((total / n ** power, list(text)))
    score, text = max(best)
    got = beam_search(model, [1], 3, stop=0, n_beams=64, length_power=power)
    assert got[0][0] == text and got[0][1] == pytest.approx(score, abs=1e-5)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="ab", max_size=3), max_size=8),
       st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stops_are_found_wherever_tokens_end(pieces, stops):
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first = min(ends)[1] if ends else len(text)
    shown = list(stop_at(iter(pieces), stops))
    assert "".join(shown) == text[:first] and all(shown)


# --- In company -----------------------------------------------------------------------------------

request = st.fixed_dictionaries({
    "prompt": st.lists(st.integers(0, 39), min_size=1, max_size=9),
    "max_new_tokens": st.integers(0, 30), "seed": st.integers(0, 99), "forget": st.booleans(),
    "temperature": st.sampled_from([0, 0.7, 1.5]), "top_k": st.sampled_from([None, 5]),
    "stop": st.sampled_from([None, [0, 1, 2]])})


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(STYLES)), st.lists(request, max_size=7), st.integers(1, 5), st.data())
def test_each_text_is_what_it_would_be_alone(style, asked, batch_size, data):
    model = small(STYLES[style])
    writer, texts = TextGenerator(model, batch_size), []
    for how in asked:
        texts.append(writer.add(**how))
        for _ in range(data.draw(st.integers(0, 4))):
            writer.step()
    gone = data.draw(st.integers(0, len(asked)))
    for text in texts[:gone]:
        text.cancel()
    writer.run()
    for how, text in zip(asked, texts):
        alone = TextGenerator(model).add(**how)
        list(alone)
        assert text.ended == alone.ended or text.ended == "cancelled"
        assert text.tokens == alone.tokens[:len(text.tokens)]
        assert text.ended == "cancelled" or len(text.tokens) == len(alone.tokens)
    assert writer.step() == [] and not writer.waiting


def test_one_broken_text_does_not_block_the_next():
    def break_it(logits, rows):
        raise RuntimeError("no")
    writer = TextGenerator(small(), batch_size=1)
    bad, good = writer.add([1], 3, processors=[break_it]), writer.add([1], 3)
    with pytest.raises(RuntimeError, match="no"):
        writer.step()
    assert bad.ended == "cancelled" and len(list(good)) == 3


def test_bad_input():
    model = small()
    writer = TextGenerator(model)
    for how, why in [({"prompt": []}, "prompt is empty"), ({"prompt": [40]}, "knows 0 to 39"),
                     ({"prompt": [-1]}, "has token -1"), ({"prompt": 24 * [1]}, "no room"),
                     ({"prompt": [1], "temperature": -0.1}, "temperature is -0.1"),
                     ({"prompt": [1], "temperature": math.nan}, "temperature is nan"),
                     ({"prompt": [1], "top_p": 0}, "top_p is 0"),
                     ({"prompt": [1], "top_k": 0}, "top_k is 0")]:
        with pytest.raises(ValueError, match=why):
            writer.add(max_new_tokens=3, **how)
    with pytest.warns(UserWarning, match="the first 6 are left out"):
        assert generate(model, 30 * [1], 3).cut == 6
    broken = generate(model, [1], 3, processors=[lambda logits, rows: logits * math.nan])
    with pytest.raises(FloatingPointError, match="largest logit is NaN"):
        next(broken)
    assert broken.ended == "cancelled" and writer.step() == []
    with pytest.raises(ValueError, match="stop string is empty"):
        list(stop_at(["a"], ["b", ""]))


# --- Guesses --------------------------------------------------------------------------------------

@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("k", [0, 1, 5])
def test_greedy_speculation_is_greedy(style, k):
    model = small(style)
    expected = list(generate(model, [3, 1], 22, temperature=0))
    for texts in ([[3, 1, *expected]], [[1, 2, 3]]):  # a guesser that knows, one that does not
        got = speculate(model, PairDraft(texts, 40), [3, 1], 30, k, temperature=0)
        assert got.tokens == expected and got.kept <= got.guessed
        assert got.passes + got.kept == len(expected)
    stop = expected[7]
    cut = speculate(model, PairDraft([[3, 1, *expected]], 40), [3, 1], 30, k, stop, temperature=0)
    assert cut.tokens == expected[:expected.index(stop) + 1]


def test_speculation_draws_with_the_models_own_probabilities():
    model, g = small(vocab_size=6), torch.Generator().manual_seed(3)
    draft = PairDraft([[1, 2, 3, 4, 5, 0, 1, 1, 2]], 6)
    drawn = [speculate(model, draft, [2], 2, 1, generator=g).tokens for _ in range(800)]
    pairs = torch.tensor([a * 6 + b for a, b in drawn]).bincount(minlength=36)
    with torch.no_grad():
        probs = model(torch.tensor([[2, a] for a in range(6)])).softmax(dim=-1)
    joint = probs[:, 0].diagonal()[:, None] * probs[:, 1]
    assert chi_square(pairs, joint.flatten()) > 0.001


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4))
def test_a_pass_gives_tokens_and_then_minus_one(seed, k):
    g = torch.Generator().manual_seed(seed)
    p, q = torch.rand(20, k + 1, 5, generator=g), torch.rand(20, k, 5, generator=g)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    guesses = torch.multinomial(q.view(-1, 5), 1, generator=g).view(20, k)
    for row, guess in zip(accept_guesses(p, q, guesses, g).tolist(), guesses.tolist()):
        n = sum(token >= 0 for token in row)
        assert 1 <= n and row[n:] == (k + 1 - n) * [-1] and row[:n - 1] == guess[:n - 1]


@given(st.lists(st.integers(0, 300), max_size=9), st.integers(1, 64))
def test_pages_by_plain_counting(lengths, page):
    assert pages_needed(lengths, page) == sum(len(range(0, n, page)) for n in lengths)
