"What the lesson on the cache cannot hold: many shapes, wrapped models, other number types."
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llm_course.generate.cache import KVCache, cache_bytes, prefill
from llm_course.generate.pieces import is_plain_block, side_by_side
from llm_course.generate.sampling import chi_square, filter_logits, last_logits
from llm_course.generate.write import TextGenerator, draw_tokens, generate, sample_batch
from llm_course.model.block import COURSE, GPT2, LLAMA, Style
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.model.rotation import RopeScaling

STYLES = {"gpt2": GPT2, "llama": LLAMA, "course": COURSE,
          "odd": Style("layer-plain", "sinusoidal", bias=True, qk_norm=True, shift=True),
          "none": Style(position="none", activation="gelu", shift=True)}
each_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5, 8, 9, 7]]


def small(style=COURSE, **changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "context_length": 24, "d_model": 32, "n_layers": 2, "n_heads": 4}
    model = GPT(GPTConfig(**{**sizes, "style": style, **changes}))
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model.eval()


def no_cache(model: GPT):
    "The same model as any callable: it reads the whole text for each token."
    return lambda tokens: model(tokens)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- The same logits ------------------------------------------------------------------------------

texts = st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(STYLES)), st.sampled_from([1, 2, 4]), st.sampled_from([None, 1, 4]),
       texts, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 99))
def test_logits_are_those_without_a_cache(style, groups, window, rows, pieces, seed):
    model = small(STYLES[style], n_kv_heads=groups, window=window)
    logits, cache = prefill(model, rows, room=sum(pieces))
    assert torch.allclose(logits, last_logits(model, rows), atol=1e-4)
    for size in pieces:
        new = torch.randint(40, (len(rows), size), generator=seeded(seed))
        rows = [row + more.tolist() for row, more in zip(rows, new)]
        if max(map(len, rows)) > 24:
            return
        got = cache.read(new, every=True)
        assert got.shape == (len(rows), size, 40)
        assert torch.allclose(got[:, -1], last_logits(model, rows), atol=1e-4)


def test_short_texts_go_on_when_the_columns_outnumber_the_context():
    "Columns are shared, positions are not: padding takes none of the context."
    for style in STYLES.values():
        model = small(style)
        samples = sample_batch(model, [[1] * 20, [2]], 30, temperature=0)
        assert [len(new) for new in samples.tokens] == [4, 23]
        assert samples.tokens[1] == sample_batch(no_cache(model), [[2]], 23, temperature=0).tokens[0]


@each_style
def test_number_types(style):
    model, exact = small(style), sample_batch(small(style), PROMPTS, 6, generator=seeded())
    low = sample_batch(model, PROMPTS, 6, dtype=torch.bfloat16, generator=seeded())
    assert low.log_probs.dtype == torch.float32 and low.log_probs.shape == exact.log_probs.shape
    logits, cache = prefill(model.bfloat16(), PROMPTS, 3)
    assert cache.keys.dtype == torch.bfloat16 == logits.dtype
    error = (logits.float() - last_logits(small(style), PROMPTS)).norm()
    assert error < 0.1 * last_logits(small(style), PROMPTS).norm()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(1, 30), st.booleans(),
       st.sampled_from([torch.float32, torch.bfloat16]))
def test_bytes_are_counted_right(groups, batch_size, length, shift, dtype):
    model = small(Style(shift=shift), n_kv_heads=groups)
    assert KVCache(model, batch_size, length, dtype).nbytes() == \
        cache_bytes(model.config, batch_size, length, dtype)


def test_a_full_cache_says_so():
    model = small()
    _, cache = prefill(model, PROMPTS, room=1)
    cache.read(torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="room for 7 positions; 7 are in use and 1 more"):
        cache.read(torch.zeros(4, 1, dtype=torch.long))


# --- Other kinds of models ------------------------------------------------------------------------

class Low(nn.Module):
    "A linear layer with something added, as low-rank adaptation makes it."

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(0.2 * torch.randn(layer.in_features, 2))
        self.b = nn.Parameter(0.2 * torch.randn(2, layer.out_features))

    def forward(self, x):
        return self.layer(x) + x @ self.a @ self.b


