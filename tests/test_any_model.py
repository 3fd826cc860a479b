"Each command with each kind of model: it works, or says in one sentence what is possible instead."

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llm_course import cli
from llm_course.core import asset

RHYME = "".join(f"The {a} {b} the {c}.\n\n" for a in ("cat", "dog", "hen", "old king")
                for b in ("saw", "fed", "lost") for c in ("mouse", "moon", "ball", "house")) * 2
SMALL = "--steps 3 --width 16 --layers 1 --heads 1 --context 48 --batch-size 4 --device cpu".split()
KINDS = ("gpt", "ngram", "lstm", "moe", "folder", "gguf", "file", "int8", "shipped")
NO_GPT = {"ngram", "lstm", "moe"}
TRAINED_HERE = {"gpt", *NO_GPT}


def call(*arguments, stdin=None):
    "Run a command inside this process: its exit code, and what it printed on one line."
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def llama(folder: Path) -> None:
    "A random Llama with a small tokenizer and a chat form of its own, as others give theirs away."
    from llm_course.model.block import LLAMA
    from llm_course.model.families import save_hf
    from llm_course.model.gpt import GPT, GPTConfig
    from llm_course.tokens.bpe import BPETokenizer
    from llm_course.tokens.hub import ChatForm, save_hub_tokenizer

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = BPETokenizer.train([RHYME], 280, special_tokens=names)
    tokenizer.chat_form = ChatForm(words={"eos_token": "<|im_end|>"})
    torch.manual_seed(0)
    save_hf(GPT(GPTConfig(tokenizer.vocab_size, 256, 32, 2, 4, 2, style=LLAMA)), folder)
    save_hub_tokenizer(tokenizer, folder, 128)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a model of each kind, a text, and some pairs."
    place = tmp_path_factory.mktemp("models")
    (place / "rhyme.txt").write_text(RHYME, encoding="utf-8")
    pairs = [{"prompt": f"Who saw {a}?", "chosen": "The cat.", "rejected": "The old king did it."}
             for a in ("it", "the moon", "me", "you")]
    (place / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8")
    for kind in ("gpt", *sorted(NO_GPT)):
        more = ["--arch", kind] if kind in NO_GPT else ["--preset", "tiny"]
        code, said = call("train", "--data", place / "rhyme.txt", "--out", place / kind, *more, *SMALL)
        assert code == 0, said
    llama(place / "folder")
    assert call("export", place / "folder", "--format", "gguf", "--out", place / "m.gguf")[0] == 0
    code, said = call("export", place / "gpt", "--format", "safetensors", "--kind", "INT8", "--out",
                      place / "int8")
    assert code == 0, said
    (place / "beside").mkdir()
    shutil.copy(place / "int8" / "model.safetensors", place / "beside" / "few.safetensors")
    shutil.copy(place / "int8" / "tokenizer.bpe", place / "beside")
    return place


def named(place, kind):
    "What one types."
    where = {"gguf": "m.gguf", "file": "beside/few.safetensors"}.get(kind, kind)
    return "shipped" if kind == "shipped" else place / where


def bytes_of(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.name: p.read_bytes() for p in files}


def expect(kind, said, code, works, *words):
    "It worked, or a sentence says what is wrong; never a traceback."
    assert "Traceback" not in said
    print(f"{kind:8} {'works' if code == 0 else 'refuses'}: {said[:400]}")
    assert (code == 0) == works, said
    if not works:
        assert all(word in said for word in words), said


@pytest.mark.parametrize("kind", KINDS)
def test_chat_and_export(place, kind):
    code, said = call("chat", named(place, kind), "--tokens", "4", "--temperature", "0", "--device",
                      "cpu", stdin="The cat\n")
    expect(kind, said, code, True)
    assert said.startswith("The cat")
    out = place / f"{kind}-out"
    code, said = call("export", named(place, kind), "--format", "safetensors", "--out", out)
    expect(kind, said, code, True)
    assert call("chat", out, "--tokens", "4", "--temperature", "0", stdin="The cat\n")[0] == 0
    code, said = call("export", named(place, kind), "--format", "gguf", "--out", f"{out}.gguf")
    expect(kind, said, code, kind not in NO_GPT, f"of the kind {kind}", "--format safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_eval(place, kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, said = call("eval", named(place, kind), "--data", place / "rhyme.txt", "--device", "cpu")
    expect(kind, said, code, True)
    assert "bits per byte" in said
    if kind in ("folder", "gguf", "file", "int8"):
        code, said = call("eval", named(place, kind))
        expect(kind, said, code, False, "nothing was held back", "--data")
        code, said = call("eval", place / "lstm", named(place, kind), "--data", place / "rhyme.txt")
        expect(kind, said, code, True)
    elif kind != "shipped":
        code, said = call("eval", named(place, kind))
        expect(kind, said, code, True)
    assert kind == "shipped" or kind in TRAINED_HERE or kind == "int8" or not any(
        "eval" in name for name in bytes_of(named(place, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_report(place, kind):
    code, said = call("report", named(place, kind), "--device", "cpu")
    expect(kind, said, code, kind in TRAINED_HERE, "eval", "--data")


@pytest.mark.parametrize("kind", KINDS)
def test_share(place, kind, tmp_path):
    code, said = call("share", named(place, kind), "--out", tmp_path / "it.html")
    expect(kind, said, code, kind not in NO_GPT, f"of the kind {kind}; share is for GPTs")
    assert (tmp_path / "it.html").exists() == (code == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_serve(place, kind):
    from llm_course.ship.engine import Engine

    served = cli._opened(None if kind == "shipped" else named(place, kind), "cpu", None)
    engine = Engine(served).start()
    pieces = list(engine.pieces(served.prompt_ids("The cat"), 3, temperature=0))
    engine.stop()
    assert pieces[-1].ended in ("stop", "length")
    assert (served.chat_ids is not None) == (kind in ("folder", "gguf", "shipped"))


@pytest.mark.parametrize("kind", KINDS)
def test_train_from_and_build_from(place, kind, tmp_path):
    name = named(place, kind)
    before = None if kind == "shipped" else bytes_of(name)
    arguments = ["--from", name, "--data", place / "rhyme.txt", "--steps", "2", "--device", "cpu"]
    code, said = call("train", *arguments, "--out", tmp_path / "run", "--context", "32")
    expect(kind, said, code, kind not in NO_GPT, f"of the kind {kind}; --from is for GPTs")
    if code == 0:
        again = call("train", "--out", tmp_path / "run")
        assert again[0] == 0 and "nothing left to do" in again[1]
        code, said = call("build", "--out", tmp_path / "run", "--device", "cpu")
        expect(kind, said, code, True)
        assert "began as" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        assert call("chat", tmp_path / "run", "--tokens", "2", stdin="The\n")[0] == 0
    assert before is None or bytes_of(name) == before


@pytest.mark.parametrize("kind", KINDS)
def test_align(place, kind, tmp_path):
    name = named(place, kind)
    before = None if kind == "shipped" else bytes_of(name)
    code, said = call("align", name, "--preferences", place / "pairs.jsonl", "--out", tmp_path / "run",
                      "--device", "cpu")
    expect(kind, said, code, kind not in NO_GPT, f"of the kind {kind}; align is for GPTs")
    if code == 0:
        assert {"sft", "policy"} <= json.loads((tmp_path / "run" / "stages.json").read_text(encoding="utf-8")).keys()
        assert call("chat", tmp_path / "run", "--tokens", "2", stdin="The\n")[0] == 0
        assert call("align", "--out", tmp_path / "run")[0] == 0
    assert before is None or bytes_of(name) == before


@pytest.mark.slow
def test_build_from_teaches_a_text_then_answers(place, tmp_path):
    "All stages on a chat model of somebody else: its tokenizer and its form stay."
    code, said = call("build", "--from", place / "folder", "--data", place / "rhyme.txt", "--preferences",
                      place / "pairs.jsonl", "--method", "grpo", "--steps", "2", "--out",
                      tmp_path / "run", "--device", "cpu")
    assert code == 0, said
    stages = json.loads((tmp_path / "run" / "stages.json").read_text(encoding="utf-8"))
    assert [*stages] == ["tokenizer", "tokens", "plan", "model", "sft", "reward", "policy", "report"]
    told = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "<|im_start|>" in told["chat_template"] and told["eos_token"] == "<|im_end|>"
    assert "What it answers" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_file_alone_and_a_hostile_one_are_refused(place, tmp_path):
    shutil.copy(place / "beside" / "few.safetensors", tmp_path)
    code, said = call("chat", tmp_path / "few.safetensors", stdin="The\n")
    expect("alone", said, code, False, "holds weights alone", "tokenizer.bpe")
    shutil.copy(place / "beside" / "tokenizer.bpe", tmp_path)
    whole = (tmp_path / "few.safetensors").read_bytes()
    for change in (lambda d: d[:200], lambda d: d[:-40], lambda d: d.replace(b'\\"n_layers\\": 1', b'\\"n_layers\\": 9')):
        (tmp_path / "bad.safetensors").write_bytes(change(whole))
        assert change(whole) != whole
        code, said = call("chat", tmp_path / "bad.safetensors", stdin="The\n")
        expect("hostile", said, code, False, "bad.safetensors")
    shutil.copy(asset("story.bpe"), tmp_path / "tokenizer.bpe")
    code, said = call("chat", tmp_path / "few.safetensors", stdin="The\n")
    expect("another's", said, code, False, "don't belong together")
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04")
    code, said = call("chat", tmp_path / "x.pt", stdin="The\n")
    expect("pickle", said, code, False, "pickle", "safetensors")
