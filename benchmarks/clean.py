"""Cleaning: MB of HTML per second with one and two processes, rule by rule, beside trafilatura alone and Dask.

    python benchmarks/clean.py [--data FOLDER] [--megabytes 10]

The pages are Debian's kernel documentation where it is installed (`apt-get install -y linux-doc-6.1`), else the
invented crawl; --data names another folder of pages. Only so many megabytes are read, every n-th page. Each way
writes the same folder, and the script compares their texts. trafilatura only takes the text out; ours does that and
all the rules. `value` is the speed of two processes over that of one; the bar is 1.6 on two cores or more.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

DOCS = "/usr/share/doc/linux-doc-6.1/html"


def pick_pages(source: str | None, megabytes: float, folder: Path) -> tuple[str, float]:
    "Link or write so many megabytes of pages into a folder; what they are, and how many MB."
    folder.mkdir()
    if source or Path(DOCS).is_dir():
        pages = sorted(p for p in Path(source or DOCS).rglob("*.html") if p.is_file())
        total = sum(p.stat().st_size for p in pages) / 1e6
        step = max(1, round(total / megabytes))
        for number, page in enumerate(pages[::step]):
            (folder / f"{number:05}.html").write_bytes(page.read_bytes())
    else:
        from llm_course.world.crawl import crawl

        for number, page in enumerate(crawl(int(megabytes * 200), seed=0)):
            (folder / f"{number:05}.html").write_bytes(page.body)
    return source or (DOCS if Path(DOCS).is_dir() else "the crawl"), sum(
        p.stat().st_size for p in folder.iterdir()
    ) / 1e6


def timed(work) -> float:
    "Seconds that a function takes."
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--megabytes", type=float, default=10)
    chosen = parser.parse_args()
    import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
    from llm_course.data.pipeline import clean_folder

    with tempfile.TemporaryDirectory() as parent:
        where = Path(parent)
        name, size = pick_pages(chosen.data, chosen.megabytes, where / "pages")
        print(f"{size:.1f} MB of {name}, {len(list((where / 'pages').iterdir())):,} pages")
        print(f"{'way':24} {'seconds':>8} {'MB/s':>8}")

        def clean(out: str, **how) -> float:
            seconds = timed(lambda: clean_folder(where / "pages", where / out, size=50, **how))
            print(f"{out:24} {seconds:8.1f} {size / seconds:8.2f}", flush=True)
            return seconds

        one = clean("one process", workers=1)
        two = clean("two processes", workers=2)
        same = [(where / out / "text" / "00000.jsonl").read_bytes() for out in ("one process", "two processes")]
        assert same[0] == same[1], "one and two processes give different texts"
        if find_spec("distributed"):
            from distributed import LocalCluster

            with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
                clean("two workers of Dask", scheduler=cluster.scheduler_address)
            assert (where / "two workers of Dask" / "text" / "00000.jsonl").read_bytes() == same[0]
        if find_spec("trafilatura"):
            import trafilatura

            pages = [p.read_bytes() for p in (where / "pages").iterdir()]
            seconds = timed(lambda: [trafilatura.extract(page) for page in pages])
            print(f"{'trafilatura alone':24} {seconds:8.1f} {size / seconds:8.2f}", flush=True)
        spent = json.loads((where / "one process" / "seconds.json").read_text(encoding="utf-8"))
        ledger = json.loads((where / "one process" / "ledger.json").read_text(encoding="utf-8"))
        print(f"\n{'rule':12} {'seconds':>8} {'MB/s':>8} {'seen':>7} {'changed':>8} {'dropped':>8}")
        for rule, seconds in spent.items():
            row = ledger["rules"][rule]
            print(f"{rule:12} {seconds:8.2f} {row['before'] / 1e6 / max(seconds, 1e-9):8.1f} {row['seen']:7,} "
                  f"{row['changed']:8,} {row['dropped']:8,}")
        print(json.dumps({"name": "clean", "value": round(one / two, 2), "unit": "times one process's speed",
                          "bar": 1.6, "mb_per_second": round(size / one, 2), "cores": os.cpu_count()}))


if __name__ == "__main__":
    sys.exit(main())