@each_style
def test_layers_may_be_replaced(style):
    model = small(style)
    for block in model.blocks:
        for part, names in ((block.attention, ("query", "key", "value", "out")),
                            (block.feed_forward, ("up", "down"))):
            for name in names:
                setattr(part, name, Low(getattr(part, name)))
    samples = sample_batch(model, PROMPTS, 10, temperature=0)
    assert samples.tokens == sample_batch(no_cache(model), PROMPTS, 10, temperature=0).tokens
    assert samples.tokens != sample_batch(small(style), PROMPTS, 10, temperature=0).tokens
    assert list(generate(model, PROMPTS[0], 10, temperature=0)) == samples.tokens[0]


def test_compiled_and_distributed_models():
    model, expected = small(), sample_batch(small(), PROMPTS, 8, temperature=0).tokens
    compiled = torch.compile(model, backend="aot_eager")
    assert sample_batch(compiled, PROMPTS, 8, temperature=0).tokens == expected
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(compiled)
        assert sample_batch(wrapped, PROMPTS, 8, temperature=0).tokens == expected
        assert list(generate(wrapped, PROMPTS[1], 8, temperature=0)) == expected[1]
    finally:
        dist.destroy_process_group()


def test_training_goes_on_as_before():
    "Dropout is off while drawing, modes are restored, and results can take part in gradients."
    model = small(dropout=0.5).train()
    model.blocks[0].eval()
    samples = sample_batch(model, PROMPTS, 8, temperature=0)
    assert samples.tokens == sample_batch(small(), PROMPTS, 8, temperature=0).tokens
    assert model.training and model.blocks[1].training and not model.blocks[0].training
    weight = torch.ones((), requires_grad=True)
    (weight * samples.log_probs).sum().backward()
    assert weight.grad == samples.log_probs.sum()
    for _ in generate(model, PROMPTS[0], 3):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert model.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_style
def test_on_a_gpu(style):
    model = small(style)
    expected = sample_batch(model, PROMPTS, 8, temperature=0).tokens
    assert sample_batch(model.cuda(), PROMPTS, 8, temperature=0).tokens == expected
    sample_batch(model, PROMPTS, 8, dtype=torch.bfloat16, generator=seeded())


# --- Many texts -----------------------------------------------------------------------------------

@each_style
@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_stops_and_batches(style, batch_size):
    model, stops = small(style), set(range(6))
    samples = sample_batch(model, PROMPTS, 15, stops, n=2, batch_size=batch_size, temperature=0)
    plain = sample_batch(no_cache(model), PROMPTS, 15, stop=stops, temperature=0).tokens
    for i, (new, stopped) in enumerate(zip(samples.tokens, samples.stopped)):
        assert stopped == (new[-1] in stops) and not set(new[:-1]) & stops
        assert new == plain[i // 2][:15]
        assert samples.mask[i].sum() == len(new) and samples.mask[i, :len(new)].all()
        assert (samples.log_probs[i, len(new):] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(STYLES)), texts, st.sampled_from([0, 0.5, 1.0, 2.0]),
       st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}]), st.integers(0, 99))
