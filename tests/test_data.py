"What lesson 23 and its engine rooms can't hold: kills, big files, foreign files, the network, and many random inputs."
import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.data import files, shards as data
from llm_course.data.batches import DocumentBatches, RandomWindows, held_out, one_pass
from llm_course.data.files import read_texts
from llm_course.data.shards import Shards, memory_shards, write_shards
from llm_course.tokens.bpe import BPETokenizer
from llm_course.tokens.text import ByteTokenizer, CharTokenizer, WordTokenizer


class Numbers:
    "A tokenizer of texts such as '3 1 4'; its ids are the numbers."
    def __init__(self, vocab_size=100):
        self.vocab_size, self.end_id = vocab_size, 0

    def encode(self, text):
        return [int(word) for word in text.split()]


def documents(*lengths):
    "Documents of numbers that differ from each other and from `end_id`."
    numbers = iter(range(1, 10**6))
    return [" ".join(str(next(numbers)) for _ in range(n)) for n in lengths]


CORPORA = st.lists(st.integers(1, 12), min_size=1, max_size=12)


# --- Files of tokens ----------------------------------------------------------------------------

@given(lengths=CORPORA, shard_tokens=st.integers(1, 30), wide=st.booleans())
@settings(max_examples=30, deadline=None)
def test_shards_hold_what_was_written(tmp_path_factory, lengths, shard_tokens, wide):
    tokenizer = Numbers(70_000 if wide else 200)
    folder = tmp_path_factory.mktemp("shards") / "new"
    texts = documents(*lengths)
    shards = write_shards(texts, tokenizer, folder, shard_tokens=shard_tokens)
    read = [a[i + 1:j].tolist() for a in Shards(folder, check=True).arrays
            for edges in [data.document_boundaries(a, 0)] for i, j in zip(edges, edges[1:])]
    assert read == [tokenizer.encode(text) for text in texts]
    assert shards.header["documents"] == len(texts)
    assert all(a.dtype.itemsize == (4 if wide else 2) for a in shards.arrays)
    assert all(a[0] == a[-1] == 0 for a in shards.arrays)


