"""Small weights: codes, blocks, files, chosen codes, pruning, teachers and longer contexts."""

import json
import math
import time

import pytest
import torch
from torch import nn

from llm_course.core import asset
from llm_course.model.block import COURSE, GPT2, LLAMA
from llm_course.model.files import load_model
from llm_course.model.gguf import pack_blocks, unpack_blocks
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.ship import quantize as q


def random_gpt(style=COURSE, **sizes):
    torch.manual_seed(0)
    sizes = {"context_length": 24, "d_model": 32, "n_layers": 2, "n_heads": 2, **sizes}
    model = GPT(GPTConfig(50, style=style, **sizes)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e3])
def test_no_weight_is_off_by_more_than_half_a_step(bits, symmetric, scale):
    torch.manual_seed(bits)
    weight = torch.randn(6, 48) * scale
    weight[0] = weight[0].abs()  # all of one sign
    weight[1] = 0.0
    coded = q.quantize_weight(weight, bits, 16, symmetric)
    off = (q.dequantize_weight(coded) - weight).unflatten(1, (3, 16)).abs()
    assert (off <= 0.51 * coded.scales.float()[..., None]).all()
    assert not q.dequantize_weight(coded)[1].any(), "nought stays nought"
    assert coded.nbytes() == 6 * 48 * bits // 8 + 6 * 3 * (2 if symmetric else 3)


def test_what_cannot_be_coded_is_refused():
    for bad in (torch.tensor([[math.nan, 1.0]]), torch.tensor([[math.inf, 1.0]]),
                torch.tensor([[1e30, 1.0]])):
        with pytest.raises(ValueError, match="NaN, infinity or numbers beyond"):
            q.quantize_weight(bad)
    for how, word in (({"bits": 5}, "bits is 5"), ({"group": 3}, "groups of 3")):
        with pytest.raises(ValueError, match=word):
            q.quantize_weight(torch.zeros(2, 8), **how)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_ggufs(seed):
    quants = pytest.importorskip("gguf").quants
    from gguf import GGMLQuantizationType as Kind

    torch.manual_seed(seed)
    rows = torch.randn(17, 96) * 10 ** torch.empty(17, 1).uniform_(-4, 3)
    rows[3] = rows[3].round()  # ties
    rows[4, :32] = 0.0
    rows[5] = rows[5].sign()
    for kind in (Kind.Q8_0, Kind.Q4_0):
        theirs = quants.quantize(rows.numpy(), kind)
        assert pack_blocks(rows, kind.name).numpy().tobytes() == theirs.tobytes()
        same = quants.dequantize(theirs, kind)
        back = unpack_blocks(torch.from_numpy(theirs), kind.name)
        assert back.numpy().tobytes() == same.tobytes()


@pytest.mark.parametrize("style", [GPT2, LLAMA, COURSE], ids=["gpt2", "llama", "course"])
def test_memory_is_really_smaller(style):
    model = random_gpt(style, d_model=128, n_layers=1)
    before = q.model_bytes(model)
    small = q.quantize_model(model, 8)
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in [*small.parameters(), *small.buffers()]}
    tables = sum(t.nbytes for t in small.position.buffers()) if style != GPT2 else 0
    learned = small.position.weight.nbytes if style == GPT2 else 0
    assert sum(kept.values()) - tables - learned < 0.27 * (before - learned)


