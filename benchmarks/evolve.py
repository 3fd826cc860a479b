"""Losses of 256 transformers of about 10,000 parameters: in one pass beside a plain Python loop.

    python benchmarks/evolve.py

The loop has 256 models ready and calls one after the other, with one thread or all, whichever is
faster; the library gets 256 vectors, or one vector and 256 low-rank changes. All of them compute in
float32 and take turns in one run, and the table shows medians of the rounds, beside the time that
the matrix products alone would take in one large product. Then a whole step of an evolution
strategy, beside evosax (pip install evosax) where it is installed. The last line is JSON; `value`
is the loop's time over the library's at 32 tokens per evaluation. The bars: 5 there, 1.5 at 2,048
tokens with low-rank changes, and 1 everywhere.
"""

import copy
import importlib.util
import json
import sys
import warnings
from functools import partial

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch
import torch.nn.functional as F

from llm_course.core import set_seed
from llm_course.evolve.population import population_loss
from llm_course.evolve.stack import draw_low_rank
from llm_course.evolve.vectors import dense_candidates, flatten_model, parameter_shapes
from llm_course.model.block import Style
from llm_course.model.gpt import GPT, GPTConfig, flops_per_token
from llm_course.train.meter import take_turns
from llm_course.train.runner import keep_memory

ROUNDS, POPULATION, VOCAB, CONTEXT, SIGMA = 7, 256, 56, 32, 0.05
STYLE = Style(norm="rms-plain", position="none", activation="relu2", bias=True, init="small")
SIZES = (32, 128, 512, 2048)


def peak_flops() -> float:
    "Multiplications plus additions per second in one large float32 product."
    x = torch.randn(1536, 1536)
    return 2 * 1536**3 / take_turns({"product": lambda: x @ x}, ROUNDS)["product"]


def make() -> tuple:
    "The model, its vector, low-rank candidates, and the same candidates as ready-made models."
    set_seed(0)
    model = GPT(GPTConfig(VOCAB, CONTEXT, 24, n_layers=1, n_heads=1, style=STYLE)).eval()
    vector = flatten_model(model)
    low = draw_low_rank(vector, tuple(parameter_shapes(model).values()), POPULATION, SIGMA)
    models = [copy.deepcopy(model) for _ in range(POPULATION)]
    for one, own in zip(models, dense_candidates(low)):
        flatten_model(one).copy_(own)
    return model, vector, low, models


@torch.no_grad()
def loop(models: list, tokens, targets, threads: int | None = None):
    "One model after the other."
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    flat = targets.flatten()
    losses = torch.stack([F.cross_entropy(model(tokens).flatten(0, 1), flat) for model in models])
    torch.set_num_threads(before)
    return losses


