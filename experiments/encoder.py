"""Encoder against decoder at equal size, trees against rows, sentences against words: what lesson 37 draws.

    python experiments/encoder.py            repeat one run of the table, and compare
    python experiments/encoder.py --measure  all runs, three seeds each (a quarter of an hour, one thread); the encoder and
                                             the decoder of seed 0 are the two that ship

An encoder and a decoder of one size read the same unlabelled sentences for the same number of steps, the encoder
filling in masked words, the decoder continuing. Then both learn from few labels whether an opinion praises, and
whether one sentence follows from another. A recursive network, a recurrent one and a bag of words learn opinions
from 600 labels. A flat and a hierarchical reader judge guest books. The last line
is JSON; `value` is the encoder's mean accuracy less the decoder's, over both tasks and all numbers of labels,
and the bar is 0.
"""

import argparse
import json
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin

import torch
import torch.nn.functional as F
from torch import nn

from llm_course.core import atomic_write, set_seed
from llm_course.model.encoder import Classifier, DocumentModel, Encoder, RowReader, TreeModel, mask_words
from llm_course.model.files import save_model
from llm_course.model.gpt import GPT, GPTConfig, count_params
from llm_course.tokens.text import WordTokenizer
from llm_course.train.loop import TrainConfig, train
from llm_course.train.recipes import adamw_optimizer, course_optimizer
from llm_course.world.labels import draw_entailments, draw_guest_books, draw_opinions
from llm_course.world.sister import Sister

FILE = Path(__file__).parent.parent / "llm_course" / "assets" / "encoder.json"
SHIPPED = {True: "encoder.safetensors", False: "decoder.safetensors"}
NAMES = ("<|endoftext|>", "<unk>", "<pad>", "<mask>")
SEEDS, HELD, READ_STEPS = (0, 1, 2), 500, 2000
TUNE_STEPS = {400: 200, 1600: 600, 6400: 1000}  # number of labels -> steps of fine-tuning
LOOKS = 250, 500, 1000, 2000  # steps of reading after which the surprise is noted


def in_rows(texts: list, tokenizer) -> torch.Tensor:
    "Token ids with <|endoftext|> on both sides, short rows filled with <pad>."
    rows = [torch.tensor([tokenizer.end_id, *tokenizer.encode(t), tokenizer.end_id]) for t in texts]
    fill = tokenizer.special_tokens["<pad>"]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def make_corpus() -> tuple:
    "Unlabelled sentences, and their tokenizer."
    texts = Sister().sentences(6000, seed=7) + [o.text for o in draw_opinions(3000, seed=7)]
    return texts, WordTokenizer.train(texts, special_tokens=NAMES)


def draws(rows: torch.Tensor, size: int, seed: int):
    "Random batches of row numbers, without end."
    g = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(len(rows), (size,), generator=g), g


def batches_for(rows, tokenizer, masked: bool, seed: int):
    "Batches for the training loop: masked words, or what follows."
    pad, mask = (tokenizer.special_tokens[name] for name in ("<pad>", "<mask>"))
    for i, g in draws(rows, 32, seed):
        row = rows[i]
        if masked:
            read, targets = mask_words(row, mask, len(tokenizer.ranks), generator=g)
        else:
            read, targets = row[:, :-1], row[:, 1:].masked_fill(row[:, 1:] == pad, -100)
        yield read, targets, targets >= 0


@torch.no_grad()
def surprise(body: GPT, texts: list, tokenizer) -> float:
    "Nats at a word: an encoder sees the rest of its sentence, a decoder what stands before."
    total, count = 0.0, 0
    for row in (in_rows([text], tokenizer) for text in texts):
        at, wanted = torch.arange(row.shape[1] - 2), row[0, 1:-1]
        if isinstance(body, Encoder):
            hidden = row.repeat(len(at), 1)
            hidden[at, at + 1] = tokenizer.special_tokens["<mask>"]
            logits = body(hidden)[at, at + 1]
        else:
            logits = body(row)[0, :-2]
        total += F.cross_entropy(logits[:, :len(tokenizer.ranks)], wanted, reduction="sum").item()
        count += len(at)
    return round(total / count, 4)


def unseen_sentences(read: list) -> list:
    "Sentences that are not in the corpus."
    return [text for text in Sister().sentences(6300, seed=7)[6000:] if text not in set(read)][:150]


def pretrain(masked: bool, rows, tokenizer, seed: int, unseen: list, steps: int = READ_STEPS) -> tuple:
    "An encoder or a decoder that has read the corpus, and its surprise on the way."
    set_seed(seed)
    config = GPTConfig(tokenizer.vocab_size, 64, d_model=64, n_layers=2, n_heads=4)
    pad = tokenizer.special_tokens["<pad>"]
    model = Encoder(config, pad) if masked else GPT(config)
    looks = []

    def look(trainer):
        if trainer.progress.step in LOOKS:
            looks.append(surprise(model.eval(), unseen, tokenizer))
            model.train()

    batches = batches_for(rows, tokenizer, masked, seed)
    train(model, batches, TrainConfig(steps, precision="float32"), eval_every=LOOKS[0], watch=look)
    return model.eval(), looks


