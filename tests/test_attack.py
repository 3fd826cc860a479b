"Files, names and numbers as a stranger would send them: one sentence with the file's name, and nothing foreign touched."
import json
import os
import re
import sys
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from llm_course.align.chat import CHAT_TOKENS, read_chats, recent_messages
from llm_course.align.pairs import read_pairs
from llm_course.align.panel import read_judgements
from llm_course.align.reward_model import RewardModel, load_reward, save_reward
from llm_course.core import folder_lock
from llm_course.data.files import read_json_lines
from llm_course.data.shards import Shards, write_shards
from llm_course.model.files import load_model, save_model
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.pipeline.build import load_run
from llm_course.pipeline.run import Settings, read_json, read_stages
from llm_course.tokens.exchange import load_tokenizer
from llm_course.tokens.formats import read_ranks, write_ranks
from llm_course.tokens.text import CharTokenizer
from llm_course.train.checkpoint import read_checkpoint, write_checkpoint

posix = pytest.mark.skipif(os.name == "nt", reason="links and pipes as Unix has them")
HUGE = 10 ** 18
STRANGE = [None, True, "x", "\x1b[31m", -1, 0, 3, 2.5, float("nan"), float("inf"), HUGE, [], [1], {}, {"a": 1},
           [[[[[1]]]]]]


def paths_in(value, path=()):
    "Every place in a JSON value."
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def changed(value, path, new):
    "The value with another one in a place; `...` removes it."
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def mutants(value):
    "A JSON text for each field that is removed or is something else."
    for path in paths_in(value):
        for new in [*STRANGE, ...] if path else STRANGE:
            yield json.dumps(changed(value, path, new))


def with_header(content, **metadata):
    "A safetensors file with another header."
    return save(load(content), metadata)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "One good file of each kind."
    folder = tmp_path_factory.mktemp("good")
    tokenizer = CharTokenizer.train("abc def", ("<|endoftext|>", *CHAT_TOKENS))
    tokenizer.save(folder / "tokenizer.bpe")
    model = GPT(GPTConfig(tokenizer.vocab_size, 8, 8, 1, 1))
    save_model(model, folder / "model.safetensors")
    save_reward(RewardModel(model), folder / "reward.safetensors")
    write_checkpoint(folder / "step.safetensors", {"a": torch.ones(3)}, {"step": 1, "settings": {"lr": 0.1}})
    write_ranks({b"a": 0, b"b": 1}, folder / "ranks.tiktoken")
    write_shards(["abc", "def"], tokenizer, folder / "shards")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": said}) + "\n", encoding="utf-8")
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n",
                                        encoding="utf-8")
    (folder / "judged.jsonl").write_text(json.dumps(
        {"messages": said[:1], "left": "b", "right": "c", "choice": "left"}) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"settings": Settings("world", size=1).filled().to_dict()}),
                                        encoding="utf-8")
    return folder


READERS = {"model.safetensors": load_model, "reward.safetensors": load_reward, "step.safetensors": read_checkpoint,
           "tokenizer.bpe": load_tokenizer, "ranks.tiktoken": read_ranks, "chats.jsonl": read_chats,
           "pairs.jsonl": read_pairs, "judged.jsonl": read_judgements, "config.json": read_json,
           "shards/shards.json": lambda path: Shards(path.parent, check=True)}


def bears(reader, path):
    "A reader may take a file, or say in one sentence what is wrong; nothing else."
    try:
        return reader(path)
    except (ValueError, OSError) as error:
        text = str(error)
        assert path.name in text or path.parent.name in text, text
        return None


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_cut_empty_or_noise_is_one_sentence(name, copy):
    path = copy / name
    good = path.read_bytes()
    for i in range(0, len(good), max(1, len(good) // 40)):
        path.write_bytes(good[:i])
        bears(READERS[name], path)
        path.write_bytes(good[:i] + bytes([good[i] ^ 0x55]) + good[i + 1:])
        bears(READERS[name], path)
    for noise in (b"", b"\0" * 100, b"\xff\xfe\x00", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000):
        path.write_bytes(noise)
        bears(READERS[name], path)


@posix
@pytest.mark.parametrize("name", READERS)
def test_a_folder_a_pipe_or_a_lost_link_in_place_of_a_file_is_one_sentence(name, copy):
    path = copy / name
    path.unlink()
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("nowhere"), lambda: None):
        make()
        done = []
        thread = threading.Thread(target=lambda: done.append(bears(READERS[name], path)), daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive(), f"{name}: waits for ever"
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif os.path.lexists(path):
            path.unlink()


@pytest.mark.parametrize("name", ["chats.jsonl", "pairs.jsonl", "judged.jsonl", "config.json", "shards/shards.json"])
def test_each_field_that_is_removed_or_of_another_kind_is_one_sentence(name, copy):
    path = copy / name
    for text in mutants(json.loads(path.read_text(encoding="utf-8"))):
        path.write_text(text + "\n", encoding="utf-8")
        bears(READERS[name], path)


@pytest.mark.parametrize("name", ["model.safetensors", "reward.safetensors"])
def test_each_field_of_a_model_that_is_of_another_kind_is_one_sentence(name, copy):
    path = copy / name
    content = path.read_bytes()
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    for text in mutants(json.loads(header["config"])):
        path.write_bytes(with_header(content, **{**header, "config": text}))
        bears(READERS[name], path)
    for key in header:
        path.write_bytes(with_header(content, **{k: v for k, v in header.items() if k != key}))
        assert bears(READERS[name], path) is None


def test_a_header_that_asks_for_much_is_refused_before_anything_is_made(copy):
    content = (copy / "model.safetensors").read_bytes()
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    for name, value in (("n_layers", 10_000), ("context_length", 10**9), ("d_model", 10**6), ("vocab_size", 10**9)):
        config = {**json.loads(header["config"]), name: value}
        (copy / "model.safetensors").write_bytes(with_header(content, **{**header, "config": json.dumps(config)}))
        with pytest.raises(ValueError, match="model.safetensors"):
            load_model(copy / "model.safetensors")


def test_settings_and_stages_of_a_run_that_are_of_another_kind_are_one_sentence(copy):
    stages = {"tokenizer": {"source": "world"}, "plan": {"documents": True}}
    (copy / "stages.json").write_text(json.dumps(stages), encoding="utf-8")
    assert load_run(copy).documents
    for text in mutants(json.loads((copy / "config.json").read_text(encoding="utf-8"))):
        (copy / "config.json").write_text(text, encoding="utf-8")
        bears(lambda path: Settings().settle(path.parent), copy / "config.json")
    for text in mutants(stages):
        (copy / "stages.json").write_text(text, encoding="utf-8")
        bears(lambda path: load_run(path.parent), copy / "stages.json")
        bears(read_stages, copy / "stages.json")
    (copy / "stages.json").unlink()
    with pytest.raises(FileNotFoundError, match="no stages.json"):
        load_run(copy)


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


def test_a_step_of_endless_batches_is_given_up_within_a_second_and_repeated_to_the_bit(tmp_path):
    import signal
    import time

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
