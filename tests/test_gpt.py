"What the lessons on the GPT and its parts cannot hold: many shapes, damaged files, compilation."
import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm_course.model.attention import attention_maps
from llm_course.model.block import COURSE, GPT2, LLAMA, Style, hidden_width
from llm_course.model.embedding import Rope, position_angles
from llm_course.model.files import load_model, save_model
from llm_course.model.gpt import GPT, GPTConfig, count_params, flops_per_token, mark_segments
from llm_course.train.scale import recompute_blocks

STYLES = {"gpt2": GPT2, "llama": LLAMA, "course": COURSE,
          "odd": Style("layer-plain", "sinusoidal", "swiglu", bias=True, qk_norm=True, shift=True)}
each_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def small(style, **changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "context_length": 24, "d_model": 32, "n_layers": 2, "n_heads": 4}
    model = GPT(GPTConfig(**{**sizes, "style": style, **changes}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def some_tokens(T=24, B=2) -> torch.Tensor:
    return torch.randint(40, (B, T), generator=torch.Generator().manual_seed(1))


# --- Counting ---------------------------------------------------------------------------------

styles = st.builds(
    Style, norm=st.sampled_from(["layer", "rms", "layer-plain", "rms-plain"]),
    position=st.sampled_from(["learned", "sinusoidal", "rope", "none"]),
    activation=st.sampled_from(["gelu", "relu2", "swiglu"]), bias=st.booleans(),
    tied_head=st.booleans(), qk_norm=st.booleans(), shift=st.booleans(),
    init=st.sampled_from(["small", "zero"]))


@st.composite
def configs(draw):
    groups, share, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads = groups * share
    return GPTConfig(
        draw(st.integers(1, 60)), draw(st.integers(1, 20)), 2 * half * heads,
        draw(st.integers(1, 3)),
        heads, groups, draw(st.sampled_from([None, 1, 10])), draw(styles),
        draw(st.sampled_from([None, 1, 5])), draw(st.sampled_from([0.0, 0.1])))


def expected_params(c: GPTConfig) -> int:
    s, C = c.style, c.d_model
    d_kv = C // c.n_heads * c.n_kv_heads
    hidden = c.d_hidden or hidden_width(C, s.activation)
    bends = 2 if s.activation == "swiglu" else 1
    block = 2 * C * C + 2 * C * d_kv + (bends + 1) * C * hidden
    block += s.bias * (2 * C + 2 * d_kv + bends * hidden + C)
    norm = {"layer": 2 * C, "rms": C}.get(s.norm, 0)
    tables = c.vocab_size * C * (1 if s.tied_head else 2)
    tables += c.context_length * C * (s.position == "learned")
    return tables + c.n_layers * (block + 2 * norm) + norm


@settings(max_examples=60, deadline=None)
@given(configs())
def test_any_shape_is_counted_runs_and_has_a_sane_first_loss(config):
    torch.manual_seed(0)
    model = GPT(config).eval()
    assert count_params(model) == expected_params(config)
    tokens = torch.randint(config.vocab_size, (2, config.context_length))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens)
    assert logits.shape == (*tokens.shape, config.vocab_size)
    everywhere = dataclasses.replace(config, window=None)  # the plain kind computes what it hides
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(everywhere, training=False)
    if not config.style.tied_head:
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        assert abs(loss.item() - math.log(config.vocab_size)) < 0.2


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(0, 19))
def test_no_shape_sees_the_future(config, at):
    torch.manual_seed(0)
    model = GPT(config).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    at = at % config.context_length
    tokens = torch.randint(config.vocab_size, (1, config.context_length))
    changed = tokens.clone()
    changed[0, at] = (changed[0, at] + 1) % config.vocab_size
    with torch.no_grad():
        assert torch.allclose(model(changed)[:, :at], model(tokens)[:, :at], atol=1e-9)


# --- Against transformers ---------------------------------------------------------------------

@pytest.mark.parametrize("heads, groups, base, tied", [
    (4, 4, 1e4, False), (4, 1, 5e5, True), (6, 2, 1e5, False)])