def fit(model, inputs, labels, steps: int, seed: int, size: int = 32) -> nn.Module:
    "Learn to classify: inputs are a tensor of rows or a list of trees."
    whole = isinstance(model, Classifier)  # the others have hardly a matrix for Muon
    optimizer = course_optimizer(model, 0.01, 0.005) if whole else adamw_optimizer(model, 0.01, weight_decay=0.0)
    take = (lambda i: inputs[i]) if isinstance(inputs, torch.Tensor) else (lambda i: [inputs[k] for k in i])
    for step, (i, _) in zip(range(steps), draws(labels, size, seed)):
        F.cross_entropy(model(take(i)), labels[i]).backward()
        optimizer.step(min(1, (step + 1) / 10) * (1 - step / steps))
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model, inputs, labels) -> float:
    "Share of right answers."
    return round((model(inputs).argmax(dim=-1) == labels).float().mean().item(), 4)


def tasks(tokenizer) -> dict:
    "Name -> rows and labels; the last HELD are held out, and none of them is among those before."
    n, found = max(TUNE_STEPS), {}
    opinions, pairs = draw_opinions(n + 4 * HELD, seed=99), draw_entailments(n + 4 * HELD, seed=99)
    for name, given in (
        ("sentiment", [(o.text, int(o.sign > 0)) for o in opinions]),
        ("entailment", [(f"{p.premise} {p.hypothesis}", p.label) for p in pairs]),
    ):
        learn, seen = given[:n], {text for text, _ in given[:n]}
        held = [(text, label) for text, label in given[n:] if text not in seen][:HELD]
        assert len(held) == HELD, f"only {len(held)} of {name} are new"
        texts, labels = zip(*learn, *held)
        found[name] = in_rows(texts, tokenizer), torch.tensor(labels)
    return found


def measure_reading(seeds=SEEDS) -> dict:
    "Accuracy by task, reader and number of labels: a list of one for each seed."
    texts, tokenizer = make_corpus()
    rows, given, unseen = in_rows(texts, tokenizer), tasks(tokenizer), unseen_sentences(texts)
    found, surprises = {}, {"encoder": [], "decoder": []}
    pad = tokenizer.special_tokens["<pad>"]
    for seed in seeds:
        bodies = {}
        for masked, name in ((True, "encoder"), (False, "decoder")):
            bodies[masked], looks = pretrain(masked, rows, tokenizer, seed, unseen)
            surprises[name].append(looks)
            print(seed, name, "surprise after", dict(zip(LOOKS, looks)), flush=True)
        if seed == 0:
            for masked, body in bodies.items():
                save_model(body, FILE.parent / SHIPPED[masked], torch.bfloat16)
        readers = {"encoder": (bodies[True], "mean"), "decoder": (bodies[False], "last")}
        for task, (inputs, wanted) in given.items():
            for name, (body, pool) in readers.items():
                for n, steps in TUNE_STEPS.items():
                    copy = Encoder(body.config, pad) if isinstance(body, Encoder) else GPT(body.config)
                    copy.load_state_dict(body.state_dict())
                    set_seed(seed)
                    model = Classifier(copy, int(wanted.max()) + 1, pool, pad)
                    fit(model, inputs[:n], wanted[:n], steps, seed)
                    got = accuracy(model, inputs[-HELD:], wanted[-HELD:])
                    found.setdefault(task, {}).setdefault(name, {}).setdefault(str(n), []).append(got)
                print(seed, task, f"{name:24}", {n: v[-1] for n, v in found[task][name].items()}, flush=True)
    return {"tasks": found, "surprise": surprises, "looks": LOOKS, "read_steps": READ_STEPS,
            "tune_steps": TUNE_STEPS, "parameters": count_params(bodies[True])}


class Bag(nn.Module):
    "The mean of the words, in no order, and one layer."

    def __init__(self, vocab_size: int, n_classes: int, d_model: int, pad_id: int):
        super().__init__()
        self.embed, self.pad_id = nn.EmbeddingBag(vocab_size, d_model, padding_idx=pad_id), pad_id
        self.head = nn.Linear(d_model, n_classes)

    def forward(self, tokens):
        return self.head(self.embed(tokens.flatten(1)))


def ids_of(tree, tokenizer):
    "A tree of words as a tree of token ids."
    if isinstance(tree, str):
        inside = tokenizer.encode(tree if tree in ".," else " " + tree)[0]  # with the space before it
        return tokenizer.encode(tree)[0] if inside == tokenizer.special_tokens["<unk>"] else inside
    return tuple(ids_of(part, tokenizer) for part in tree)


