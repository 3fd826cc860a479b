"""Memory predicted against measured, recomputing, peaks, and the GPU benchmark's smoke run.

The measurements are dry runs: every operation of a training step with fake tensors, which have
shapes and no content. A real step of a small model shows that they count the same.
"""

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_course.core import set_seed
from llm_course.data.batches import RandomWindows
from llm_course.data.shards import memory_shards
from llm_course.model.attention import attend, mask_bias
from llm_course.model.block import COURSE, GPT2, LLAMA, Style
from llm_course.model.files import load_model, save_model
from llm_course.model.gpt import GPT, GPTConfig, flops_per_token
from llm_course.tokens.text import CharTokenizer
from llm_course.train import meter, scale
from llm_course.train.activations import parameter_counts
from llm_course.train.loop import TrainConfig, Trainer, summed_loss, train
from llm_course.train.recipes import adamw_optimizer, course_optimizer, split_params

ROOT = Path(__file__).resolve().parent.parent
F32, BF16 = torch.float32, torch.bfloat16
SMALL = {"context_length": 64, "d_model": 64, "n_layers": 3, "n_heads": 4}
STYLES = {
    "course": COURSE,
    "gpt2": GPT2,
    "llama": LLAMA,
    "no norms to learn": Style(norm="layer-plain", position="none", bias=True),
    "qk norm": Style(qk_norm=True, activation="gelu"),
    "sinusoidal": Style(norm="rms-plain", position="sinusoidal", activation="relu2"),
    "qwen2": Style(activation="gelu-erf", qkv_bias=True),
}
OPTIONS = {
    "plain": {},
    "shared keys": {"n_kv_heads": 2},
    "window": {"window": 16},
    "dropout": {"dropout": 0.1},
    "odd hidden width": {"d_hidden": 200},
}


def prepared(recompute: bool):
    "What a dry run does to its model first."
    return scale.recompute_blocks if recompute else None


