"""A smaller story model, in every way of lessons 90 and 94: bytes against nats above the floor.

    python experiments/compress.py [--part bits|pruned|distilled] [--only NAME]
                                   [--save llm_course/assets]

Bits: matrices in eight, four and two bits, rounded, with scaled inputs, with error feedback.
Pruned: half of the blocks' weights by size, by Wanda, 2:4; a head of each layer; a whole layer;
before and after a short training on new stories, three seeds, and beside it the whole model trained
as long. Distilled: a small model on the same stories from the text, from the story model, from the
true distribution, three seeds. All are graded on the same unseen stories, by which nothing was
chosen: the layer that is left out and the rate of recovery were, on others. Each result is added to
compress.json in the folder of --save as soon as it is there; --only repeats one way. Without
--save, the ways in bits are repeated and compared with what was recorded. The last line is JSON;
`value` is the excess that int8 costs, bar 0.002.
"""

import argparse
import copy
import json
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch
from torch import nn

from record import made_by
from llm_course.core import asset, atomic_write
from llm_course.data.batches import DocumentBatches, one_pass
from llm_course.data.shards import memory_shards
from llm_course.model.files import load_model
from llm_course.model.gguf import BLOCK_KINDS, pack_blocks, unpack_blocks
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.ship.compress import input_grams, quantize_with_feedback, scale_loud_inputs
from llm_course.ship.distill import (
    TrueTeacher, head_shares, keep_largest, leave_out_heads, prune, pruned_bytes, remove_layer,
    train_softly, wanda_scores)
from llm_course.ship.quantize import (
    dequantize_weight, model_bytes, quantize_model, quantize_weight)
from llm_course.tokens.exchange import load_tokenizer
from llm_course.train.floor import shrink_embedding
from llm_course.train.loop import TrainConfig, evaluate
from llm_course.world import World

SEEDS, UNSEEN, CONTEXT = (0, 1, 2), 100, 224
RECOVER, RATES = {"steps": 24, "stories": 8}, (0.0005, 0.001, 0.002, 0.004, 0.008)
TEACH = {"steps": 100, "stories": 8, "width": 64, "layers": 2}


class Bench:
    "The world, the model, stories to judge by, and what goes into each layer."

    def __init__(self):
        self.world, self.tokenizer = World(seed=0), load_tokenizer(asset("story.bpe"))
        self.grading = self._exam(seed=12)
        self.choosing = self._exam(seed=13)  # whoever chooses is not graded by the same stories
        end, encode = self.tokenizer.end_id, self.tokenizer.encode
        read = [torch.tensor([end, *encode(s)]) for s in self.world.sample(100, seed=11)]
        self.grams = input_grams(self.model(), read)

    def model(self) -> GPT:
        return load_model(asset("story.safetensors"))

    def _exam(self, seed: int) -> tuple:
        "Batches of unseen stories, and the lowest loss that is possible on them."
        texts = self.world.sample(UNSEEN, seed=seed)
        shards = memory_shards(texts, self.tokenizer)
        floor = -sum(map(self.world.log_prob, texts)) / (shards.n_tokens - 1)
        return list(one_pass(DocumentBatches(shards, 32, CONTEXT, pack=False))), floor

    def excess(self, model, exam: tuple | None = None) -> float:
        batches, floor = exam or self.grading
        return round(evaluate(model, batches) - floor, 5)

    def stories(self, n: int, seed: int, order: int):
        shards = memory_shards(self.world.sample(n, seed=seed), self.tokenizer)
        return DocumentBatches(shards, RECOVER["stories"], CONTEXT, order, pack=False)


def row(name: str, kind: str, n_bytes: int, excess: list) -> dict:
    "One way, shown and returned."
    print(f"{kind:18} {name:30} {n_bytes / 1e6:5.2f} MB  {excess}", flush=True)
    return {"name": name, "kind": kind, "bytes": n_bytes, "excess": excess}