def test_log_probs_are_those_of_the_model_at_the_temperature(style, rows, temperature, cut, seed):
    model = small(STYLES[style])
    samples = sample_batch(model, rows, 7, stop=0, n=2, temperature=temperature,
                           generator=seeded(seed), **cut)
    for i, new in enumerate(samples.tokens):
        before = len(rows[i // 2])
        with torch.no_grad():
            logits = model(torch.tensor([rows[i // 2] + new]))[0, before - 1:-1]
        expected = (logits / (temperature or 1)).log_softmax(-1)[range(len(new)), new]
        assert torch.allclose(samples.log_probs[i, :len(new)], expected, atol=1e-3)
        kept = filter_logits(logits, temperature, **cut)[range(len(new)), new]
        assert kept.isfinite().all()


def test_same_seed_same_texts_and_another_seed_others():
    draws = [sample_batch(small(), PROMPTS, 10, n=3, generator=seeded(s)).tokens for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len({tuple(new) for new in draws[0][:3]}) > 1  # three texts for one prompt differ


def test_texts_are_drawn_with_the_right_probabilities():
    model, prompt = small(vocab_size=12), [3, 1]
    samples = sample_batch(model, [prompt], 2, n=4000, batch_size=1000, generator=seeded(5))
    pairs = torch.tensor([a * 12 + b for a, b in samples.tokens])
    rows = torch.tensor([[*prompt, a] for a in range(12)])
    with torch.no_grad():
        probs = model(rows)[:, 1:].softmax(dim=-1)
    joint = probs[:, 0].diagonal()[:, None] * probs[:, 1]
    assert chi_square(pairs.bincount(minlength=144), joint.flatten()) > 0.001


def test_what_has_ended_costs_nothing():
    "The rows that go through the model follow those that are alive; prompts are read once."
    model, rows = small(), []
    model.head.register_forward_hook(lambda layer, args, out: rows.append(len(out)))
    samples = sample_batch(model, PROMPTS, 18, stop=set(range(8)), n=50, generator=seeded(1))
    assert rows[0] == len(PROMPTS)
    alive = [int(samples.mask[:, t].sum()) for t in range(1, samples.mask.shape[1])]
    assert len(rows) - 1 == len(alive)
    assert all(a <= r <= max(a / 0.75 + 1, a) for a, r in zip(alive, rows[1:]))


def test_rows_may_be_copied_dropped_and_turned_round():
    model = small()
    _, cache = prefill(model, PROMPTS, room=2)
    cache.keep_rows(torch.tensor([3, 0, 0]))
    new = torch.tensor([[7], [8], [9]])
    rows = [PROMPTS[3] + [7], PROMPTS[0] + [8], PROMPTS[0] + [9]]
    assert torch.allclose(cache.read(new)[:, -1], last_logits(model, rows), atol=1e-4)


def test_nothing_to_do():
    assert sample_batch(small(), [], 5).tokens == []
    samples = sample_batch(small(), PROMPTS, 0)
    assert samples.tokens == [[], [], [], []] and samples.mask.shape == (4, 0)
    assert list(generate(small(), [1], 0)) == []


def test_errors():
    with pytest.raises(ValueError, match="a prompt has 24 tokens"):
        sample_batch(small(), [[1], [1] * 24], 5)
    with pytest.raises(ValueError, match="prompt is empty"):
        sample_batch(small(), [[1], []], 5)
    with pytest.raises(ValueError, match="top_p is 2"):
        sample_batch(small(), PROMPTS, 5, top_p=2)
    with pytest.raises(ValueError, match="temperature is -1"):
        generate(small(), [1], 5, temperature=-1)  # at once, not at the first token
    with pytest.raises(TypeError):
        sample_batch(small(), PROMPTS, 5, topk=3)


# --- Drawing --------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.sampled_from([0.1, 1.0, 10.0]), st.integers(0, 99))
def test_what_is_impossible_is_never_drawn(vocab_size, scale, seed):
    logits = scale * torch.randn(200, vocab_size, generator=seeded(seed))
    logits[:, ::2] = -math.inf
    logits[:, -1] = 0.0
    drawn, told = draw_tokens(logits, generator=seeded(seed))
    assert logits.gather(1, drawn[:, None]).isfinite().all() and told.isfinite().all()


def test_a_dart_at_the_very_bottom_and_the_very_top(monkeypatch):
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    for height, expected in ((0.0, 2), (1 - 2**-24, 1)):
        monkeypatch.setattr(torch, "rand", lambda *size, h=height, **other: torch.full(size, h))
        assert draw_tokens(logits)[0].item() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_refused(bad):
    for temperature in (0, 1.0):
        with pytest.raises(FloatingPointError, match="largest logit"):
            draw_tokens(torch.tensor([[0.0, 1.0], [0.0, bad]]), temperature)


# --- One text -------------------------------------------------------------------------------------

@each_style
@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"temperature": 0.8, "top_k": 9}, {"top_p": 0.9}])
def test_one_text_with_and_without_a_cache(style, how):
    model, prompt = small(style), PROMPTS[0]
    process = lambda logits, rows: logits - 100 * (torch.arange(40) == rows[0][-1])  # noqa: E731
    for extra in ({}, {"processors": [process]}, {"stop": [1, 2, 3]}):
        ours, plain = (list(generate(m, torch.tensor(prompt), 19, generator=seeded(3), **how, **extra))
                       for m in (model, no_cache(model)))
        assert ours == plain


@each_style
def test_the_older_half_is_forgotten_when_the_context_is_full(style):
    model = small(style)
    row = [1]
    for token in generate(model, row, 70, temperature=0):
        if len(row) <= 24:
            seen = row
        else:
            seen = row[-(12 + (len(row) - 25) % 13):]  # 12 to 24 tokens, then 12 again
        assert token == int(last_logits(model, [seen]).argmax())
        row = row + [token]
    assert len(row) == 71
    assert len(list(generate(model, list(range(40)), 3))) == 3  # a prompt longer than the context


def test_hooks_see_a_stream_and_new_weights_count():
    model, seen = small(LLAMA), []
    first = list(generate(model, [1], 10, temperature=0))
    model.blocks[1].attention.value.register_forward_hook(lambda *a: seen.append(1))
    assert list(generate(model, [1], 10, temperature=0)) == first and len(seen) == 10
    for p in model.parameters():
        p.data.mul_(-1)
    plain = list(generate(no_cache(model), [1], 10, temperature=0))
    assert list(generate(model, [1], 10, temperature=0)) == plain


def test_lean_blocks_only_where_they_are_exact():
    model = small(LLAMA)
    assert is_plain_block(model.blocks[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain_block(model.blocks[0])
        assert len(list(generate(model, [1], 5))) == 5
    assert not is_plain_block(model.bfloat16().blocks[0])
    assert len(list(generate(model, [1], 5))) == 5


def test_where_positions_turn_anew_nothing_is_remembered():
    growing = Style(rope_scaling=RopeScaling("dynamic", 2.0, 8))
    model = small(growing)
    cache = KVCache(model, 2, 20)
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [3, 1, 4, 1, 5, 9, 2, 6]])
    assert torch.allclose(cache.read(rows)[:, 0], model(rows)[:, -1], atol=1e-4)
    with pytest.raises(ValueError, match="only 8 can be remembered"):
        cache.read(rows[:, :1])
    writer = TextGenerator(model, 3)  # reads again instead, each text as if it were alone
    texts = [writer.add([1 + i] * n, 12, temperature=0) for i, n in enumerate((2, 9, 5))]
    writer.run()
    for i, n in enumerate((2, 9, 5)):
        row = [1 + i] * n
        for token in texts[i].tokens:
            assert token == int(model(torch.tensor([row]))[0, -1].argmax())
            row = row + [token]


@each_style
def test_a_server_with_many_rows_writes_what_each_would_alone(style):
    model, g = small(style, context_length=90), torch.Generator().manual_seed(3)
    writer, asked = TextGenerator(model, 40, every=2), []
    moved, keep = [], KVCache.keep_rows
    for i in range(150):
        prompt = torch.randint(1, 30, (1 + i * i % 11,), generator=g).tolist()
        asked.append((prompt, 2 + i * 7 % 60))
    KVCache.keep_rows = lambda self, *how: (moved.append(self.groups), keep(self, *how))[1]
    try:
        texts = [writer.add(prompt, n, temperature=0) for prompt, n in asked]
        writer.run()
    finally:
        KVCache.keep_rows = keep
    assert any(moved), "rows were never grouped"
    for (prompt, n), text in list(zip(asked, texts))[::6]:
        assert text.tokens == list(generate(model, prompt, n, temperature=0))


@pytest.mark.parametrize("bias", [False, True])
def test_weights_that_are_laid_out_give_the_same_product(bias):
    layers = [nn.Linear(300, n, bias=bias) for n in (700, 11)]
    product = side_by_side(*layers)
    with torch.inference_mode():
        for rows, T in ((1, 1), (2, 1), (17, 1), (64, 1), (3, 5)):
            wide = torch.randn(rows, T, 600)
            for x in (wide[..., :300], wide[..., ::2]):  # also where numbers lie apart
                expected = torch.cat([layer(x) for layer in layers], dim=-1)
                assert torch.allclose(product(x), expected, atol=1e-4)