def measure_trees(seeds=SEEDS, n: int = 600, steps: int = 300) -> dict:
    "Learn opinions of all kinds; accuracy on others with one dish, and on those with two."
    learn, one, two = draw_opinions(n, 1), draw_opinions(400, 2, False), draw_opinions(400, 2, True)
    seen = {o.text for o in learn}
    parts = [learn, *([o for o in held if o.text not in seen] for held in (one, two))]
    _, tokenizer = make_corpus()
    pad, C, V = tokenizer.special_tokens["<pad>"], 32, tokenizer.vocab_size
    wanted = [torch.tensor([int(o.sign > 0) for o in part]) for part in parts]
    rows = [in_rows([o.text for o in part], tokenizer) for part in parts]
    trees = [[ids_of(o.tree, tokenizer) for o in part] for part in parts]
    kinds = {"recursive (true trees)": (lambda: TreeModel(V, 2, C), trees),
             "recurrent": (lambda: nn.Sequential(RowReader(V, C, pad), nn.Linear(C, 2)), rows),
             "bag of words": (lambda: Bag(V, 2, C, pad), rows)}  # fmt: skip
    found = {}
    for name, (make, (learn, near, far)) in kinds.items():
        for seed in seeds:
            set_seed(seed)
            model = fit(make(), learn, wanted[0], steps, seed)
            got = [accuracy(model, x, y) for x, y in ((near, wanted[1]), (far, wanted[2]))]
            found.setdefault(name, []).append(got)
        print(f"{name:24} one dish, two dishes: {found[name]}", flush=True)
    return found


def measure_books(seeds=SEEDS, n: int = 3000, steps: int = 600) -> dict:
    "Accuracy on guest books of those sizes that were learned, and on longer ones."
    _, tokenizer = make_corpus()
    pad, C, V = tokenizer.special_tokens["<pad>"], 32, tokenizer.vocab_size
    parts = [draw_guest_books(n, 1), draw_guest_books(300, 2), draw_guest_books(300, 3, (9,))]
    wanted = [torch.tensor([int(b.sign > 0) for b in part]) for part in parts]
    flat = [in_rows([" ".join(b.opinions) for b in part], tokenizer) for part in parts]
    deep = []
    for part in parts:
        sentences = in_rows([o for b in part for o in b.opinions], tokenizer)
        of = iter(sentences)
        books = [torch.stack([next(of) for _ in b.opinions]) for b in part]
        deep.append(nn.utils.rnn.pad_sequence(books, batch_first=True, padding_value=pad))
    kinds = {"words, sentences, document": (lambda: DocumentModel(V, 2, C, pad), deep),
             "words in one row": (lambda: nn.Sequential(RowReader(V, C, pad), nn.Linear(C, 2)), flat),
             "bag of words": (lambda: Bag(V, 2, C, pad), flat)}  # fmt: skip
    found = {}
    for name, (make, (learn, near, far)) in kinds.items():
        for seed in seeds:
            set_seed(seed)
            model = fit(make(), learn, wanted[0], steps, seed)
            found.setdefault(name, []).append([accuracy(model, x, y) for x, y in ((near, wanted[1]), (far, wanted[2]))])
        print(f"{name:28} three or five, nine: {found[name]}", flush=True)
    return found


def advantage(tasks: dict) -> float:
    "The encoder's mean accuracy less the decoder's."
    mean = lambda rows: sum(map(sum, rows.values())) / sum(map(len, rows.values()))
    best = [mean(readers["encoder"]) - mean(readers["decoder"]) for readers in tasks.values()]
    return sum(best) / max(1, len(best))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--parts", nargs="+", default=["reading", "trees", "books"])
    args = parser.parse_args()
    if args.measure:
        found = json.loads(args.file.read_text(encoding="utf-8")) if args.file.is_file() else {}
        found |= {"held_out": HELD, "seeds": list(args.seeds)}
        if "reading" in args.parts:
            found |= measure_reading(args.seeds)
        if "trees" in args.parts:
            found["trees"] = measure_trees(args.seeds)
        if "books" in args.parts:
            found["books"] = measure_books(args.seeds)
        with atomic_write(args.file, "w") as file:
            file.write(json.dumps(found, indent=1) + "\n")
    else:
        found, again = json.loads(FILE.read_text(encoding="utf-8")), measure_trees(seeds=(0,))
        for name, rows in again.items():
            print(f"{name}: recorded {found['trees'][name][0]}, now {rows[0]}")
    print(json.dumps({"name": "encoder", "value": round(advantage(found.get("tasks", {})), 4), "unit": "accuracy", "bar": 0}))


if __name__ == "__main__":
    main()
