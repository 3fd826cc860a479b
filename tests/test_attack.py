"Files, names and numbers as a stranger would send them: one sentence with the file's name, and nothing foreign touched."
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from llm_course.align.chat import CHAT_TOKENS, recent_messages
from llm_course.core import folder_lock
from llm_course.data.shards import Shards
from llm_course.model.files import load_model, save_model
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.pipeline.run import Settings
from llm_course.tokens.text import CharTokenizer

posix = pytest.mark.skipif(os.name == "nt", reason="links and pipes as Unix has them")


# --- Files outside the run ----------------------------------------------------------------------

@posix
@pytest.mark.parametrize("name", ["lock", "tokens", "checkpoints", "config.json", "tokens/train"])
def test_nothing_is_written_through_a_link(name, tmp_path):
    from llm_course.pipeline.run import run_stages
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("three years", encoding="utf-8")
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(outside / "thesis.txt" if name in ("lock", "config.json") else outside)
    with pytest.raises(ValueError):
        run_stages(run, Settings("world", size=1), lambda s: {})
    assert (outside / "thesis.txt").read_text(encoding="utf-8") == "three years"
    assert [p.name for p in outside.iterdir()] == ["thesis.txt"]


def test_a_lock_that_is_somebody_elses_file_is_not_emptied(tmp_path):
    (tmp_path / "lock").write_text("combination 3-1-4", encoding="utf-8")
    with pytest.raises(ValueError, match="not the course's"):
        folder_lock(tmp_path).__enter__()
    assert (tmp_path / "lock").read_text(encoding="utf-8") == "combination 3-1-4"


# --- A chat that never ends ---------------------------------------------------------------------

def test_a_long_talk_costs_the_same_for_each_line(monkeypatch):
    tokenizer = CharTokenizer.train("ab ", ("<|endoftext|>", *CHAT_TOKENS))
    seen, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: seen.append(len(text)) or encode(text))
    cost = {}
    for n in (10, 1000):
        talk = [{"role": role, "content": "a b"} for _ in range(n) for role in ("user", "assistant")]
        seen.clear()
        kept = recent_messages(tokenizer, [*talk, {"role": "user", "content": "b"}], 40)
        cost[n] = sum(seen)
        assert kept[0]["role"] == "user"
    assert cost[10] == cost[1000]


# --- Interrupted anywhere ------------------------------------------------------------------------

def command(*words):
    from typer.testing import CliRunner

    from llm_course.cli import app
    words, typed = [str(word) for word in words], sys.argv
    sys.argv = ["llm-course", *words]  # what is advised before anything is written down
    try:
        result = CliRunner().invoke(app, words)
    finally:
        sys.argv = typed
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def stopped_at_each_file(monkeypatch, begin, advised, folder):
    "Press Ctrl-C the first time that each file is about to appear, and go on as advised."
    seen, replace = set(), os.replace

    def stop_once(source, target):
        name = str(Path(target).relative_to(folder)) if Path(target).is_relative_to(folder) else ""
        name = re.sub(r"(\.train|\.valid)\.\w+", r"\1", name)  # a folder that is only begun has a name by chance
        if name and name not in seen:
            seen.add(name)
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, "replace", stop_once)
    words, stops = begin, 0
    while (result := command(*words)).exit_code == 130 and stops < 60:
        words, stops = advised if (folder / "config.json").exists() else begin, stops + 1
        how = f"llm-course {advised[0]} --out" if words is advised else "llm-course "
        assert how in result.output, result.output
    monkeypatch.undo()
    assert result.exit_code == 0, result.output
    return stops


def test_a_run_that_is_stopped_at_each_of_its_files_goes_on_with_what_was_asked(tmp_path, monkeypatch):
    text, run, new = tmp_path / "book.txt", tmp_path / "run", tmp_path / "new"
    text.write_text("".join(f"The cat saw {n} mice and ate {n % 7}.\n" for n in range(400)), encoding="utf-8")
    wishes = tmp_path / "wishes.jsonl"
    wishes.write_text("".join(json.dumps({"prompt": f"How many {n}?", "chosen": "Two.", "rejected": f"I saw {n}."})
                              + "\n" for n in range(12)), encoding="utf-8")
    begin = ["train", "--data", text, "--out", run, "--preset", "tiny", "--layers", 1, "--width", 32, "--context", 64,
             "--batch-size", 8, "--steps", 20, "--device", "cpu", "--seed", 5]
    assert stopped_at_each_file(monkeypatch, begin, ["train", "--out", run], run) >= 6
    asked = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
    assert (asked["data"], asked["seed"], asked["steps"], asked["preset"]) == (str(text), 5, 20, "tiny")
    facts = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    assert facts["tokenizer"]["source"] == str(text) and facts["model"]["steps"] == 20

    begin = ["align", run, "--preferences", wishes, "--out", new, "--device", "cpu"]
    assert stopped_at_each_file(monkeypatch, begin, ["align", "--out", new], new) >= 5
    asked = json.loads((new / "config.json").read_text(encoding="utf-8"))
    assert asked["adopts"] == str(run) and asked["settings"]["teaching"]["preferences"] == str(wishes)
    assert (new / "assistant.safetensors").exists()


