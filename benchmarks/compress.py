"""A smaller story model: bytes, nats above the floor and tokens per second of each way.

    python benchmarks/compress.py [--stories N] [--threads N]

The story model as it ships, in float32, and in eight and four bits by the course's code and, where
it is installed, by torchao, on the same weights. "nats" is what a way costs on the same unseen
stories, above what float32 needs. "reads" are tokens per second of whole stories read together,
"writes" of one text at a time. Then the matrix product alone, at the size of a large model's layer
(4096 x 4096) and for one position, where reading the weights takes the time: float32 beside int8.
All sides take turns in one run; medians of the rounds.

The last line is JSON; `value` is what int8 costs in nats per token, and the bar is 0.002; `int4` is
what four bits cost (groups of 32, error feedback), bar 0.02; `product` how many times as fast the
int8 product is.
"""

import argparse
import copy
import json
import warnings

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch
from torch import nn

from llm_course.core import asset
from llm_course.data.batches import DocumentBatches, one_pass
from llm_course.data.shards import memory_shards
from llm_course.generate.write import sample_batch
from llm_course.model.files import load_model
from llm_course.ship.compress import input_grams, quantize_with_feedback
from llm_course.ship.quantize import (
    QuantLinear, model_bytes, quantize_model, quantize_weight)
from llm_course.tokens.exchange import load_tokenizer
from llm_course.train.loop import evaluate
from llm_course.train.meter import take_turns
from llm_course.world import World


def by_torchao(model, kind: str):
    "torchao's own layers; the table stays as it is. None if it can't here."
    try:
        from torchao import quantization as ao
        config = {"torchao int8": lambda: ao.Int8WeightOnlyConfig(),
                  "torchao int8, int8 inputs":
                      lambda: ao.Int8DynamicActivationInt8WeightConfig()}[kind]()
        model.embed = quantize_table(model)
        ao.quantize_(model, config, filter_fn=lambda m, name: type(m) is nn.Linear)
        for layer in model.modules():
            if type(layer) is nn.Linear:  # seen by the cache: do not join these matrices
                layer.register_forward_hook(lambda *parts: None)
        model(torch.zeros(1, 4, dtype=torch.long))
        return model
    except Exception as error:  # another version, another machine
        print(f"{kind}: not run ({type(error).__name__}: {str(error)[:60]})")
        return None


def quantize_table(model):
    "The same table as ours has, so that only the linear layers differ."
    part = quantize_model(copy.deepcopy(model), choose=lambda name, w:
                          quantize_weight(w) if name == "embed" else None)
    return part.embed


def ao_bytes(model) -> int:
    "Bytes of torchao's tensors, whose data lie inside."
    total = 0
    for tensor in model.state_dict().values():
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        parts = [getattr(tensor, n) for n in names] or [tensor]
        total += sum(p.nbytes for p in parts)
    return total


def ways(make, grams: dict) -> dict:
    "Name -> (model, bytes)."
    feedback = lambda name, w: (quantize_with_feedback(w, grams[name], 4, 32) if name in grams
                                else quantize_weight(w, 4, 32))
    found = {"float32": make(), "int8 rows": quantize_model(make()),
             "int8 rows, int8 inputs": quantize_model(make(), fast=True),
             "int4 by 32": quantize_model(make(), 4, 32),
             "int4 by 32, feedback": quantize_model(make(), choose=feedback)}
    sizes = {name: model_bytes(model) for name, model in found.items()}
    for kind in ("torchao int8", "torchao int8, int8 inputs"):
        if (model := by_torchao(make(), kind)) is not None:
            found[kind], sizes[kind] = model, ao_bytes(model)
    return {name: (model, sizes[name]) for name, model in found.items()}


def product(rounds: int, size: int = 4096) -> dict:
    "One position through one large layer: seconds of float32 and of int8."
    linear = nn.Linear(size, size, bias=False)
    small = QuantLinear(quantize_weight(linear.weight), fast=True)
    x = torch.randn(1, size)
    repeat = lambda layer: lambda: [layer(x) for _ in range(5)]
    return take_turns({"float32": repeat(linear), "int8": repeat(small)}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    world, tokenizer = World(seed=0), load_tokenizer(asset("story.bpe"))
    unseen = world.sample(args.stories, seed=12)
    shards = memory_shards(unseen, tokenizer)
    batches = list(one_pass(DocumentBatches(shards, 32, 224, pack=False)))
    floor = -sum(map(world.log_prob, unseen)) / (shards.n_tokens - 1)
    make = lambda: load_model(asset("story.safetensors"))
    read = [torch.tensor([tokenizer.end_id, *tokenizer.encode(s)]) for s in world.sample(60, seed=11)]
    models = ways(make, input_grams(make(), read))
    excess = {name: evaluate(model, batches) - floor for name, (model, _) in models.items()}
    some, new = batches[0][0][:8], 24
    reads = take_turns({n: lambda m=m: m(some) for n, (m, _) in models.items()}, args.rounds)
    writes = take_turns({n: lambda m=m: sample_batch(m, [[tokenizer.end_id]], new, temperature=0)
                         for n, (m, _) in models.items()}, args.rounds)
    print(f"{'':28} {'MB':>5} {'excess':>8} {'nats':>8} {'reads':>9} {'writes':>7}  tokens/s")
    for name, (_, size) in models.items():
        cost = excess[name] - excess["float32"]
        print(f"{name:28} {size / 1e6:5.2f} {excess[name]:8.4f} {cost:+8.4f} "
              f"{some.numel() / reads[name]:9,.0f} {new / writes[name]:7,.0f}")
    s = product(args.rounds)
    gain = s["float32"] / s["int8"]
    print(f"one position through 4096 x 4096: int8 {gain:.2f} times as fast as float32")
    costs = {name: round(excess[name] - excess["float32"], 5) for name in models}
    print(json.dumps({
        "name": "compress", "value": costs["int8 rows"], "unit": "nats per token lost at int8",
        "bar": 0.002, "int4": costs["int4 by 32, feedback"], "int4_bar": 0.02,
        "int8_inputs": costs["int8 rows, int8 inputs"],
        "torchao_int8": costs.get("torchao int8"), "product": round(gain, 2),
        "reads_int8_over_float32": round(reads["float32"] / reads["int8 rows, int8 inputs"], 2),
        "bytes": {n: size for n, (_, size) in models.items()}, "threads": args.threads}))


if __name__ == "__main__":
    main()