def test_logits_equal_llama_for_other_shapes(heads, groups, base, tied):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=48, intermediate_size=56, num_hidden_layers=2, rms_norm_eps=1e-6,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=24,
        rope_theta=base, tie_word_embeddings=tied)).eval()
    torch.manual_seed(0)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    style = Style(tied_head=tied, rope_base=base, norm_eps=1e-6)
    ours = GPT(GPTConfig(40, 24, 48, 2, heads, groups, 56, style)).eval()
    names = {"embed_tokens": "embed", "layers": "blocks", "self_attn": "attention", "q_proj": "query",
             "k_proj": "key", "v_proj": "value", "o_proj": "out", "mlp": "feed_forward",
             "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "lm_head": "head",
             "input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    state = {}
    for name, weight in theirs.state_dict().items():
        parts = name.removeprefix("model.").split(".")
        state[".".join(names.get(part, part) for part in parts)] = weight
    ours.load_state_dict(state)
    with torch.no_grad():
        assert (ours(some_tokens()) - theirs(some_tokens()).logits).abs().max() < 1e-4


def test_rope_is_precise_far_out():
    "Angles are computed in double precision: float32 would be off by 0.001 radians at 100,000."
    angles = position_angles(100_001, 8)[-1].double()
    speeds = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    assert ((angles - 100_000 * speeds).abs() / (100_000 * speeds)).max() < 1e-7
    assert Rope(4, 8).state_dict() == {}


# --- Numbers of other types, compilation, dropout ----------------------------------------------

@each_style
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_types(style, dtype):
    model = small(style)
    with torch.no_grad():
        expected = model(some_tokens())
        got = model.to(dtype)(some_tokens())
    assert got.dtype == dtype
    error = (got.float() - expected).norm() / expected.norm()
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)


@each_style
def test_autocast_changes_little(style):
    model = small(style)
    expected = model(some_tokens())
    with torch.autocast("cpu", torch.bfloat16):
        got = model(some_tokens())
    assert ((got.float() - expected).norm() / expected.norm()) < 0.1
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all()
               for p in model.parameters() if p.requires_grad)


@each_style
def test_compiles_in_one_piece(style):
    model = small(style)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(some_tokens()), model(some_tokens()), atol=1e-4)


@each_style
def test_a_text_read_in_two_parts(style):
    "`enter` with an offset marks positions as if the whole text had been given."
    model = small(style)
    tokens = some_tokens()
    whole, turn = model.enter(tokens)
    part, turn_part = model.enter(tokens[:, 10:], offset=10)
    assert torch.equal(whole[:, 10:], part)
    if turn:
        q = torch.randn(2, 4, 24, 8)
        assert torch.equal(turn(q)[:, :, 10:], turn_part(q[:, :, 10:]))
    with pytest.raises(ValueError, match="has 25 tokens"):
        model.enter(tokens[:, :5], offset=20)


def test_dropout_only_while_training():
    model = small(COURSE, dropout=0.5)
    assert torch.equal(model(some_tokens()), model(some_tokens()))
    model.train()
    assert not torch.equal(model(some_tokens()), model(some_tokens()))