def test_a_build_that_is_stopped_at_each_of_its_files_goes_on_with_what_was_asked(tmp_path, monkeypatch):
    text, run = tmp_path / "book.txt", tmp_path / "run"
    text.write_text("".join(f"The cat saw {n} mice and ate {n % 7}.\n" for n in range(400)), encoding="utf-8")
    chats, wishes = tmp_path / "chats.jsonl", tmp_path / "wishes.jsonl"
    said = [[{"role": "user", "content": f"How many {n}?"}, {"role": "assistant", "content": f"{n} mice."}]
            for n in range(12)]
    chats.write_text("".join(json.dumps({"messages": m}) + "\n" for m in said), encoding="utf-8")
    wishes.write_text("".join(json.dumps({"prompt": f"How many {n}?", "chosen": "Two.", "rejected": f"I saw {n}."})
                              + "\n" for n in range(12)), encoding="utf-8")
    begin = ["build", "--data", text, "--chats", chats, "--preferences", wishes, "--method", "grpo", "--depth", 1,
             "--steps", 20, "--device", "cpu", "--out", run, "--seed", 5]
    assert stopped_at_each_file(monkeypatch, begin, ["build", "--out", run], run) >= 15
    asked = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
    assert (asked["data"], asked["seed"], asked["steps"], asked["depth"]) == (str(text), 5, 20, 1)
    assert asked["teaching"] == {"chats": str(chats), "preferences": str(wishes), "method": "grpo"}
    facts = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    assert list(facts) == ["tokenizer", "tokens", "plan", "model", "sft", "reward", "policy", "report"]
    assert facts["tokenizer"]["source"] == str(text) and facts["model"]["steps"] == 20
    assert "What it answers" in (run / "report.html").read_text(encoding="utf-8")