def test_the_fast_product_is_near_and_does_not_depend_on_the_batch():
    layer = nn.Linear(96, 40)
    fast = q.QuantLinear(q.quantize_weight(layer.weight), layer.bias, fast=True)
    x = torch.randn(7, 3, 96)
    with torch.no_grad():
        exact, got = layer(x), fast(x)
        assert (exact - got).norm() < 0.02 * exact.norm()
        assert torch.equal(fast(x[2]), got[2])
        assert fast(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_int8_product_is_faster():
    if not q._has_int8_product():
        pytest.skip("this torch has no int8 product for this CPU")
    linear = nn.Linear(4096, 4096, bias=False)
    fast = q.QuantLinear(q.quantize_weight(linear.weight), fast=True)
    x = torch.randn(1, 4096)

    def seconds(layer):
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(5):
                layer(x)
        return time.perf_counter() - start

    times = [(seconds(linear), seconds(fast)) for _ in range(6)][1:]
    assert min(b for _, b in times) < min(a for a, _ in times)


@pytest.mark.parametrize("style", [GPT2, LLAMA, COURSE], ids=["gpt2", "llama", "course"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_file_gives_the_same_model(style, bits, tmp_path):
    model = q.quantize_model(random_gpt(style), bits, 8)
    q.save_quantized(model, tmp_path / "m.safetensors")
    again = q.load_quantized(tmp_path / "m.safetensors")
    tokens = torch.arange(24)[None]
    assert torch.equal(again(tokens), model(tokens))
    assert again.config == model.config


def test_a_lying_file_is_refused_by_name(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save

    path = tmp_path / "m.safetensors"
    q.save_quantized(q.quantize_model(random_gpt(), 4, 16), path)
    with safe_open(path, "pt") as f:
        header, state = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}
    config = json.loads(header["config"])
    lies = [({"config": json.dumps({**config, "n_layers": 10**7})}, {}),
            ({"config": json.dumps({**config, "d_model": 64})}, {}),
            ({"bits": json.dumps({"embed": 3})}, {}),
            ({"bits": json.dumps({"blocks": 4})}, {}), ({"bits": "[]"}, {}), ({"bits": "{"}, {}),
            ({}, {"head.codes": torch.zeros(2, 2, dtype=torch.uint8)}),
            ({}, {"head.scales": torch.full_like(state["head.scales"], math.nan)}),
            ({}, {"more": torch.zeros(1)})]
    for number, (changed, tensors) in enumerate(lies):
        bad = tmp_path / f"bad{number}.safetensors"
        bad.write_bytes(save({**state, **tensors}, {**header, **changed}))
        with pytest.raises(ValueError, match=f"bad{number}"):
            q.load_quantized(bad)


@pytest.mark.parametrize("style", [LLAMA, COURSE], ids=["llama", "course"])
def test_an_int8_cache_reads_in_pieces_as_at_once(style):
    model = random_gpt(style)
    tokens = torch.randint(50, (3, 20))
    whole, parts = q.Int8Cache(model, 3, 20), q.Int8Cache(model, 3, 20)
    once = whole.read(tokens, every=True)
    pieces = torch.cat([parts.read(t, every=True) for t in tokens.split([7, 1, 12], 1)], 1)
    assert (once - pieces).abs().max() < 1e-3
    with torch.no_grad():
        exact = model(tokens)
    assert (once - exact).norm() < 0.05 * exact.norm()


def test_recorded_prices_keep_their_bars():
    ways = json.loads(asset("compress.json").read_text(encoding="utf-8"))["ways"]
    price = {w["name"]: w["excess"][0] for w in ways if w["kind"] == "bits"}
    assert price["int8 rows"] - price["float32"] <= 0.002
    assert price["int4 by 32, feedback"] - price["float32"] <= 0.02
    seeds = [len(w["excess"]) for w in ways if w["kind"] in ("pruned, recovered", "distilled")]
    assert seeds and min(seeds) >= 3


def test_the_story_model_in_eight_bits_costs_next_to_nothing():
    from llm_course.tokens.exchange import load_tokenizer
    from llm_course.train.floor import floor_excess
    from llm_course.world import World

    world, tokenizer = World(seed=0), load_tokenizer(asset("story.bpe"))
    stories = world.sample(8, seed=77)
    model = load_model(asset("story.safetensors"))
    before = floor_excess(model, tokenizer, world, stories).excess
    after = floor_excess(q.quantize_model(model), tokenizer, world, stories).excess
    assert abs(after - before) <= 0.002
