"Every reader of files, with every field of every file changed: it takes the file, or says in one sentence what is wrong."
import gzip
import json
import os
import random
import shutil
import threading
import time
import zlib
from functools import partial

import pytest
import torch
from safetensors.torch import load, save

from llm_course.align.chat import CHAT_TOKENS, read_chats
from llm_course.align.lora import add_lora, load_lora, save_lora
from llm_course.align.pairs import read_pairs
from llm_course.align.panel import read_judgements
from llm_course.align.policy_tuner import train_policy
from llm_course.align.pair_tuner import train_dpo
from llm_course.align.reward_model import RewardModel, load_reward, save_reward
from llm_course.data.batches import RandomWindows
from llm_course.data.files import read_texts
from llm_course.data.shards import Shards, write_shards
from llm_course.evolve.runs import evolve
from llm_course.evolve.search import GA
from llm_course.evolve.strategies import ES
from llm_course.evolve.cma import CMAES
from llm_course.model.files import load_model, save_model
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.pipeline.build import load_run
from llm_course.pipeline.run import Settings, read_json, read_stages
from llm_course.tokens.exchange import load_tokenizer
from llm_course.tokens.formats import read_gpt2_merges, read_gpt2_ranks, read_ranks, write_ranks
from llm_course.tokens.text import CharTokenizer
from llm_course.train.checkpoint import CheckpointFiles, read_checkpoint, write_checkpoint
from llm_course.train.loop import TrainConfig, train
from llm_course.train.watch import read_log, write_log
from llm_course.world.talk import AnswerPair
from llm_course.world.writers import say

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
    save_lora(add_lora(model, 2), folder / "adapter")
    write_log(folder, [{"step": 1, "tokens": 8, "train": 1.5, "valid": None}])
    (folder / "vocab.json").write_text('{"a": 0, "\u0120b": 1}', encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na b\n\u0120 c\n", encoding="utf-8")
    for name, text in (("a.txt", "one\n<|endoftext|>\ntwo"), ("a.html", "<p>one<p>two"), ("a.csv", "text\none\ntwo\n"),
                       ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n')):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"one two three " * 50))
    (folder / "config.json").write_text(json.dumps({"settings": Settings("world", size=1).filled().to_dict()}),
                                        encoding="utf-8")
    (folder / "stages.json").write_text(json.dumps({"tokenizer": {"source": "world"}, "plan": {"documents": True}}),
                                        encoding="utf-8")
    return folder


def plain():
    "A model for the adapter."
    torch.manual_seed(0)
    return GPT(GPTConfig(13, 8, 8, 1, 1))


READERS = {"model.safetensors": load_model, "reward.safetensors": load_reward, "step.safetensors": read_checkpoint,
           "tokenizer.bpe": load_tokenizer, "ranks.tiktoken": read_ranks, "chats.jsonl": read_chats,
           "pairs.jsonl": read_pairs, "judged.jsonl": read_judgements, "config.json": read_json, "stages.json": read_stages,
           "shards/shards.json": lambda path: Shards(path.parent, check=True),
           "adapter/adapter_config.json": lambda path: load_lora(plain(), path.parent),
           "adapter/adapter_model.safetensors": lambda path: load_lora(plain(), path.parent),
           "log.jsonl": lambda path: read_log(path.parent), "vocab.json": read_gpt2_ranks,
           "merges.txt": read_gpt2_merges}
READERS |= {name: lambda path: list(read_texts(path)) for name in ("a.txt", "a.html", "a.csv", "a.jsonl", "a.txt.gz")}


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
        thread = threading.Thread(target=lambda done=done: done.append(bears(READERS[name], path)), daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive(), f"{name}: waits for ever"
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif os.path.lexists(path):
            path.unlink()


@pytest.mark.parametrize("name", ["chats.jsonl", "pairs.jsonl", "judged.jsonl", "config.json", "shards/shards.json",
                                  "adapter/adapter_config.json", "log.jsonl", "vocab.json"])
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


def test_each_field_of_a_tokenizer_that_is_of_another_kind_is_one_sentence(copy):
    path = copy / "tokenizer.bpe"
    first, about, *rows = path.read_text(encoding="utf-8").split("\n")
    for text in mutants(json.loads(about)):
        path.write_text("\n".join([first, text, *rows]), encoding="utf-8")
        bears(load_tokenizer, path)
    for row in ("", "0", "x\t\"a\"", "-1\t\"a\"", "1e9\t\"a\"", f"{HUGE}\t\"a\"", "0\ta", "0\t0xZZ", "0\t7", "0\tnull", "0\t[1]"):
        path.write_text("\n".join([first, about, row, *rows[1:]]), encoding="utf-8")
        assert bears(load_tokenizer, path) is None
    path.write_text("\n".join([first, about, rows[1], *rows[1:]]), encoding="utf-8")
    assert bears(load_tokenizer, path) is None


def test_tokens_beyond_the_vocabulary_are_said_before_they_are_looked_up(copy):
    header = json.loads((copy / "shards" / "shards.json").read_text(encoding="utf-8"))
    [entry] = header["shards"]
    ids = (b"\xff\xff" + (copy / "shards" / entry["file"]).read_bytes()[2:])
    (copy / "shards" / entry["file"]).write_bytes(ids)
    entry["crc32"] = zlib.crc32(ids)
    (copy / "shards" / "shards.json").write_text(json.dumps(header), encoding="utf-8")
    with pytest.raises(ValueError, match="00000.bin holds the token 65535, and its header says there are"):
        Shards(copy / "shards", check=True)


@pytest.mark.parametrize("pattern", ["(?:" * 60 + "a" + "){1,1000}" * 60, "(?:(?:(?:a{1000}){1000}){1000}){1000}",
                                     "(?:" * 30 + "a" + ")+" * 30, "(" * 3000 + "a" + ")" * 3000, "a{99999999999}",
                                     "(?<=" * 900 + "a" + ")" * 900, "a" * 20_000, "(?P<x", "(?:[a-z]{2,}\\s*){60000}b"])
def test_a_pattern_that_takes_the_machine_is_refused_before_it_is_compiled(copy, pattern):
    lines = (copy / "tokenizer.bpe").read_text(encoding="utf-8").split("\n")
    about = {**json.loads(lines[1]), "pattern": pattern}
    (copy / "tokenizer.bpe").write_text("\n".join([lines[0], json.dumps(about), *lines[2:]]), encoding="utf-8")
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="tokenizer.bpe, line 2"):
        load_tokenizer(copy / "tokenizer.bpe")
    assert time.perf_counter() - begun < 1


# --- Runs that go on -----------------------------------------------------------------------------

def going_on_with_train(folder):
    "Two steps more."
    torch.manual_seed(0)
    row = torch.randint(0, 13, (400,), generator=torch.Generator().manual_seed(0)).numpy().astype("<u2")
    shards = Shards(None, {"end_id": 0, "vocab_size": 13}, [row])
    return train(plain(), RandomWindows(shards, 2, 8, 0), TrainConfig(steps=4), [RandomWindows(shards, 2, 8, 1).batch(0)],
                 folder, 2, keep=1, watch=None)


def sphere(x):
    return -x.square().sum(dim=1)


def talker():
    "A model that chats, and its tokenizer."
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train("abc ", ("<|endoftext|>", *CHAT_TOKENS))
    return GPT(GPTConfig(tokenizer.vocab_size, 32, 8, 1, 1)), tokenizer


GOING_ON = {
    "train": going_on_with_train,
    "GA": lambda folder: evolve(GA(torch.ones(4), 6), sphere, generations=4, folder=folder),
    "ES": lambda folder: evolve(ES(torch.ones(4), 6), sphere, generations=4, folder=folder),
    "CMA": lambda folder: evolve(CMAES(torch.ones(4)), sphere, generations=4, folder=folder),
    "policy": lambda folder: train_policy(*talker(), [say("a")], lambda m, a: torch.ones(len(a)), "ppo", steps=4,
                                          batch_size=2, group=2, passes=1, max_new_tokens=2, folder=folder),
    "dpo": lambda folder: train_dpo(*talker(), [AnswerPair(say("a"), "b", "c")], steps=4, batch_size=2, folder=folder)}


@pytest.fixture(scope="module", params=GOING_ON)
def half_done(request, tmp_path_factory):
    "A kind of run, its folder, and its checkpoint in the middle."
    folder, kept, write = tmp_path_factory.mktemp(request.param), [], CheckpointFiles.write

    def keep(files, step, tensors, facts):
        path = write(files, step, tensors, facts)
        if step == 2 and "best" not in path.name:
            kept.append((path.name, {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(facts))))
        return path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFiles, "write", keep)
        for name in ("evolve", "train_policy", "train_dpo"):
            patch.setattr(f"{__name__}.{name}", partial(globals()[name], save_every=2))
        GOING_ON[request.param](folder)
    shutil.rmtree(folder)
    return GOING_ON[request.param], folder, *kept[-1]


def goes_on_or_says(run, folder, name, tensors, facts):
    "The run goes on from a checkpoint, or one sentence names it; and it takes no time."
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder / name, tensors, facts)
    begun = time.perf_counter()
    try:
        run(folder)
    except (ValueError, MemoryError) as error:
        assert name in str(error), error
    except FloatingPointError:
        pass  # numbers that are none are told when they are met
    assert time.perf_counter() - begun < 5, facts


def test_each_fact_of_a_checkpoint_that_is_of_another_kind_is_one_sentence(half_done):
    run, folder, name, tensors, facts = half_done
    goes_on_or_says(run, folder, name, tensors, facts)
    every = list(mutants(facts))
    for text in random.Random(0).sample(every, min(len(every), 120)):
        goes_on_or_says(run, folder, name, tensors, json.loads(text))


def test_each_tensor_of_a_checkpoint_that_is_of_another_shape_is_one_sentence(half_done):
    run, folder, name, tensors, facts = half_done
    rng = random.Random(0)
    for key in rng.sample(sorted(tensors), min(len(tensors), 12)):
        t = tensors[key]
        for new in (None, torch.zeros(0), torch.zeros(3, 5), t.double() if t.is_floating_point() else t.float(),
                    t.flatten()[:-1], torch.full(t.shape, float("nan")), torch.full(t.shape, 3e38)):
            changed_one = {**tensors, key: new} if new is not None else {k: v for k, v in tensors.items() if k != key}
            goes_on_or_says(run, folder, name, changed_one, facts)