def replaced(bench: Bench, way) -> GPT:
    "The story model with each matrix replaced by what `way` (name, weight) leaves of it."
    model = bench.model()
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            layer.weight.data = way(name, layer.weight.data)
    return model


def in_bits(bench: Bench, only: str | None) -> list:
    "All ways that keep every weight, in fewer bits."
    whole = bench.model()
    rows = [row("float32", "bits", model_bytes(whole), [bench.excess(whole)]),
            row("bfloat16", "bits", model_bytes(whole) // 2,
                [bench.excess(replaced(bench, lambda n, w: w.bfloat16().float()))])]
    plain = {"int8 rows": (8, None, True), "int4 rows": (4, None, True),
             "int4 by 32": (4, 32, True), "int4 by 32, asymmetric": (4, 32, False),
             "int4 by 16": (4, 16, True), "int2 by 16, asymmetric": (2, 16, False)}
    for name, how in plain.items():
        model = quantize_model(bench.model(), *how)
        rows.append(row(name, "bits", model_bytes(model), [bench.excess(model)]))
    fast = quantize_model(bench.model(), 8, fast=True)
    rows.append(row("int8 rows, int8 inputs", "bits", model_bytes(fast), [bench.excess(fast)]))
    for kind in ("Q8_0", "Q4_0"):
        model = replaced(bench, lambda n, w, kind=kind: unpack_blocks(pack_blocks(w, kind), kind))
        n_bytes = model_bytes(model) // 128 * BLOCK_KINDS[kind].size
        rows.append(row(f"GGUF {kind}", "bits", n_bytes, [bench.excess(model)]))
    for code in ((4, 128, True), (4, 32, True), (2, 16, False)):
        rows += chosen(bench, *code)
    return rows


def chosen(bench: Bench, bits: int, group: int, symmetric: bool) -> list:
    "Codes that are chosen by what goes into a layer."
    rows, spent = [], []

    def feedback(name, w):
        q = quantize_weight(w, bits, group, symmetric)
        if name in bench.grams:
            q = quantize_with_feedback(w, bench.grams[name], bits, group, symmetric)
        spent.append(q.nbytes())
        return dequantize_weight(q)

    def scale(name, w):
        if name not in bench.grams:
            return feedback(name, w)
        q, s = scale_loud_inputs(w, bench.grams[name], bits, group, symmetric)
        spent.append(q.nbytes() + 2 * len(s))
        return dequantize_weight(q) / s

    for label, way in (("feedback", feedback), ("scaled", scale)):
        spent.clear()
        model = replaced(bench, way)
        name = f"int{bits} by {group}, {label}"
        rows.append(row(name, "bits", sum(spent), [bench.excess(model)]))
    return rows


def without_layer(bench: Bench) -> GPT:
    "Without the layer whose loss hurts least, on stories that grade nothing."
    small = [remove_layer(bench.model(), at) for at in range(4)]
    return min(small, key=lambda model: bench.excess(model, bench.choosing))


def cut_ways(bench: Bench) -> dict:
    "Name -> a function that makes a smaller model and its masks."

    def masked(choose):
        def make():
            model = bench.model()
            return model, prune(model, choose)
        return make

    grams = bench.grams
    least = head_shares(bench.model(), grams).argmin(dim=1).tolist()
    return {"nothing": lambda: (bench.model(), {}),
            "half, by size": masked(lambda n, w: keep_largest(w.abs())),
            "half, Wanda": masked(lambda n, w: keep_largest(wanda_scores(w, grams[n]))),
            "2:4, Wanda": masked(lambda n, w: keep_largest(wanda_scores(w, grams[n]), group=4)),
            "one head of two in each layer": masked(leave_out_heads(least, bench.model().config.n_heads)),
            "one layer of four": lambda: (without_layer(bench), {})}


def recovered(bench: Bench, start: GPT, masks: dict, seed: int, rate: float) -> GPT:
    "A cut model, trained a little."
    model, steps = copy.deepcopy(start), RECOVER["steps"]
    batches = bench.stories(steps * RECOVER["stories"], 31, seed)
    train_softly(model, batches, TrainConfig(steps, lr_matrix=rate, lr=0.4 * rate), masks=masks)
    return model


