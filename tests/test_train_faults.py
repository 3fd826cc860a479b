"""A training run is killed at random moments and must go on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llm_course.data.batches import RandomWindows
from llm_course.data.shards import memory_shards
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.text import CharTokenizer
from llm_course.train.checkpoint import (
    CheckpointFiles, checkpoints_in, read_checkpoint, write_checkpoint)
from llm_course.train.loop import TrainConfig, Trainer, train
from llm_course.train.runner import load_job, resume_job

STEPS = 60
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 20


def make_run(width: int = 32, seed: int = 0):
    "A model with dropout, so that the random generators matter, and its batches."
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train([TEXT])
    shards = memory_shards([TEXT], tokenizer)
    config = GPTConfig(tokenizer.vocab_size, 32, width, n_layers=2, n_heads=2, dropout=0.1)
    return GPT(config), RandomWindows(shards, 4, 32, seed=seed)


def run(folder: Path, log: Path | None = None, steps: int = STEPS):
    "Train; write a line for each step, as soon as it is saved."

    def watch(trainer):
        if log is not None:
            row = trainer.progress.history[-1]
            with open(log, "a", encoding="utf-8") as f:
                f.write(json.dumps([row["step"], row["train"]]) + "\n")

    torch.set_num_threads(1)
    model, batches = make_run()
    config = TrainConfig(steps=steps, accumulate=2)
    valid = [RandomWindows(batches.shards, 4, 32, seed=9).batch(0)]
    progress = train(model, batches, config, valid, folder, eval_every=2, watch=watch)
    return model, progress


def start(folder: Path, log: Path, **options) -> subprocess.Popen:
    "The same run in a process of its own."
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, str(folder), str(log)], env=env, **options)


def losses(log: Path) -> dict:
    "Step -> loss; complains if a step was ever seen with two losses."
    seen = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        step, loss = json.loads(line)
        assert seen.setdefault(step, loss) == loss, f"step {step} had two losses"
    return seen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder / "run", folder / "log")
    assert process.wait(timeout=120) == 0
    return folder


def live(folder: Path, log: Path, rng: random.Random) -> str:
    "Start the run and kill it at a random moment, every third time in the middle of a save."
    process, before = start(folder, log), n_lines(log)
    deadline = time.monotonic() + 60
    while process.poll() is None and n_lines(log) == before and time.monotonic() < deadline:
        time.sleep(0.002)  # until it has begun
    how = "while it saved" if rng.random() < 1 / 3 else "at a random moment"
    end = time.monotonic() + rng.uniform(0, 0.1)
    while process.poll() is None:
        saving, late = any(folder.glob(".step-*")), time.monotonic() > end
        if saving if how == "while it saved" else late:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return how
    assert process.returncode == 0
    return "it was quicker"


def n_lines(log: Path) -> int:
    return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_at_twenty_random_moments(tmp_path, undisturbed):
    rng, kills = random.Random(0), []
    for number in range(8):  # runs; each is killed until it gets through
        folder, log = tmp_path / f"run{number}", tmp_path / f"log{number}"
        how = "not yet"
        while how != "it was quicker" and len(kills) < 20:
            how = live(folder, log, rng)
            kills += [how] if how in KILLED else []
            for path in checkpoints_in(folder):
                read_checkpoint(path)  # whatever is there under its name can be read
        assert start(folder, log).wait(timeout=120) == 0  # left in peace at last
        compare(folder, log, undisturbed)
        if len(kills) == 20:
            break
    assert len(kills) == 20 and kills.count(KILLED[0]) >= 3, kills


KILLED = ("while it saved", "at a random moment")


def compare(folder: Path, log: Path, undisturbed: Path) -> None:
    "The same losses, and in the end the same bits."
    assert losses(log) == losses(undisturbed / "log")
    last = checkpoints_in(folder)[-1]
    ours, facts = read_checkpoint(last)
    theirs, _ = read_checkpoint(undisturbed / "run" / last.name)
    assert facts["progress"]["step"] == STEPS
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list(folder.glob(".*")), "half-written files were left behind"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_kill_loses_only_steps_since_the_last_checkpoint(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(folder, log)
    while process.poll() is None and (
        not log.exists() or len(log.read_text(encoding="utf-8").splitlines()) < 10
    ):
        time.sleep(0.002)
    process.kill()
    process.wait()
    seen = max(losses(log))
    saved = read_checkpoint(checkpoints_in(folder)[-1])[1]["progress"]["step"]
    assert saved >= seen - 2  # a line is written just before its checkpoint


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to the whole console")
def test_interrupt_saves_and_says_how_to_go_on(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), str(log)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not log.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and b"KeyboardInterrupt" in err
    assert b"Stopped after step" in out and b"same folder" in out
    step = int(out.split(b"after step ")[1].split(b",")[0])
    assert read_checkpoint(checkpoints_in(folder)[-1])[1]["progress"]["step"] == step


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A run of four steps, and its files."
    folder = tmp_path_factory.mktemp("saved")
    run(folder, steps=4)
    return folder


def trainer(**changes):
    model, batches = make_run(changes.pop("width", 32), changes.pop("seed", 0))
    return Trainer(model, batches, TrainConfig(**{"steps": 4, "accumulate": 2, **changes}))


def test_every_truncation_is_noticed(saved, tmp_path):
    whole = checkpoints_in(saved)[-1].read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(30))]:
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.safetensors is"):
            read_checkpoint(path)


def test_every_flipped_bit_is_noticed(saved, tmp_path):
    whole = checkpoints_in(saved)[-1].read_bytes()
    rng = random.Random(1)
    header = int.from_bytes(whole[:8], "little") + 8
    places = [*range(16), *(rng.randrange(header) for _ in range(60))]
    places += [rng.randrange(header, len(whole)) for _ in range(60)]
    good = read_checkpoint(checkpoints_in(saved)[-1])
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        path = tmp_path / "flipped.safetensors"
        path.write_bytes(flipped)
        try:
            tensors, facts = read_checkpoint(path)
        except ValueError as error:
            assert "flipped.safetensors" in str(error)
            continue
        # a flip that changes nothing that is read, such as a space in the header's padding
        assert facts == good[1] and tensors.keys() == good[0].keys()
        assert all(torch.equal(tensors[name], good[0][name]) for name in tensors)


def test_foreign_files_are_named(saved, tmp_path):
    letter, model_file = tmp_path / "letter.safetensors", tmp_path / "model.safetensors"
    letter.write_text("Dear aunt", encoding="utf-8")
    save_file({"weight": torch.zeros(3)}, model_file)
    with pytest.raises(ValueError, match="letter.safetensors is damaged or not a checkpoint"):
        load_job(trainer(), letter)
    with pytest.raises(ValueError, match="not a checkpoint of a training run"):
        load_job(trainer(), model_file)
    with pytest.raises(FileNotFoundError):
        load_job(trainer(), tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 0.5}, "lr was 0.01 and is 0.5"),
        ({"steps": 9, "clip": None}, "steps was 4 and is 9, clip was 1.0 and is None"),
        ({"width": 48}, "d_model was 32 and is 48"),
        ({"seed": 5}, "seed was 0 and is 5"),
    ],
)
def test_another_run_is_refused_by_name(saved, changes, message):
    other = trainer(**changes)
    weights = [p.detach().clone() for p in other.model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_job(other, checkpoints_in(saved)[-1])
    assert all(torch.equal(p, q) for p, q in zip(weights, other.model.parameters()))


def test_a_damaged_newest_checkpoint_falls_back(saved, tmp_path, capsys):
    for path in checkpoints_in(saved):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    newest = checkpoints_in(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert resume_job(trainer(), CheckpointFiles(tmp_path, "step", 2)) == checkpoints_in(tmp_path)[-2]
    assert "going on from" in capsys.readouterr().out
    for path in checkpoints_in(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        resume_job(trainer(), CheckpointFiles(tmp_path, "step", 2))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {"w": torch.ones(3)}, {"step": 1})

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError):
        write_checkpoint(path, {"w": torch.zeros(3)}, {"step": 2})
    assert read_checkpoint(path)[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_checkpoint_of_a_future_version_is_refused(saved, tmp_path):
    tensors, facts = read_checkpoint(checkpoints_in(saved)[-1])
    path = tmp_path / "future.safetensors"
    save_file(tensors, path, {"kind": "llm-course checkpoint 9", "facts": json.dumps(facts)})
    with pytest.raises(ValueError, match="'llm-course checkpoint 9', this version reads"):
        load_job(trainer(), path)


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits the size of a file; Windows does not")
def test_a_file_that_may_not_grow_stops_the_run_in_plain_words(tmp_path):
    import resource

    limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))}
    command = [sys.executable, __file__, str(tmp_path / "run"), str(tmp_path / "log")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=env, capture_output=True, text=True, **limits)
    assert process.returncode != 0
    assert "cannot write a checkpoint of 0." in process.stderr and "Make room" in process.stderr
    assert not list((tmp_path / "run").glob("*.safetensors*"))


@pytest.fixture
def small_disk(tmp_path):
    "A file system of its own with little room."
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("only root may mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_loses_nothing(small_disk, undisturbed):
    folder, log = small_disk / "run", small_disk / "log"
    process = start(folder, log, stderr=subprocess.PIPE)
    words = process.communicate(timeout=60)[1].decode()
    assert process.returncode != 0
    assert "No space left on device" in words and "start the same command again" in words
    assert not list(folder.glob(".step-*")), "half-written files fill the disk"
    for path in checkpoints_in(folder):
        read_checkpoint(path)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert start(folder, log).wait(timeout=120) == 0
    compare(folder, log, undisturbed)


def test_two_processes_on_one_folder(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    first = start(folder, log)
    while first.poll() is None and n_lines(log) == 0:
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)  # or it would be over too soon
    second = start(folder, tmp_path / "log2", stderr=subprocess.PIPE)
    words = second.communicate(timeout=60)[1].decode()
    first.send_signal(signal.SIGCONT)
    assert second.returncode != 0 and f"another process works on {folder}: process" in words
    assert first.wait(timeout=120) == 0
    assert max(losses(log)) == STEPS


def test_the_error_tells_how_the_gradient_went():
    t = trainer(steps=20, lr=1e3, lr_matrix=None, clip=None, warmup=0.0)
    message = r"in step \d+. The last lengths of the gradient: "
    with pytest.raises(FloatingPointError, match=message):
        for _ in range(20):
            t.take_step()
            t.model.head.weight.data.mul_(1e12)


def test_numbers_that_are_none_reach_no_checkpoint(tmp_path):
    t = trainer()
    t.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not a finite number"):
        t.take_step()
    model, batches = make_run()
    config = TrainConfig(steps=50, lr=1e30, lr_matrix=1e30, warmup=0.0, clip=None)
    with pytest.raises(FloatingPointError, match="half the learning rate"):
        train(model, batches, config, folder=tmp_path, eval_every=1, watch=None)
    for path in checkpoints_in(tmp_path):
        tensors, _ = read_checkpoint(path)
        assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_precision_trains_and_resumes(tmp_path, precision):
    finals = []
    for folder, stops in ((tmp_path / "a", [None]), (tmp_path / "b", [3, None])):
        for stop in stops:

            def watch(trainer, stop=stop):
                if trainer.progress.step == stop:
                    raise InterruptedError

            torch.manual_seed(0)
            model, batches = make_run()
            config = TrainConfig(steps=20, precision=precision)
            try:
                progress = train(model, batches, config, None, folder, 1, keep=1, watch=watch)
            except InterruptedError:
                assert stop == 3
        finals.append([row["train"] for row in progress.history])
        assert len(checkpoints_in(folder)) == 1
    assert finals[0] == finals[1]
    assert finals[0][-1] < 0.8 * finals[0][0]


def test_watching_changes_nothing(tmp_path):
    def busy(trainer):
        torch.rand(1000)
        random.random()

    results = []
    for watch, every in ((None, 7), (busy, 1)):
        model, batches = make_run()
        valid = [RandomWindows(batches.shards, 4, 32, seed=9).batch(0)]
        train(model, batches, TrainConfig(steps=7), valid, eval_every=every, watch=watch)
        results.append(list(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*results))


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