def test_learns_one_batch_by_heart_with_tied_head():
    torch.manual_seed(0)
    model = GPT(GPTConfig(40, 24, 48, 2, style=GPT2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = some_tokens(25)
    for _ in range(80):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


# --- Files --------------------------------------------------------------------------------------

@each_style
def test_saved_and_loaded_is_the_same_model(style, tmp_path):
    model = small(style)
    save_model(model, tmp_path / "new" / "m.safetensors")
    again = load_model(tmp_path / "new" / "m.safetensors")
    assert again.config == model.config and not again.training
    assert torch.equal(again(some_tokens()), model(some_tokens()))
    assert count_params(again) == count_params(model)
    again.train()(some_tokens()).sum().backward()
    assert again.embed.weight.grad is not None


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    save_model(small(COURSE), tmp_path / "m.safetensors")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_model(tmp_path / "m.safetensors")
    assert torch.equal(torch.rand(3), expected)


def test_compiled_models_are_saved_under_plain_names(tmp_path):
    model = small(LLAMA)
    save_model(torch.compile(model, backend="eager"), tmp_path / "m.safetensors")
    assert torch.equal(load_model(tmp_path / "m.safetensors")(some_tokens()), model(some_tokens()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_number_type_of_file_and_of_memory(dtype, tmp_path):
    model = small(GPT2)
    save_model(model, tmp_path / "m.safetensors", dtype)
    for memory in (torch.float32, torch.bfloat16):
        again = load_model(tmp_path / "m.safetensors", dtype=memory)
        assert {p.dtype for p in again.parameters()} == {memory}
    assert model.embed.weight.dtype == torch.float32
    expected = model.embed.weight.to(dtype).float()
    assert torch.equal(load_model(tmp_path / "m.safetensors").embed.weight, expected)


def test_the_file_can_be_replaced_while_a_model_from_it_is_in_use(tmp_path):
    path = tmp_path / "m.safetensors"
    model = small(LLAMA)
    save_model(model, path)
    again = load_model(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(again(some_tokens()), model(some_tokens()))


def test_a_cut_file_is_refused_wherever_it_was_cut(tmp_path):
    save_model(small(COURSE), tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    for size in [0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            load_model(tmp_path / "cut.safetensors")


HEADER = {"kind": "llm-course model 1", "config": json.dumps(dataclasses.asdict(GPTConfig(40)))}


@pytest.mark.parametrize("change, message", [
    ({"kind": "gguf"}, "save_model did not write it"),
    ({"kind": "llm-course model 9"}, "update llm-course"),
    ({"config": "{"}, "no configuration that can be read"),
    ({"config": "{}"}, "no configuration that can be read"),
    ({"config": HEADER["config"].replace("vocab_size", "words")}, "no configuration"),
    ({"config": HEADER["config"].replace('"n_heads": 4', '"n_heads": 5')}, "n_heads=5"),
    ({}, "do not fit")])
def test_foreign_headers_are_refused(change, message, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(save({"w": torch.zeros(2)}, {**HEADER, **change}))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "m.safetensors")


@each_style
def test_hidden_is_what_the_head_reads(style):
    model, tokens, segments = small(style), some_tokens(), torch.arange(24)[None].expand(2, -1) // 7
    for inputs in ((tokens,), (tokens, segments)):
        x = model.hidden(*inputs)
        assert x.shape == (2, 24, 32)
        assert torch.equal(model.head(x), model(*inputs))
    with pytest.raises(ValueError, match="context_length is 24"):
        model.hidden(some_tokens(25))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        load_model(tmp_path / "nothing.safetensors")


KILLED = """
import os, sys, torch
from llm_course.model.files import save_model
from llm_course.model.gpt import GPT, GPTConfig
torch.manual_seed(0)
model = GPT(GPTConfig(40, d_model=256))
save_model(model, sys.argv[1])
print("ready", flush=True)
while True:
    save_model(model, sys.argv[1])
"""


def test_killed_while_saving_leaves_a_whole_file(tmp_path):
    path = tmp_path / "m.safetensors"
    for seconds in (0.01, 0.05, 0.13):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        process.stdout.readline()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        assert load_model(path).config.d_model == 256


# --- Several texts in one row -------------------------------------------------------------------

def packed_texts(g, n_rows=2, T=24):
    "Random tokens, and segments of random lengths with numbers that repeat."
    tokens = torch.randint(40, (n_rows, T), generator=g)
    segments = torch.zeros(n_rows, T, dtype=torch.long)
    for row in segments:
        for at in torch.randperm(T - 1, generator=g)[:3].tolist():
            row[at + 1:] = 1 - row[at + 1:]
    return tokens, segments


def alone(model, tokens, segments):
    "Logits of each text without its neighbours, laid end to end."
    rows = []
    for row, numbers in zip(tokens, segments):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        rows.append(torch.cat([model(text[None])[0] for text in row.split(lengths)]))
    return torch.stack(rows)


@each_style
@pytest.mark.parametrize("groups, window", [(4, None), (2, 3), (1, 1)])
def test_packed_texts_do_not_notice_each_other(style, groups, window):
    model = small(style, n_kv_heads=groups, window=window)
    tokens, segments = packed_texts(torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = alone(model, tokens, segments)
        assert torch.allclose(model(tokens, segments), expected, atol=1e-5 * expected.abs().max())
        low = model.bfloat16()
        got, expected = low(tokens, segments), alone(low, tokens, segments)
        assert ((got - expected).norm() / expected.norm()) < 0.02


@each_style
def test_packed_texts_compile_in_one_piece(style):
    torch.compiler.reset()
    model = small(style)
    tokens, segments = packed_texts(torch.Generator().manual_seed(5))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(tokens, segments), model(tokens, segments), atol=1e-4)


@each_style
def test_packed_texts_learn_like_texts_alone(style):
    "The gradients are the same, also when blocks are computed again in the backward pass."
    tokens, segments = packed_texts(torch.Generator().manual_seed(4))
    gradients = []
    for read in (lambda m: m(tokens, segments), lambda m: alone(m, tokens, segments),
                 lambda m: recompute_blocks(m)(tokens, segments=segments)):
        model = small(style).double()
        F.cross_entropy(read(model)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert torch.allclose(a, b, atol=1e-5)  # tables of rotations are float32


def test_one_text_a_row_takes_the_same_path_as_ever():
    assert mark_segments(None) == (None, None, None)
    model = small(COURSE)
    maps = attention_maps(model, some_tokens())
    packed = attention_maps(model, some_tokens(), torch.zeros(2, 24, dtype=torch.long))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(maps, packed, strict=True))


def test_blocks_travel_between_processes():
    "A model can be pickled and copied: token shift or not."
    for style in (LLAMA, COURSE):
        again = pickle.loads(pickle.dumps(small(style)))
        assert torch.equal(again(some_tokens()), small(style)(some_tokens()))