WRITER = """
import os, sys
from pathlib import Path
from llm_course.data.shards import write_shards
class Numbers:
    end_id, vocab_size = 0, 100
    encode = staticmethod(lambda text: [int(word) for word in text.split()])
def texts():
    for n in range(10**9):
        if n == 200_000:
            print("going", flush=True)
        yield "1 2 3 4 5 6 7 8 9"
write_shards(texts(), Numbers(), Path(sys.argv[1]) / "shards", shard_tokens=1000)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_writer_leaves_no_folder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"going\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "shards").exists()
    with pytest.raises(FileNotFoundError, match="no folder of shards"):
        Shards(tmp_path / "shards")
    write_shards(documents(3), Numbers(), tmp_path / "shards")
    assert Shards(tmp_path / "shards").n_tokens == 5


def test_ctrl_c_leaves_nothing(tmp_path):
    def texts():
        yield from documents(5, 5)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_shards(texts(), Numbers(), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_spares_other_folders(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds other things"):
            write_shards(documents(3), Numbers(), tmp_path, overwrite=overwrite)
    old = write_shards(documents(3), Numbers(), tmp_path / "shards")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_shards(documents(4), Numbers(), tmp_path / "shards")
    assert Shards(tmp_path / "shards").n_tokens == old.n_tokens == 5
    with pytest.raises(ValueError, match="no text"):
        write_shards([], Numbers(), tmp_path / "shards", overwrite=True)
    assert Shards(tmp_path / "shards").n_tokens == 5
    assert write_shards(documents(9), Numbers(), tmp_path / "shards", overwrite=True).n_tokens == 11
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards", "thesis.txt"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    assert write_shards(documents(3), Numbers(), tmp_path / "empty").n_tokens == 5


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b'{"format": "something else"}', b"\xff\xfe"])
def test_a_foreign_header_is_named(tmp_path, header):
    (tmp_path / "shards.json").write_bytes(header)
    with pytest.raises(ValueError, match="not written by write_shards"):
        Shards(tmp_path)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    write_shards(documents(3, 3), Numbers(), tmp_path / "shards")
    path = tmp_path / "shards" / "00000.bin"
    content = path.read_bytes()
    for damage in (b"", content[:-1], content + b"\0\0"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="00000.bin has"):
            Shards(tmp_path / "shards")
    path.write_bytes(content[:-2] + b"\1\0")
    Shards(tmp_path / "shards")
    with pytest.raises(ValueError, match="checksum"):
        Shards(tmp_path / "shards", check=True)
    path.unlink()
    with pytest.raises(ValueError, match="00000.bin has 0 bytes"):
        Shards(tmp_path / "shards")


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    for text in ("5 100", "-1"):
        with pytest.raises(ValueError, match="vocab_size allows only 0 to 99"):
            write_shards([text], Numbers(), tmp_path / "shards")


TEXT = ("The miller's daughter, 42, said: “Où est le chat?”\n\n  indented\tline  \r\n"
        "12345 67 --- ...!!\n漢字かな交じり文。 \U0001f600 end\n") * 40


@pytest.mark.parametrize("size", [500, 777, 1500])
@pytest.mark.parametrize("kind", ["gpt2", "gpt4", "char", "word", "byte"])
def test_long_documents_get_the_same_ids_in_pieces(kind, size):
    tokenizer = {"char": lambda: CharTokenizer.train([TEXT]), "byte": ByteTokenizer,
                 "word": lambda: WordTokenizer.train([TEXT])}.get(
        kind, lambda: BPETokenizer.train([TEXT], 300, pattern=kind))()
    pieces = list(data._encode_all([TEXT], tokenizer, size=size))
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [i for ids, _ in pieces for i in ids] == tokenizer.encode(TEXT)


def test_encode_batch_is_preferred(tmp_path):
    class Fast(Numbers):
        calls = 0

        def encode_batch(self, texts):
            Fast.calls += 1
            return [self.encode(text) for text in texts]

    texts = documents(3, 4, 5)
    fast = write_shards(texts, Fast(), tmp_path / "fast")
    assert Fast.calls == 1
    assert fast.arrays[0].tolist() == memory_shards(texts, Numbers()).arrays[0].tolist()


# --- Batches ------------------------------------------------------------------------------------

def questions(batches):
    "The (token, target) pairs that count, sorted."
    return sorted((x, y) for tokens, targets, mask in batches
                  for x, y in zip(tokens[mask].tolist(), targets[mask].tolist()))


def pairs(shards):
    "All pairs of neighbours."
    return sorted((x, y) for a in shards.arrays for x, y in zip(a.tolist(), a.tolist()[1:]))


@given(lengths=CORPORA, shard_tokens=st.integers(1, 40), T=st.integers(1, 20), B=st.integers(1, 4),
       pack=st.booleans(), shuffle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_pass_asks_every_question_once(tmp_path_factory, lengths, shard_tokens, T, B, pack, shuffle):
    folder = tmp_path_factory.mktemp("pass") / "new"
    shards = write_shards(documents(*lengths), Numbers(200), folder, shard_tokens)
    batches = DocumentBatches(shards, B, T, seed=1, pack=pack, shuffle=shuffle)
    for epoch in (0, 1):
        found = list(one_pass(batches, epoch))
        assert all(x.shape == y.shape == m.shape == (B, T) for x, y, m in found)
        assert questions(found) == pairs(shards)
        for tokens, targets, mask in found:
            assert (mask[:, :-1] >= mask[:, 1:]).all()  # padding comes last
            assert (tokens[~mask] == 0).all() and (targets[~mask] == 0).all()
            inner = mask[:, 1:] & (tokens[:, 1:] != 0)  # inside a document, targets are next tokens
            starts = torch.cat([mask[:, :1], tokens[:, 1:] == 0], dim=1)
            if T >= max(lengths) + 1:
                assert (targets[:, :-1] == tokens[:, 1:])[inner].all()
                assert (tokens[:, 0][mask[:, 0]] == 0).all() and starts.any()


@given(lengths=CORPORA, T=st.integers(1, 12), stop=st.integers(0, 9), pack=st.booleans())
@settings(max_examples=40, deadline=None)
def test_resuming_is_bit_identical(lengths, T, stop, pack):
    shards = memory_shards(documents(*lengths), Numbers(200))
    makers = [lambda: DocumentBatches(shards, 2, T, seed=4, pack=pack)]
    if shards.n_tokens > T:
        makers.append(lambda: RandomWindows(shards, 2, T, seed=4))
    for make in makers:
        whole = make()
        for _ in range(stop):
            next(whole)
        state = json.loads(json.dumps(whole.state_dict()))
        resumed = make()
        resumed.load_state_dict(state)
        for _ in range(8):
            for a, b in zip(next(whole), next(resumed)):
                assert a is b is None or a.equal(b)
        assert whole.state_dict() == resumed.state_dict()


def test_a_state_survives_torch_save(tmp_path):
    windows = RandomWindows(memory_shards(documents(50), Numbers()), 2, 8)
    next(windows)
    torch.save(windows.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == windows.state_dict()


def test_a_state_of_other_batches_is_refused():
    shards = memory_shards(documents(20, 20), Numbers())
    state = RandomWindows(shards, 2, 8).state_dict()
    for other in (RandomWindows(shards, 3, 8), RandomWindows(shards, 2, 8, seed=1),
                  RandomWindows(memory_shards(documents(9, 9), Numbers()), 2, 8),
                  DocumentBatches(shards, 2, 8)):
        with pytest.raises(ValueError, match="belongs to other batches"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="step was None"):
        RandomWindows(shards, 2, 8).load_state_dict({k: v for k, v in state.items() if k != "step"})


def test_windows_are_uniform_over_all_files(tmp_path):
    shards = write_shards(documents(9, 5, 2, 14), Numbers(), tmp_path / "s", shard_tokens=1)
    T = 4
    windows = RandomWindows(shards, 1000, T, seed=2)
    firsts = torch.cat([next(windows)[1][:, 0] for _ in range(20)])  # a window's first target
    expected = np.concatenate([a[1:len(a) - T + 1] for a in shards.arrays if len(a) > T])
    counts = np.array([(firsts == int(i)).sum() for i in expected])
    assert counts.sum() == 20_000
    chi2 = ((counts - 20_000 / len(expected)) ** 2 / (20_000 / len(expected))).sum()
    assert chi2 < len(expected) + 5 * np.sqrt(2 * len(expected))


def test_seeds_and_passes_differ():
    shards = memory_shards(documents(*[5] * 50), Numbers(500))
    first = {seed: next(DocumentBatches(shards, 4, 16, seed=seed))[0].tolist() for seed in range(5)}
    assert len({str(v) for v in first.values()}) == 5
    batches = DocumentBatches(shards, 4, 16)
    assert next(one_pass(batches, 0))[0].tolist() != next(one_pass(batches, 1))[0].tolist()


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(20, 200, size=3000)
    row = np.concatenate([[0], *[[1] * n + [0] for n in lengths]]).astype("<u2")
    shards = Shards(None, {"end_id": 0, "vocab_size": 2}, [row])
    masks = [mask for _, _, mask in one_pass(DocumentBatches(shards, 8, 256))]
    assert torch.stack(masks).float().mean() > 0.95


@given(lengths=CORPORA, shard_tokens=st.integers(1, 40), fraction=st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_a_split_shares_out_every_question(tmp_path_factory, lengths, shard_tokens, fraction):
    folder = tmp_path_factory.mktemp("split") / "new"
    shards = write_shards(documents(*lengths), Numbers(200), folder, shard_tokens)
    try:
        train, valid = shards.split(fraction)
    except ValueError as error:
        assert "too few" in str(error)
        return
    assert sorted(pairs(train) + pairs(valid)) == pairs(shards)
    assert valid.arrays[-1][-1] == 0 and train.arrays[0][0] == 0
    assert abs(valid.n_tokens / shards.n_tokens - fraction) < 0.1 * fraction + 4 / shards.n_tokens


def test_held_out_depends_on_the_text_alone():
    texts = [f"text {i}" for i in range(5000)]
    for fraction in (0.05, 0.5):
        share = np.mean([held_out(text, fraction) for text in texts])
        assert abs(share - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / len(texts))
    assert all(held_out(text, 0.5) for text in texts if held_out(text, 0.05))


# --- Reading texts ------------------------------------------------------------------------------

def test_one_file_is_one_document_kept_exactly(tmp_path):
    text = "\n  First line\n\nlast line without an end  "
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert list(read_texts(tmp_path / "a.txt")) == [text]
    (tmp_path / "a.txt").write_bytes("\ufeffwindows\r\nlines\r\n".encode())
    assert list(read_texts(str(tmp_path / "a.txt"))) == ["windows\nlines\n"]


def test_separators_part_documents(tmp_path):
    (tmp_path / "a.md").write_text("<|endoftext|>\none\n\n<|endoftext|> \n\n<|endoftext|>\n"
                                   "two <|endoftext|> inline\n<|endoftext|>\n", encoding="utf-8")
    assert list(read_texts(tmp_path / "a.md")) == ["one\n", "two <|endoftext|> inline"]


def test_a_long_file_is_cut_after_a_line(tmp_path):
    text = "a line of text\n" * 100 + "x" * 500
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with open(tmp_path / "a.txt", encoding="utf-8") as file:
        parts = list(files._text_documents(file, longest=200))
    assert "".join(parts) == text and len(parts) > 5
    assert all(len(part) < 400 for part in parts) and parts[0].endswith("\n")


def test_folders_are_read_in_order_and_below(tmp_path):
    for name in ("b/2.txt", "b/1.TXT", "a.txt", ".hidden/x.txt", ".x.txt", "code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert list(read_texts(tmp_path)) == ["a.txt", "b/1.TXT", "b/2.txt", "code.py"]
    (tmp_path / "b" / "empty.jsonl").touch()
    assert len(list(read_texts(tmp_path))) == 4


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "is empty"),
    ("a.jsonl", b"\n\n", "is empty"),
    ("a.csv", b"text\n", "is empty"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"', r"a\.jsonl, line 2: this is no JSON"),
    ("a.jsonl", b'["a"]\n', "expected an object"),
    ("a.jsonl", b'{"story": "a", "id": 1}\n', "no column 'text'; there are 'story', 'id'"),
    ("a.jsonl", b'{"text": 3}\n', "holds int, not text"),
    ("a.csv", b"id,story\n1,a\n", "no column 'text'; there are 'id', 'story'"),
    ("a.csv", b'id,text\n1,"open\n', r"a\.csv, line \d: not valid CSV"),
    ("a.parquet", b"PAR1 not really", "not a parquet file"),
    ("a.parquet", b"", "not a parquet file"),
    ("a.txt", "caf\u00e9".encode("latin-1"), r"byte 3 .*cp1252"),
    ("a.txt", b"ok " * 500_000 + b"\xff", "byte 1,500,000 "),
    ("a.txt", ("x" * (2**20 - 1) + "\u00e9").encode()[:-1], "byte 1,048,575 "),
    ("a.csv", b"text\ncaf\xe9\n", "byte 8 "),
    ("a.docx", b"text", r"1 \.docx.* ends in \.txt"),
    ("a.csv", b'text\n"one\ntwo"\n"th"ree\n', r"a\.csv, line 4: not valid CSV"),
    ("a.csv", b'id,text\n1,"a\nb"\n2,"open\n\n\n', r"a\.csv, line 4: not valid CSV"),
    ("a.jsonl", b'[\n{"text": "a"},\n{"text": "b"}\n]', r"line 1: .*one array: JSON lines hold one object a line"),
    ("a.jsonl", b'[{"text": "a"}, {"text": "b"}]', r"an array: write one object a line"),
    ("a.jsonl", b'{\n"text": "a"\n}', r"line 1: .*an object over several lines\?"),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"a\.jsonl, line 1: this JSON is nested too deep"),
    ("a.txt.gz", gzip.compress(b"a" * 9999, mtime=0)[:-9], r"a\.txt\.gz can't be unpacked"),
    ("a.txt.gz", b"plain text", r"a\.txt\.gz can't be unpacked"),
    ("a.jsonl.xz", b"plain text", r"a\.jsonl\.xz can't be unpacked"),
    ("a.txt.zst", b"plain text", r"a\.txt\.zst can't be unpacked"),
    ("a.txt.bz2", b"plain text", r"a\.txt\.bz2 can't be unpacked"),
])
def test_what_is_wrong_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / name))


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
           ".zst": lambda data: pytest.importorskip("pyarrow").compress(data, "zstd", asbytes=True)}


@pytest.mark.parametrize("ending", PACKERS)
def test_packed_files_are_read(tmp_path, ending):
    text, rows = "caf\u00e9\n" * 3, '{"text": "one"}\n{"text": "two"}\n'
    for name, content in {"a.rst": text, "b": text, "c.jsonl": rows}.items():
        (tmp_path / f"{name}{ending}").write_bytes(PACKERS[ending](content.encode()))
    assert list(read_texts(tmp_path)) == [text, text, "one", "two"]
    assert [row for _, row in files.read_json_lines(tmp_path / f"c.jsonl{ending}")][1] == {"text": "two"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name, content", [("a.txt", "text"), ("a.csv", "id,text\n1,text"), ("a.html", "<p>text"),
                                           ("a.jsonl", '{"text": "text"}')])
def test_an_encoding_is_known_by_its_mark(tmp_path, encoding, name, content):
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert list(read_texts(tmp_path / name)) == ["text"]


def test_what_a_folder_holds_is_said_by_ending_and_count(tmp_path):
    for name in ("a.txt", "b.TXT", "c.rst.gz", "d.png", "e.png", "Makefile", "run.v2.tar.gz", ".hidden.png"):
        (tmp_path / name).touch()
    found = files.find_texts(tmp_path)
    assert str(found).startswith("3 files (2 .txt, 1 .rst.gz); left out: 2 .png, ")
    assert found.left_out == {".png": 2, "without ending": 1, ".tar.gz": 1}
    for n in range(15):
        (tmp_path / f"x.odd{n}").touch()
    assert str(files.find_texts(tmp_path)).endswith(", 6 of 6 other kinds")


def test_a_few_tables_without_the_column_are_left_out_of_a_folder_and_counted(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 100, encoding="utf-8")
    (tmp_path / "sizes.csv").write_text("name,size\ncat,3\n", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"body": "a row"}\n', encoding="utf-8")
    assert len(list(read_texts(tmp_path))) == 1
    assert "1 files (1 .txt); left out: 2 tables without a column 'text'" in str(files.find_texts(tmp_path, "text"))
    assert len(list(read_texts(tmp_path, column="body"))) == 2
    (tmp_path / "rows.jsonl").write_text('{"body": "a row"}\n' * 100, encoding="utf-8")  # much of it: somebody erred
    with pytest.raises(ValueError, match="no column 'text'; there are 'body'"):
        list(read_texts(tmp_path))
    with pytest.raises(ValueError, match="no column 'text'; there are 'name'"):
        list(read_texts(tmp_path / "sizes.csv"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_name_that_is_no_utf8_is_read(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w", encoding="utf-8") as file:
        file.write("text")
    assert list(read_texts(tmp_path)) == ["text"]


def test_what_the_course_wrote_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    write_shards(documents(3), Numbers(), tmp_path / "shards")
    run = tmp_path / "deep" / "run"
    run.mkdir(parents=True)
    (run / "samples.txt").write_text("not a text", encoding="utf-8")
    (run / "config.json").write_text('{"settings": {}}', encoding="utf-8")
    assert list(read_texts(tmp_path)) == ["text"]
    assert files.find_texts(tmp_path).left_out == {"run folders": 2}
    for folder in (run, tmp_path / "shards"):
        with pytest.raises(ValueError, match="written by the course itself"):
            read_texts(folder)
    (run / "config.json").write_text('{"hidden_size": 8}', encoding="utf-8")  # somebody else's
    assert len(list(read_texts(tmp_path))) == 2


def test_of_a_web_page_what_is_seen_is_read(tmp_path):
    page = "<html><head><title>T</title><script>if (a < b) x()</script></head><body><h1>One &amp; two</h1>" \
           "<p>A <b>bold</b> word<br>and more</p><pre>  x = 1\n  y</pre><svg><text>no</text></svg><p>unclosed"
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    assert list(read_texts(tmp_path)) == ["T\n\nOne & two\n\nA bold word\nand more\n\n  x = 1\n  y\n\nunclosed"]


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"\0" * 64])
def test_a_damaged_table_is_named(tmp_path, damage):
    import pandas as pd
    path = tmp_path / "a.parquet"
    pd.DataFrame({"text": ["story %d" % n for n in range(2000)]}).to_parquet(path, compression=None)
    content = path.read_bytes()
    path.write_bytes(content[:200] + damage * 20 + content[200 + len(damage) * 20:] if damage else content[:-9])
    try:
        list(read_texts(path))  # may be read where nothing checks its bytes
    except ValueError as error:
        assert str(path) in str(error)


def test_a_folder_without_texts_is_refused(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(ValueError, match="nothing to read"):
        read_texts(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.txt", "a/b/c", "my story.txt", "data\\x", "data/x.jsonl",
                                  "Once upon a time " * 1000, "a\0b"])
def test_what_is_no_file_and_no_dataset_is_refused(name):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_texts(name)


def test_long_csv_fields_and_columns(tmp_path):
    import csv
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("id,story\n1," + "long " * 50_000 + "\n", encoding="utf-8")
    assert len(next(read_texts(tmp_path / "a.csv", column="story"))) == 250_000
    assert len(list(read_texts(tmp_path / "a.csv", column="story"))) == 1
    assert csv.field_size_limit() == limit


def test_parquet_columns_and_nulls(tmp_path):
    import pandas as pd
    frame = pd.DataFrame({"story": ["a", None, "b"] * 300, "id": range(900)})
    frame.to_parquet(tmp_path / "a.parquet")
    assert len(list(read_texts(tmp_path / "a.parquet", column="story"))) == 600
    with pytest.raises(ValueError, match="there are 'story', 'id'"):
        list(read_texts(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="holds int"):
        list(read_texts(tmp_path / "a.parquet", column="id"))


def test_big_files_need_little_memory(tmp_path):
    line = "all work and no play makes a dull story " * 2 + "\n"
    with open(tmp_path / "big.txt", "w", encoding="utf-8") as file:
        for _ in range(25):
            file.write(line * (1_000_000 // len(line)))
    class Cheap:
        end_id, vocab_size = 0, 300
        encode = staticmethod(lambda text: list(text.encode()))
    tracemalloc.start()
    shards = write_shards(read_texts(tmp_path / "big.txt"), Cheap(), tmp_path / "shards", 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shards.n_tokens > 24_000_000
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"


# --- Datasets by name ---------------------------------------------------------------------------

def fake_datasets(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_a_dataset_is_streamed(monkeypatch):
    asked = []
    def load(*arguments, **options):
        asked.append((arguments, options))
        return ({"story": f"number {i}", "id": i} for i in range(10**9))
    fake_datasets(monkeypatch, load)
    monkeypatch.setattr(files, "is_online", lambda: True)
    texts = read_texts("owner/name:small", column="story", split="validation", limit=2)
    assert list(texts) == ["number 0", "number 1"]
    assert asked == [(("owner/name", "small"), {"split": "validation", "streaming": True})]
    with pytest.raises(ValueError, match="row 0: no column 'text'; there are 'story', 'id'"):
        next(read_texts("owner/name"))


def test_a_name_that_is_nothing_is_an_error_and_no_story(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "is_online", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", None)  # not even imported
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-book").mkdir()
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"can't be reached \(no network\)\. Did you mean my-book\?"):
        read_texts("my-bok")
    with pytest.raises(FileNotFoundError, match="Did you mean world"):
        read_texts("wolrd")
    assert time.monotonic() - start < 3


def test_a_lost_connection_is_an_error_and_no_story(monkeypatch):
    def load(*arguments, **options):
        raise ConnectionError("reset by peer\nand more")
    fake_datasets(monkeypatch, load)
    monkeypatch.setattr(files, "is_online", lambda: True)
    with pytest.raises(FileNotFoundError, match=r"\(reset by peer\)"):
        read_texts("owner/name")


@pytest.mark.parametrize("error", [FileNotFoundError("no such dataset"), ValueError("Unknown split")])
def test_a_wrong_name_is_an_error_not_a_story(monkeypatch, error):
    def load(*arguments, **options):
        raise error
    fake_datasets(monkeypatch, load)
    monkeypatch.setattr(files, "is_online", lambda: True)
    with pytest.raises(ValueError, match=f"'owner/nmae' can't be opened: {error}"):
        read_texts("owner/nmae")


def test_an_empty_dataset_is_an_error(monkeypatch):
    fake_datasets(monkeypatch, lambda *arguments, **options: iter([]))
    monkeypatch.setattr(files, "is_online", lambda: True)
    with pytest.raises(ValueError, match="is empty"):
        list(read_texts("owner/name"))