@posix
def test_ctrl_c_in_the_tokenizers_stage_is_heard_within_a_second_by_all_its_processes(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(300_000)]
    (tmp_path / "big.txt").write_text("\n".join(" ".join(words[i:i + 9]) for i in range(0, 300_000, 9)) * 5,
                                      encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    process = subprocess.Popen([sys.executable, "-m", "llm_course", "build", "--data", "big.txt", "--out", "run"],
                               cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    while process.poll() is None and not (tmp_path / "run" / "config.json").exists():
        time.sleep(0.01)
    time.sleep(1)
    assert process.poll() is None and not (tmp_path / "run" / "tokenizer.bpe").exists()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of them
    pressed = time.perf_counter()
    said = process.stderr.readline()
    assert time.perf_counter() - pressed < 1 and "Stopped; nothing is lost" in said, said
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == "", err


def test_a_step_of_endless_batches_is_given_up_within_a_second_and_repeated_to_the_bit(tmp_path):
    from llm_course.data.batches import RandomWindows
    from llm_course.train.loop import TrainConfig, train
    row = torch.randint(0, 50, (20_000,), generator=torch.Generator().manual_seed(0)).numpy().astype("<u2")
    shards, pressed = Shards(None, {"end_id": 0, "vocab_size": 50}, [row]), []

    def run(name, k, stop_after=None):
        torch.manual_seed(0)
        model = GPT(GPTConfig(50, 32, 32, 1, 1))
        if stop_after:
            def press():
                pressed.append(time.perf_counter())
                os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(stop_after, press).start()
        train(model, RandomWindows(shards, 4, 32, 0), TrainConfig(steps=2, accumulate=k), folder=tmp_path / name,
              watch=None)
        return model.state_dict()

    with pytest.raises(KeyboardInterrupt, match="saved in"):
        run("endless", 10**9, 0.5)
    assert time.perf_counter() - pressed[0] < 1
    with pytest.raises(KeyboardInterrupt):
        run("short", 600, 0.5)
    whole, again = run("whole", 600), run("short", 600)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


# --- Populations ---------------------------------------------------------------------------------

def test_a_population_is_counted_before_anything_is_made():
    from llm_course.evolve.cma import CMAES
    from llm_course.evolve.population import LowRankNoise
    from llm_course.evolve.search import GA, HillClimb, RandomSearch
    from llm_course.evolve.strategies import ES
    tracemalloc.start()
    for kind in (GA, HillClimb, RandomSearch, ES, CMAES):
        with pytest.raises(MemoryError, match=r"a generation of 10,000,000,000,000 candidates .* GB, and cpu has"):
            kind(torch.zeros(50), population=10**13)
    with pytest.raises(MemoryError, match="the shape of the draws would take 32,000.0 GB"):
        CMAES(torch.zeros(10**6), diagonal=False)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    thin = LowRankNoise({"w": (1000, 1000)})  # as many dense candidates would take 800 GB
    assert ES(torch.zeros(10**6), 10**5, noise=thin).demand() == 2 * 10**5 * 2000 * 4


def decided(store, text):
    "What a worker makes of a decision that somebody wrote, and how long it takes."
    from llm_course.evolve.distributed import Exchange, evolve_together
    from llm_course.evolve.strategies import ES
    exchange, es = Exchange(store, 0, 2, patience=5), ES(torch.zeros(6), 8, 0.1, 0.05)
    exchange.take_part(es, lambda x, generation: x.sum(dim=1), block=2)
    exchange.post("0/decision", text.encode())
    begun = time.perf_counter()
    try:
        evolve_together(es, lambda x, generation: x.sum(dim=1), exchange, 1, block=2)
        return None, time.perf_counter() - begun
    except RuntimeError as error:
        return str(error), time.perf_counter() - begun


def test_a_hostile_decision_is_refused_by_its_shape_and_nobody_waits():
    from torch.distributed import HashStore
    hostile = ["", "null", "7", "[]", "[[0]]", "[[0], []]", "[[0], [0], [0]]", "[[0], [5]]", "[[-1], [0]]",
               "[[0, 0], [0]]", "[[0], [0, 0]]", "[[1], [0]]", "[[0.0], [0]]", "[[true], [0]]", "[[0], [false]]",
               '[["0"], [0]]', '{"0": 0}', "[[0], [1, 0]]", "[[0], [null]]", "[" * 100_000, "[[0], [1e99]]", "\x1b[2J"]
    for text in hostile:
        said, seconds = decided(HashStore(), text)
        assert said and "is no decision of these workers" in said, (text, said)
        assert "\x1b" not in said and seconds < 1
    assert decided(HashStore(), "[[0], [0, 1]]")[0] is None


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 12, b"\0" * 4096])
def test_a_share_of_scores_of_the_wrong_length_is_refused(content):
    from torch.distributed import HashStore

    from llm_course.evolve.distributed import Exchange, evolve_together
    from llm_course.evolve.strategies import ES
    store, es = HashStore(), ES(torch.zeros(6), 8, 0.1, 0.05)
    ours, theirs = (Exchange(store, r, 2, patience=5) for r in range(2))
    theirs.take_part(ES(torch.zeros(6), 8, 0.1, 0.05), lambda x, generation: x.sum(dim=1), block=2)
    checksum = theirs.store.get("0/1")[:8]
    theirs.post("0/1", checksum + content)
    begun = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"worker 1 sent \d+ bytes of scores in generation 0, and 4 candidates need 16"):
        evolve_together(es, lambda x, generation: x.sum(dim=1), ours, 1, block=2)
    assert time.perf_counter() - begun < 1


# --- Files that load, but fail in use -----------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A small finished run."
    folder = tmp_path_factory.mktemp("finished")
    (folder / "book.txt").write_text("".join(f"The cat saw {n} mice.\n" for n in range(400)), encoding="utf-8")
    result = command("train", "--data", folder / "book.txt", "--out", folder / "run", "--preset", "tiny", "--layers", 1,
                     "--width", 32, "--context", 64, "--batch-size", 8, "--steps", 10, "--device", "cpu",
                     "--vocab-size", 300)
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def run_copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def sentences(run, *commands, names):
    "Each command says one sentence that names the file, and ends with 2."
    for words in commands:
        result = command(words, run, "--device", "cpu")
        assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
        assert any(name in result.output for name in names), result.output


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_said_when_the_model_is_opened(run_copy, value):
    model = load_model(run_copy / "model.safetensors")
    with torch.no_grad():
        model.blocks[0].attention.query.weight[0, 0] = value
    save_model(model, run_copy / "model.safetensors")
    sentences(run_copy, "chat", "eval", "report", names=["model.safetensors is damaged: some numbers of blocks.0"])


def test_weights_too_large_to_compute_with_are_said_and_no_answer(run_copy):
    model = load_model(run_copy / "model.safetensors")
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    save_model(model, run_copy / "model.safetensors")
    sentences(run_copy, "eval", "report", names=["is the model broken?"])
    from typer.testing import CliRunner

    from llm_course.cli import app
    result = CliRunner().invoke(app, ["chat", str(run_copy), "--device", "cpu"], input="The cat\n")
    assert result.exit_code == 2 and "is the model broken?" in result.output, result.output


