"""Near copies: the course's MinHash and bands beside datasketch's MinHashLSH, and how both grow.

    python benchmarks/dedup.py [--documents 20000] [--growth]

The documents are pages of the invented crawl, a third of them copies. Both sides get the same texts, groups of five
words, 120 hashes in 20 bands of 6, and one thread; each runs in a process of its own. Ours looks at the real
similarity of every candidate as well; datasketch stops at the candidates. Memory is the peak of the process over
what it held once the texts were read. Time is CPU-seconds of the process, so that other programs do not decide the
ratio. `value` is our documents per second over datasketch's; the bar is 5.

`--growth` repeats it for 5,000, 20,000 and 80,000 documents.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HASHES, BANDS, WORDS = 120, 20, 5


def ours(texts: list) -> dict:
    "Clusters by the course's functions."
    from llm_course.data.dedup import near_copies

    first = near_copies(texts, bands=BANDS)
    return {"copies": sum(i != j for i, j in enumerate(first))}


def datasketch(texts: list) -> dict:
    "Candidates by datasketch: query, then insert."
    from datasketch import MinHash, MinHashLSH

    index, found = MinHashLSH(num_perm=HASHES, params=(BANDS, HASHES // BANDS)), 0
    for number, text in enumerate(texts):
        words = text.lower().split()
        groups = {" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}
        sketch = MinHash(num_perm=HASHES)
        sketch.update_batch([group.encode() for group in groups])
        found += bool(index.query(sketch))
        index.insert(number, sketch)
    return {"copies": found}


def peak_megabytes(reset: bool = False) -> float:
    "The most memory that this process has held; since the last reset, on Linux."
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def child(side: str, path: str) -> None:
    "Measure one side in this process."
    import llm_course  # noqa: F401  both sides hold torch, so that memory compares
    import llm_course.data.dedup  # noqa: F401

    texts = json.loads(Path(path).read_text(encoding="utf-8"))
    work = {"ours": ours, "datasketch": datasketch}[side]
    work(texts[:50])  # imports, tables
    before = peak_megabytes(reset=True)
    start = time.process_time()
    found = work(texts)
    seconds = time.process_time() - start
    print(json.dumps(found | {"seconds": seconds, "megabytes": peak_megabytes() - before}))


def measure(side: str, path: Path) -> dict:
    "The figures of one side, from its own process."
    command = [sys.executable, __file__, "--child", side, "--texts", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(texts: list) -> dict:
    "Both sides on the same texts, one after the other."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.json"
        path.write_text(json.dumps(texts), encoding="utf-8")
        sides = {side: measure(side, path) for side in ("ours", "datasketch")}
    for side, row in sides.items():
        speed = len(texts) / row["seconds"]
        print(f"{len(texts):8,} {side:12} {row['seconds']:8.1f} {speed:10,.0f} {row['megabytes']:8.0f} "
              f"{row['copies']:8,}", flush=True)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--child")
    parser.add_argument("--texts")
    chosen = parser.parse_args()
    if chosen.child:
        return child(chosen.child, chosen.texts)
    from importlib.util import find_spec

    import llm_course  # noqa: F401
    from llm_course.world.crawl import crawl
    from llm_course.world.pages import true_text

    if not find_spec("datasketch"):
        print("datasketch is missing: pip install 'llm-course[data]'")
        sys.exit(2)
    sizes = [5_000, 20_000, 80_000] if chosen.growth else [chosen.documents]
    texts = [true_text(page) for page in crawl(max(sizes), seed=0)]
    print(f"{'documents':>8} {'side':12} {'CPU-s':>7} {'per second':>10} {'MB':>8} {'copies':>8}")
    rows = {n: compare(texts[:n]) for n in sizes}
    size = chosen.documents if chosen.documents in rows else sizes[-1]
    ratio = rows[size]["datasketch"]["seconds"] / rows[size]["ours"]["seconds"]
    memory = rows[size]["ours"]["megabytes"] / max(1, rows[size]["datasketch"]["megabytes"])
    print(json.dumps({"name": "dedup", "value": round(ratio, 2), "unit": "times datasketch's documents per second",
                      "bar": 5, "memory_ratio": round(memory, 3), "documents": size}))


if __name__ == "__main__":
    main()