def evaluations() -> dict:
    "Print evaluations per second; returns seconds by (side, tokens)."
    model, vector, low, models = make()
    crowd, peak, seconds = dense_candidates(low), peak_flops(), {}
    print(
        f"{POPULATION} models of {len(vector):,} parameters, {torch.get_num_threads()} threads, "
        f"{peak / 1e9:.0f} GFLOP/s in one large product; evaluations per second (times the loop)"
    )
    print(
        f"{'tokens':>6}{'loop':>10}{'vmap':>18}{'library':>18}{'low rank':>18}{'products alone':>20}"
    )
    for n in SIZES:
        tokens, targets = torch.randint(VOCAB, (2, n // CONTEXT, CONTEXT))
        sides = {
            "loop": partial(loop, models, tokens, targets),
            "loop, one thread": partial(loop, models, tokens, targets, threads=1),
            "vmap": partial(population_loss, model, crowd, tokens, targets, how="vmap"),
            "library": partial(population_loss, model, crowd, tokens, targets),
            "low": partial(population_loss, model, low, tokens, targets),
        }
        for work in sides.values():
            assert torch.allclose(work(), sides["loop"](), atol=1e-4)
        turn = take_turns(sides, ROUNDS, 0)
        turn["loop"] = min(turn["loop"], turn.pop("loop, one thread"))  # it gets its best
        turn["ceiling"] = (
            POPULATION * n * flops_per_token(model.config, CONTEXT, training=False) / peak
        )
        seconds |= {(name, n): s for name, s in turn.items()}
        cells = [f"{POPULATION / s:,.0f} ({turn['loop'] / s:.1f})" for s in list(turn.values())[1:]]
        print(
            f"{n:6}{POPULATION / turn['loop']:10,.0f}"
            + "".join(f"{c:>18}" for c in cells[:-1])
            + f"{cells[-1]:>20}"
        )
    return seconds


def our_steps(tokens, targets) -> dict:
    "Whole steps of the library's evolution strategy: ask, score, tell."
    from llm_course.evolve.population import LowRankNoise
    from llm_course.evolve.strategies import ES

    model, vector, _, _ = make()

    def stepper(es):
        def step():
            es.tell(-population_loss(model, es.ask(), tokens, targets))

        return step

    noise = LowRankNoise(parameter_shapes(model))
    return {
        "ours, full noise": stepper(ES(vector, POPULATION, SIGMA)),
        "ours, low rank": stepper(ES(vector, POPULATION, SIGMA, noise=noise)),
    }


def jax_loss(shapes: dict):
    "The same transformer in JAX: (vector, tokens, targets) -> mean loss."
    import jax
    import jax.numpy as jnp

    def norm(x):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def loss(vector, tokens, targets):
        w, at = {}, 0
        for name, shape in shapes.items():
            size = int(torch.tensor(shape).prod())
            w[name], at = vector[at : at + size].reshape(shape), at + size

        def linear(x, name):
            y = x @ w[f"{name}.weight"].T
            return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

        x = w["embed.weight"][tokens]
        h, a = norm(x), "blocks.0.attention."
        q, k, v = (linear(h, a + part) for part in ("query", "key", "value"))
        scores = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5
        T = tokens.shape[1]
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -1e30)
        x = x + linear(jax.nn.softmax(scores) @ v, a + "out")
        h = jax.nn.relu(linear(norm(x), "blocks.0.feed_forward.up")) ** 2
        x = x + linear(h, "blocks.0.feed_forward.down")
        logs = jax.nn.log_softmax(linear(norm(x), "head"))
        return -jnp.take_along_axis(logs, targets[..., None], -1).mean()

    return loss


def evosax_step(tokens, targets):
    "A compiled step of evosax's Open_ES on the same model."
    import jax
    import jax.numpy as jnp
    import optax
    from evosax.algorithms import Open_ES

    model, vector, low, _ = make()
    loss = jax_loss(parameter_shapes(model))
    tokens_, targets_ = jnp.array(tokens.numpy()), jnp.array(targets.numpy())
    scores = jax.jit(jax.vmap(loss, (0, None, None)))
    got = torch.tensor(scores(jnp.array(dense_candidates(low).numpy()), tokens_, targets_).tolist())
    assert torch.allclose(got, population_loss(model, low, tokens, targets), atol=1e-4)
    start = jnp.array(vector.numpy())
    es = Open_ES(
        POPULATION, start, optimizer=optax.adam(0.02), std_schedule=optax.constant_schedule(SIGMA)
    )
    key = jax.random.key(0)
    box = [es.init(key, start, es.default_params)]

    @jax.jit
    def step(key, state):
        population, state = es.ask(key, state, es.default_params)
        return es.tell(
            key, population, scores(population, tokens_, targets_), state, es.default_params
        )[0]

    def run():
        box[0] = jax.block_until_ready(step(key, box[0]))

    run()
    return run


def steps() -> dict:
    "Print whole steps per second of evolution strategies; returns seconds by (side, tokens)."
    seconds, missing = {}, None
    if importlib.util.find_spec("evosax") is None:
        missing = "evosax is not installed (pip install evosax), so it has no column"
    for n in SIZES:
        tokens, targets = torch.randint(VOCAB, (2, n // CONTEXT, CONTEXT))
        try:
            sides = our_steps(tokens, targets)
        except ImportError as error:
            print(f"no whole steps: {error}")
            return seconds
        if not missing:
            try:
                sides["evosax"] = evosax_step(tokens, targets)
            except Exception as error:
                said = f"{type(error).__name__}: {str(error)[:200]}"
                missing = f"evosax is installed but does not run here: {said}"
        turn = take_turns(sides, ROUNDS)
        if n == SIZES[0]:
            print("\nwhole steps per second\ntokens" + "".join(f"{name:>18}" for name in sides))
        print(f"{n:6}" + "".join(f"{1 / s:18.1f}" for s in turn.values()))
        seconds |= {(name, n): s for name, s in turn.items()}
    if missing:
        print(missing)
    return seconds


def main() -> None:
    warnings.filterwarnings("ignore", "There is a performance drop")  # vmap says so itself
    keep_memory()
    seconds = evaluations()
    whole = steps()
    ratios = {
        f"{side}_{n}": round(seconds["loop", n] / seconds[side, n], 2)
        for side in ("library", "low", "vmap", "ceiling")
        for n in SIZES
    }
    against = {
        f"evosax_over_ours_{n}": round(whole["evosax", n] / whole["ours, low rank", n], 2)
        for n in SIZES
        if ("evosax", n) in whole
    }
    print(
        json.dumps(
            {
                "name": "evolve",
                "value": ratios["library_32"],
                "unit": "loop's time over the library's, 32 tokens",
                "bar": 5,
                **ratios,
                **against,
            }
        )
    )
    if min(ratios[f"{side}_{n}"] for side in ("library", "low") for n in SIZES) < 1:
        print("slower than the loop somewhere", file=sys.stderr)


if __name__ == "__main__":
    main()
