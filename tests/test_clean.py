"""`llm-course clean`: killed and continued, on hostile input, on a cluster; and the fetcher."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest

from llm_course.data.collect import page_document
from llm_course.data.documents import read_documents
from llm_course.data.pipeline import clean_folder
from llm_course.world.crawl import crawl
from llm_course.world.pages import true_text


def write_warc(pages: list, path: Path) -> None:
    "A crawl as a crawler stores it."
    with open(path, "wb") as file:
        for page in pages:
            body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page.body
            head = (
                f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {page.url}\r\n"
                f"WARC-Date: 2025-05-01T00:00:00Z\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            file.write(gzip.compress(head.encode() + body + b"\r\n\r\n", mtime=0))


def checksums(folder: Path) -> dict:
    "Name -> checksum of all that must not differ from run to run."
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    files = [p for p in files if p.name not in ("lock", "seconds.json")]
    return {str(p.relative_to(folder)): zlib.crc32(p.read_bytes()) for p in files}


def texts_of(folder: Path) -> list:
    "The texts that were kept."
    return [d.text for d in read_documents(folder / "text")]


@pytest.fixture(scope="module")
def warc(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("crawl") / "pages.warc.gz"
    write_warc(crawl(400, seed=0), path)
    return path


@pytest.fixture(scope="module")
def undisturbed(warc) -> Path:
    folder = warc.parent / "undisturbed"
    clean_folder(warc, folder, workers=1, size=40)
    return folder


def test_killed_half_way_and_continued_gives_the_same_bytes(warc, undisturbed, tmp_path):
    code = (
        "from llm_course.data.pipeline import clean_folder\n"
        f"clean_folder({str(warc)!r}, {str(tmp_path / 'out')!r}, workers=1, size=40)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    blocks = tmp_path / "out" / "blocks"
    deadline = time.monotonic() + 120
    while len(list(blocks.glob("*.done.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    process.wait()
    done = len(list(blocks.glob("*.done.npz")))
    assert 3 <= done < 10 and not (tmp_path / "out" / "ledger.json").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in blocks.glob("*.done.npz")}
    seen = {}

    def watch(documents, share):
        seen.update({p.name: p.stat().st_mtime_ns for p in blocks.glob("*.done.npz")})

    clean_folder(warc, tmp_path / "out", workers=1, size=40, told=watch)
    assert {name: seen[name] for name in kept} == kept, "finished blocks were cleaned again"
    assert checksums(tmp_path / "out") == checksums(undisturbed)


def test_two_processes_give_the_same_bytes(warc, undisturbed, tmp_path):
    clean_folder(warc, tmp_path / "out", workers=2, size=40)
    assert checksums(tmp_path / "out") == checksums(undisturbed)


def test_what_is_kept_is_what_should_be(undisturbed):
    """Every exact copy, foreign page, spam, notice and insult is gone; stories are not."""
    pages = {page.url: page for page in crawl(400, seed=0)}
    kept = [pages[d.source] for d in read_documents(undisturbed / "text")]
    kinds = Counter(page.kind for page in kept)
    assert not any(page.change == "exact" and kept.count(page) > 1 for page in kept)
    clusters = Counter(page.cluster for page in kept if page.kind == "story")
    assert kinds["story"] >= 0.98 * len({p.cluster for p in pages.values() if p.kind == "story"})
    assert kinds["foreign"] + kinds["spam"] + kinds["notice"] + kinds["insult"] <= 2
    assert clusters.most_common(1)[0][1] <= 4  # copies that differ in every fifth word may stay
    text = "\n".join(texts_of(undisturbed))
    assert "@" not in text and "555-01" not in text and "â€" not in text


def test_nothing_is_lost_silently(undisturbed):
    ledger = json.loads((undisturbed / "ledger.json").read_text(encoding="utf-8"))
    dropped = [
        json.loads(line)
        for path in (undisturbed / "dropped").glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert ledger["kept"] + len(dropped) == ledger["documents"] == 400
    assert Counter(row["rule"] for row in dropped) == ledger["dropped"]
    assert all(row["reason"] for row in dropped)
    steps = list(ledger["rules"].values())
    for before, after in zip(steps[:-3], steps[1:-2]):
        assert before["seen"] - before["dropped"] == after["seen"]
    card = json.loads((undisturbed / "card.json").read_text(encoding="utf-8"))
    assert card["documents"] == ledger["kept"]
    assert card["language"] == {"en": ledger["kept"]}


def test_an_exam_is_kept_out(tmp_path):
    pages = crawl(300, seed=1)
    documents = [page_document(page) for page in pages]
    from llm_course.data.documents import write_documents
    from llm_course.world.story import World

    for document, page in zip(documents, pages):
        document.text, document.body, document.consent = true_text(page), None, ""
    write_documents(documents, tmp_path / "in.jsonl")
    exam = [q.text for q in World(0).questions()]
    (tmp_path / "exam.txt").write_text("\n<|endoftext|>\n".join(exam), encoding="utf-8")
    result = clean_folder(
        tmp_path / "in.jsonl",
        tmp_path / "out",
        rules="characters",
        exam=str(tmp_path / "exam.txt"),
        workers=1,
    )
    assert result.dropped == {"exam": sum(page.kind == "quiz" for page in pages)}


def test_hostile_input_costs_what_is_broken_and_no_more(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    good = "The cat sat with the hen, and that was all there was to have of it. "
    pages = [f"<p>{good}Number {word} came to tea.</p>" for word in ("one", "two", "three", "four")]
    (source / "good.html").write_text(pages[0], encoding="utf-8")
    (source / "nul.html").write_bytes(pages[1].replace("hen", "h\0en").encode())
    (source / "utf16.html").write_bytes(pages[2].encode("utf-16"))
    (source / "latin.html").write_bytes((pages[3] + "<p>café").encode("latin-1") + b"\xff\xfe\x80")
    (source / "empty.html").write_bytes(b"")
    (source / "deep.html").write_text("<div>" * 50_000 + good, encoding="utf-8")
    write_warc(crawl(20, seed=3), source / "cut.warc.gz")
    whole = (source / "cut.warc.gz").read_bytes()
    (source / "cut.warc.gz").write_bytes(whole[: len(whole) // 2])
    (source / "corrupt.warc.gz").write_bytes(whole[:400] + b"\0" * 90 + whole[490:])
    (source / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": good}).encode())[:-9])
    (source / "lines.jsonl").write_bytes(
        json.dumps({"text": good}).encode() + b'\n{"text": null}\n{"story": 1}\n\xff\xfe\n{'
    )
    (source / "not.parquet").write_bytes(b"PAR1 and no more")
    os.symlink(source, source / "loop")
    os.symlink(source / "gone.html", source / "link.html")
    result = clean_folder(source, tmp_path / "out", rules="html,characters", workers=1, size=7)
    texts = texts_of(tmp_path / "out")
    for word in ("one", "two", "three", "four"):
        assert any(f"Number {word} came" in text for text in texts), word
    assert result.kept + sum(result.dropped.values()) == result.documents
    reasons = " | ".join(result.skipped)
    for part in ("cut.warc.gz", "corrupt.warc.gz", "cut.jsonl.gz", "no JSON", "not.parquet"):
        assert part in reasons, (part, reasons)


def test_parquet_without_the_column_or_with_nulls(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = arrow.table({"text": ["the cat sat", None, "a dog ran"], "url": ["a", "b", "c"]})
    parquet.write_table(rows, tmp_path / "nulls.parquet")
    parquet.write_table(arrow.table({"story": ["x"]}), tmp_path / "other.parquet")
    skipped = Counter()
    found = list(read_documents(tmp_path, skipped=skipped))
    assert [(d.text, d.source) for d in found] == [("the cat sat", "a"), ("a dog ran", "c")]
    assert any("no column 'text'; there are 'story'" in why for why in skipped)
    assert skipped["'text' is no text"] == 1


def test_a_line_of_a_gigabyte_is_passed_over_in_little_memory(tmp_path):
    """256 MB here: the limit of a line is 64 MB, and memory must stay below the line's length."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "long.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(256):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "after"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    skipped = Counter()
    texts = [d.text for d in read_documents(path, skipped=skipped)]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert texts == ["before", "after"] and skipped.total() == 1
    assert grown < 200_000, f"{grown} KB"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_says_so_and_keeps_what_is_done(warc, undisturbed, tmp_path, monkeypatch):
    import llm_course.data.pipeline as pipeline

    write, calls = pipeline.write_documents, []

    def full(documents, path):
        calls.append(path)
        if len(calls) == 5:
            with open("/dev/full", "wb") as file:
                file.write(b"x")
        return write(documents, path)

    monkeypatch.setattr(pipeline, "write_documents", full)
    with pytest.raises(OSError, match="No space left"):
        clean_folder(warc, tmp_path / "out", workers=1, size=40)
    assert len(list((tmp_path / "out" / "blocks").glob("*.done.npz"))) == 4
    monkeypatch.setattr(pipeline, "write_documents", write)
    clean_folder(warc, tmp_path / "out", workers=1, size=40)
    assert checksums(tmp_path / "out") == checksums(undisturbed)


@pytest.mark.slow
def test_on_a_cluster_whose_worker_is_killed(warc, undisturbed, tmp_path):
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    )
    with cluster:
        killed = []

        def kill_one(documents, share):
            if documents >= 200 and not killed:
                killed.append(cluster.workers[0].pid)
                os.kill(killed[0], signal.SIGKILL)

        clean_folder(
            warc, tmp_path / "out", scheduler=cluster.scheduler_address, size=40, told=kill_one
        )
    assert killed
    assert checksums(tmp_path / "out") == checksums(undisturbed)