@pytest.mark.parametrize("vocab_size", [280, 320])
def test_a_tokenizer_of_another_model_is_said_when_they_are_opened(run_copy, vocab_size):
    from llm_course.tokens.bpe import BPETokenizer
    text = (run_copy.parent / "x.txt", "".join(f"The cat saw {n} mice and owls.\n" for n in range(400)))[1]
    BPETokenizer.train([text], vocab_size).save(run_copy / "tokenizer.bpe")
    sentences(run_copy, "chat", "eval", "report", names=["tokenizer.bpe has"])


# --- What nobody saw ------------------------------------------------------------------------------

@pytest.mark.parametrize("option, value", [("--temperature", "nan"), ("--temperature", "inf"), ("--temperature", "-1"),
                                           ("--tokens", "0"), ("--seed", str(2**70)), ("--seed", "-1")])
def test_a_number_that_no_model_can_write_with_is_an_error_and_no_answer(option, value):
    result = command("chat", option, value)
    assert result.exit_code == 2 and option.strip("-") in result.output and result.output.count("\n") == 1


def test_a_token_that_was_flipped_on_the_disk_is_not_trained_on(run_copy):
    facts = json.loads((run_copy / "stages.json").read_text(encoding="utf-8"))
    del facts["model"]
    (run_copy / "stages.json").write_text(json.dumps(facts), encoding="utf-8")
    path = run_copy / "tokens" / "train" / "00000.bin"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    result = command("train", "--out", run_copy)
    assert result.exit_code == 2 and "00000.bin is damaged: its checksum differs" in result.output, result.output


def test_a_run_folder_that_is_removed_meanwhile_is_an_error(finished, tmp_path, monkeypatch):
    (tmp_path / "remover.py").write_text("import shutil\n\n\ndef remove(row):\n    shutil.rmtree('run')\n",
                                         encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = command("train", "--data", finished.parent / "book.txt", "--out", "run", "--preset", "tiny", "--layers", 1,
                     "--width", 32, "--context", 64, "--batch-size", 8, "--steps", 10, "--device", "cpu",
                     "--vocab-size", 300, "--tracker", "remover:remove")
    assert result.exit_code == 2 and "Talk to it" not in result.output, result.output
    assert "Traceback" not in result.output


@posix
def test_five_times_ctrl_c_is_heard_once_and_closed_streams_are_no_traceback(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"The cat saw {n} mice.\n" for n in range(400)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    program = [sys.executable, "-m", "llm_course"]
    words = ["train", "--data", "book.txt", "--out", "run", "--preset", "tiny", "--layers", "1", "--width", "32",
             "--steps", "400", "--device", "cpu", "--vocab-size", "300"]
    process = subprocess.Popen([*program, *words], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("run/checkpoints/*.safetensors")):
        time.sleep(0.01)
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.count("nothing is lost. Continue with: llm-course train --out run") == 1
    for closed in ("<&-", ">&-"):
        line = f"{sys.executable} -m llm_course chat run --device cpu --tokens 3 {closed} </dev/null"
        result = subprocess.run(line if closed == ">&-" else line.removesuffix("</dev/null"), shell=True, cwd=tmp_path,
                                env=environment, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in result.stderr, result.stderr


@pytest.mark.parametrize("n", [1, 3, 10, 50, 500, 5000])
def test_few_conversations_cost_no_more_than_many(n):
    from llm_course.pipeline.assistant import _SHARE, _sft_budget
    chats, stories = [[0] * 40] * n, [[0] * 250] * 600
    repeat, kept, passes = _sft_budget(chats, stories, pretrained=500_000)
    read = passes * (40 * n * repeat + 250 * kept)
    assert read <= _SHARE * 500_000 and repeat * n * passes >= min(640, 4 * n), (read, repeat, kept, passes)


@pytest.mark.parametrize("name", [".", "/", "\0", "x" * 300, "~", "no/such\0folder/x", "", "/proc/x"])
def test_a_name_that_no_disk_takes_does_not_end_the_talk(name, tmp_path, monkeypatch):
    from llm_course.conversation import Conversation
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    talk = Conversation(None)
    talk.messages = [{"role": "user", "content": "Hi"}]
    said = talk.obey(f"/save {name}")
    assert said.startswith("not saved: ") or name == "" and said == "saved: talk.jsonl"
    assert not list((tmp_path / "home").iterdir()) and talk.messages


def test_what_a_terminal_would_obey_is_shown_as_marks(tmp_path, run_copy):
    evil = tmp_path / "\x1b[31mrun\x07"
    run_copy.rename(evil)
    (evil / "model.safetensors").unlink()
    for words in ("eval", "report", "chat"):
        result = command(words, evil, "--device", "cpu")
        assert "\x1b" not in result.output and "\x07" not in result.output and "\u241b[31mrun\u2407" in result.output


def test_no_duration_is_measured_by_a_clock_that_may_be_set_back():
    package = Path(__file__).resolve().parent.parent / "llm_course"
    for path in package.rglob("*.py"):
        assert "time.time()" not in path.read_text(encoding="utf-8"), path