def best_rate(bench: Bench, start: GPT, masks: dict) -> float:
    "The rate with which a cut model recovers best, on stories that grade nothing."
    models = {rate: recovered(bench, start, masks, 9, rate) for rate in RATES}
    found = {rate: bench.excess(model, bench.choosing) for rate, model in models.items()}
    print("  rates:", found, flush=True)
    return min(found, key=found.get)


def pruned(bench: Bench, only: str | None):
    "Cut, graded, trained a little, graded again."
    for name, make in cut_ways(bench).items():
        if only not in (None, name):
            continue
        (start, masks), after = make(), []
        size = pruned_bytes(start, masks)
        yield row(name, "pruned", size, [bench.excess(start)])
        rate = best_rate(bench, start, masks)
        for seed in SEEDS:
            after.append(bench.excess(recovered(bench, start, masks, seed, rate)))
        yield {**row(name, "pruned, recovered", size, after), "rate": rate}


def distilled(bench: Bench, only: str | None):
    "One student, three targets."
    t, teacher = TEACH, bench.model()
    stories = bench.world.sample(t["steps"] * t["stories"], seed=41)
    shards = memory_shards(stories, bench.tokenizer)
    targets = {"from the text": lambda: None,
               "from the teacher": lambda: lambda x: teacher(x).softmax(dim=-1),
               "from the truth": lambda: TrueTeacher(bench.world, bench.tokenizer, stories)}
    for name, make in targets.items():
        if only not in (None, name):
            continue
        after, teach = [], make()
        for seed in SEEDS:
            torch.manual_seed(seed)
            config = GPTConfig(bench.tokenizer.vocab_size, CONTEXT, t["width"], t["layers"], 2)
            model = shrink_embedding(GPT(config))
            batches = DocumentBatches(shards, t["stories"], CONTEXT, seed, pack=False)
            train_softly(model, batches, TrainConfig(t["steps"]), teach)
            after.append(bench.excess(model))
            print(f"  {name}, seed {seed}: {after[-1]}", flush=True)
        yield row(name, "distilled", model_bytes(model) // 2, after)


PARTS = {"bits": in_bits, "pruned": pruned, "distilled": distilled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="this one only")
    parser.add_argument("--only", help="this way only, of the parts pruned or distilled")
    parser.add_argument("--save", type=Path, help="folder of compress.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench, found = Bench(), []
    for part in [args.part] if args.part else PARTS if args.save else ["bits"]:
        for way in PARTS[part](bench, args.only):
            found.append(way)
            if args.save:
                save(args.save / "compress.json", way)
    if not args.save:
        known = json.loads(asset("compress.json").read_text(encoding="utf-8"))["ways"]
        same = {(r["name"], r["kind"]): r["excess"] for r in known}
        off = [abs(a - b) for r in found for a, b in zip(r["excess"], same[r["name"], r["kind"]])]
        print(f"largest difference from what was recorded: {max(off):.5f}")
    by_name = {r["name"]: r["excess"][0] for r in found}
    cost = by_name.get("int8 rows", 0) - by_name.get("float32", 0)
    print(json.dumps({"name": "compress-record", "value": round(cost, 5),
                      "unit": "nats per token lost at int8", "bar": 0.002}))


def save(path: Path, way: dict) -> None:
    "Put one way in the place of what was known of it, or behind all others."
    ways = json.loads(path.read_text(encoding="utf-8"))["ways"] if path.exists() else []
    key = lambda w: (w["name"], w["kind"])
    ways = [way if key(w) == key(way) else w for w in ways]
    ways += [] if way in ways else [way]
    start = next((w["excess"][0] for w in ways if w["name"] == "float32"), None)
    record = {**made_by("python experiments/compress.py --save llm_course/assets"),
              "stories": UNSEEN, "recover": RECOVER, "teach": TEACH, "start": start, "ways": ways}
    with atomic_write(path, "w") as f:
        f.write(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