# --- Memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_activations_are_predicted(style, options):
    for vocab, dtype in [(50, F32), (50, BF16), (3000, BF16)]:
        config = GPTConfig(vocab, **SMALL, style=style, **options)
        need = scale.memory_need(config, 8, dtype=dtype, device="cpu")
        measured = meter.dry_run(config, 8, dtype).peak
        assert need.parameters + need.activations == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "style, dtype, recompute, T, B, C, L",
    [
        (GPT2, BF16, False, 1024, 8, 768, 12),
        (GPT2, BF16, True, 1024, 8, 768, 12),
        (COURSE, F32, False, 512, 16, 768, 12),
        (COURSE, BF16, True, 2048, 4, 1024, 8),
        (LLAMA, BF16, False, 2048, 2, 1280, 12),  # above 1,024 a CPU's attention is fused, too
    ],
)
def test_real_sizes_are_predicted(style, dtype, recompute, T, B, C, L):
    config = GPTConfig(50257, T, C, L, C // 64, style=style)
    need = scale.memory_need(config, B, dtype=dtype, recompute=recompute, device="cpu")
    measured = meter.dry_run(config, B, dtype, prepared(recompute)).peak
    assert need.parameters + need.activations == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_dry_run_counts_what_a_real_one_counts(dtype, recompute):
    config = GPTConfig(300, **SMALL)
    dry = meter.dry_run(config, 4, dtype, prepared(recompute))
    real = meter.dry_run(config, 4, dtype, prepared(recompute), fake=False)
    assert dry.peak == real.peak


def test_a_dry_run_leaves_nothing_fake_behind():
    config = GPTConfig(300, **SMALL)
    meter.dry_run(config, 2, BF16)
    assert mask_bias.cache_info().currsize == 0
    q = torch.randn(1, 2, 64, 8, dtype=BF16)
    assert attend(q, q, q).isfinite().all()


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("kind", ["course", "adamw"])
def test_weights_and_optimizer_are_counted_exactly(style, kind):
    for options in OPTIONS.values():
        config = GPTConfig(77, **SMALL, style=style, **options)
        model = GPT(config)
        optimizer = (course_optimizer if kind == "course" else adamw_optimizer)(model)
        tensors = [t for o in optimizer.optimizers for ts in o.memory.values() for t in ts]
        need = scale.memory_need(config, 1, optimizer=kind)
        parts = [sum(p.numel() for p in some) for some in split_params(model)]
        assert parameter_counts(config) == tuple(parts)
        assert need.parameters == need.gradients == 4 * sum(parts)
        assert need.optimizer == sum(t.nbytes for t in tensors)


def test_the_optimizer_step_needs_little_more():
    config = GPTConfig(50257, 1024, 1600, 48, 25, style=GPT2)  # the largest GPT-2
    with FakeTensorMode(), meter.MemoryMeter() as watched:
        model = GPT(config)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer = course_optimizer(model)
        for one in optimizer.optimizers:
            one.dtype = BF16  # Muon's products, as in a run in bfloat16
        before = watched.peak = watched.now
        optimizer.step()
    assert watched.peak - before < 1.1e9


def test_the_biggest_batch_fits_and_the_next_does_not():
    for depth, T, gb, recompute in itertools.product((2, 12), (256, 1024), (2, 16), (False, True)):
        config = GPTConfig(50257, T, 64 * depth, depth, depth, style=GPT2)
        how = {"dtype": BF16, "recompute": recompute}
        n = scale.biggest_batch(config, gb * 1e9, **how)
        assert n == 0 or scale.memory_need(config, n, **how).total <= gb * 1e9
        assert scale.memory_need(config, n + 1, **how).total > gb * 1e9


def test_more_of_anything_needs_more():
    base = {"vocab_size": 1000, "context_length": 128, "d_model": 128, "n_layers": 4, "n_heads": 4}
    total = scale.memory_need(GPTConfig(**base), 4).total
    for name in ("vocab_size", "context_length", "n_layers", "d_model"):
        assert scale.memory_need(GPTConfig(**{**base, name: 2 * base[name]}), 4).total > total
    assert scale.memory_need(GPTConfig(**base), 5).total > total
    assert scale.memory_need(GPTConfig(**base), 4, dtype=BF16).total < total
    assert scale.memory_need(GPTConfig(**base), 4, recompute=True).total < total
    assert scale.memory_need(GPTConfig(**base), 4, optimizer="adamw").total > total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpu_needs_what_was_predicted(recompute):
    config = GPTConfig(50304, 1024, 512, 8, 8)
    model = GPT(config).cuda()
    model = scale.recompute_blocks(model) if recompute else model
    text = torch.randint(50304, (8, 1024), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    summed_loss(model, text, text, BF16).backward()
    need = scale.memory_need(config, 8, dtype=BF16, recompute=recompute)
    expected = need.parameters + need.activations
    assert meter.memory_used("cuda") == pytest.approx(expected, rel=0.1)


def test_the_memory_of_this_process():
    program = (
        "import torch; from llm_course.train.meter import memory_used; a = memory_used('cpu'); "
        "x = torch.ones(2 * 10**8); b = memory_used('cpu'); del x; print(a, b, memory_used('cpu'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    before, with_it, after = map(int, run.stdout.split())
    assert 6e8 < with_it - before < 1e9, (before, with_it)
    assert after > 0.99 * with_it  # a peak does not fall; Linux counts in steps


# --- Recomputing --------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_recomputing_changes_no_gradient(style, dtype):
    set_seed(0)
    model = GPT(GPTConfig(50, **SMALL, style=style, dropout=0.2))
    for p in model.parameters():  # blocks must do something, whatever the style begins with
        p.data += 0.02 * torch.randn_like(p)
    saving = scale.recompute_blocks(scale.recompute_blocks(copy.deepcopy(model)))
    assert list(saving.state_dict()) == list(model.state_dict())
    tokens = torch.randint(50, (3, 64))
    for m in (model, saving, copy.deepcopy(saving)):
        set_seed(1)
        summed_loss(m, tokens, tokens, dtype).backward()
        for a, b in zip(model.parameters(), m.parameters()):
            assert not a.requires_grad or torch.equal(a.grad, b.grad)


def test_a_copy_uses_its_own_weights():
    saving = scale.recompute_blocks(GPT(GPTConfig(50, **SMALL, style=LLAMA)))
    other = copy.deepcopy(saving)
    with torch.no_grad():
        for p in other.blocks.parameters():
            p.zero_()
    tokens = torch.arange(10)[None]
    assert not torch.equal(saving(tokens), other(tokens))
    assert torch.equal(other(tokens), other.head(other.norm(other.embed(tokens))))


def test_a_run_goes_on_with_recomputing(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_course.train.loop.fits_lean", lambda *_: False)  # it rounds otherwise
    shards = memory_shards(
        ["to be or not to be, that is the question. " * 30],
        CharTokenizer.train(["to be or not to be, that is the question. "]),
    )
    config = TrainConfig(steps=8, precision="float32")

    def run(folder, *recompute):
        for stop, on in zip((4, 8), recompute):
            set_seed(0)
            model = GPT(GPTConfig(shards.vocab_size, 32, 32, 2, 2, dropout=0.1))
            model = scale.recompute_blocks(model) if on else model

            def halt(trainer, stop=stop):
                if trainer.progress.step == stop < 8:
                    raise InterruptedError

            try:
                windows = RandomWindows(shards, 4, 32)
                train(model, windows, config, folder=folder, eval_every=2, watch=halt)
            except InterruptedError:
                pass
        save_model(model, folder / "end.safetensors")
        return load_model(folder / "end.safetensors").state_dict()

    plain = run(tmp_path / "a", False, False)
    mixed = run(tmp_path / "b", True, False)
    assert all(torch.equal(plain[name], mixed[name]) for name in plain)


# --- Time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype, peak",
    [
        ("NVIDIA H200", BF16, 989e12),
        ("NVIDIA H200 NVL", BF16, 836e12),
        ("NVIDIA GH200 480GB", BF16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989e12),
        ("NVIDIA H100 PCIe", BF16, 756e12),
        ("NVIDIA A100-SXM4-40GB", BF16, 312e12),
        ("NVIDIA A100 80GB PCIe", BF16, 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", BF16, None),
        ("NVIDIA A10", BF16, 125e12),
        ("NVIDIA A10G", BF16, 70e12),
        ("NVIDIA L4", BF16, 121e12),
        ("NVIDIA L40S", BF16, 362e12),
        ("NVIDIA B200", BF16, 2250e12),
        ("NVIDIA RTX 6000 Ada Generation", BF16, 364e12),
        ("NVIDIA GeForce RTX 4090", BF16, 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", BF16, None),
        ("NVIDIA GeForce RTX 3050", BF16, None),
        ("AMD Instinct MI300X", BF16, 1307e12),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla T4", BF16, None),
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        ("Tesla V100-PCIE-32GB", torch.float16, 112e12),
        ("NVIDIA H200", F32, None),
    ],
)
def test_listed_peaks(name, dtype, peak):
    assert meter.listed_peak(name, dtype) == peak


def test_utilisation_is_useful_flops_over_the_peak(monkeypatch):
    monkeypatch.setattr(scale, "peak_flops", lambda device, dtype: 312e12)
    gpt2 = GPTConfig(50257, 1024, 768, 12, 12, style=GPT2)
    in_products = parameter_counts(gpt2).matrices + 50257 * 768
    per_token = 6 * in_products + 12 * 12 * 768 * 1024  # 6 N + 12 L C T
    assert flops_per_token(gpt2) == per_token
    assert scale.mfu(180_000, gpt2, "cuda", BF16) == pytest.approx(180_000 * per_token / 312e12)


def test_peaks_are_measured_where_no_list_helps():
    peak = meter.peak_flops("cpu")
    assert 1e9 < peak < 1e14 and meter.peak_flops("cpu") == peak  # measured once
    assert 1e8 < meter.memory_bandwidth("cpu") < 1e13


# --- Compiling ----------------------------------------------------------------------------------


def test_when_to_compile(monkeypatch):
    model = GPT(GPTConfig(50, **SMALL))
    for compiler, mode, minutes, compiled in [
        (True, "auto", 0, False),
        (True, "auto", 60, True),
        (False, "auto", 60, False),
        (False, "off", 60, False),
        (True, "on", 0, True),
    ]:
        monkeypatch.setattr(meter, "has_cpp_compiler", lambda compiler=compiler: compiler)
        result = meter.maybe_compile(model, mode, minutes)
        assert (result is not model) == compiled
    with pytest.raises(ValueError, match="auto, on or off"):
        meter.maybe_compile(model, "maybe")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("style", [COURSE, GPT2, LLAMA], ids=["course", "gpt2", "llama"])
def test_the_model_is_one_graph(style, recompute):
    "No break in the graph: otherwise compiling gains little."
    set_seed(0)
    model = GPT(GPTConfig(50, **SMALL, style=style))
    model = scale.recompute_blocks(model) if recompute else model
    tokens = torch.randint(50, (2, 64))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    summed_loss(compiled, tokens, tokens).backward()
    torch.compiler.reset()


# --- The benchmark ------------------------------------------------------------------------------


def benchmark(*arguments):
    program = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=240)


def test_the_gpu_benchmark_runs_and_claims_nothing_on_a_cpu():
    run = benchmark("--smoke")
    assert run.returncode == 0, run.stderr[-2000:]
    line = json.loads(run.stdout.splitlines()[-1])
    assert line["name"] == "gpu" and line["value"] is None and line["bar"] == 50
    assert line["measured"] is False and "nothing was measured" in run.stdout
    assert "Error" not in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_what_it_needs():
    run = benchmark()
    assert run.returncode == 2 and "--smoke" in run.stderr and not run.stdout


def test_three_precisions_agree():
    shards = memory_shards(
        ["the cat sat on the mat. " * 80], CharTokenizer.train(["the cat sat on the mat. "])
    )
    losses = {}
    for precision in ("float32", "bfloat16", "float16"):
        set_seed(0)
        model = GPT(GPTConfig(shards.vocab_size, 32, 48, 2, 2))
        trainer = Trainer(
            model, RandomWindows(shards, 8, 32), TrainConfig(steps=20, precision=precision)
        )
        losses[precision] = torch.stack([trainer.take_step() for _ in range(20)])
    for precision in ("bfloat16", "float16"):
        assert (losses[precision] - losses["float32"]).abs().max() < 0.05
    assert losses["float32"][-1] < 0.7 * losses["float32"][0]
