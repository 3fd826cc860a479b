"""Several processes train one model: the same losses as one, the same checkpoints_in, safe to kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llm_course.data.batches import DocumentBatches, RandomWindows
from llm_course.data.shards import memory_shards
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.text import CharTokenizer
from llm_course.train.checkpoint import checkpoints_in, read_checkpoint
from llm_course.train.loop import TrainConfig, train
from llm_course.train.ranks import rank

TEXTS = [f"The {a} fox jumps over the {b} dog. " * 3 for a in ("quick", "red") for b in "abcdefgh"]
STEPS = 12
ADAM = {"lr_matrix": None, "lr": 0.003}

pytestmark = pytest.mark.skipif(
    not dist.is_available() or os.name == "nt", reason="torch can't do this here"
)


def make_run(dropout: float = 0.0, rows: int = 5):
    "A model, batches with an odd number of rows and a mask, and one row to judge by."
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train(TEXTS)
    shards = memory_shards(TEXTS, tokenizer)
    model = GPT(GPTConfig(tokenizer.vocab_size, 48, 32, n_layers=2, n_heads=2, dropout=dropout))
    batches = DocumentBatches(shards, rows, 48, seed=0, pack=False)
    return model, batches, [RandomWindows(shards, n, 48, seed=9).batch(0) for n in (1, 3)]


def run(how: str, folder: Path | None = None, log: Path | None = None, every: int = 3, **settings):
    "Train as one process, or as one of several; the losses and lengths of gradients."
    from llm_course.train.parallel import distribute_model

    def watch(trainer):
        if log is not None and rank() == 0:
            row = trainer.progress.history[-1]
            with open(log, "a", encoding="utf-8") as f:
                f.write(json.dumps([row["step"], row["train"], row["valid"]]) + "\n")

    dropout, pause = settings.pop("dropout", 0.0), settings.pop("pause", 0.0)
    model, batches, valid = make_run(dropout)
    if how in ("ddp", "fsdp"):
        model = distribute_model(model, how)
    if pause:
        model.register_forward_pre_hook(lambda *_: time.sleep(pause))
    config = TrainConfig(**{"steps": STEPS, "accumulate": 2, "precision": "float32", **settings})
    p = train(model, batches, config, valid, folder, every, watch=watch)
    return [[row["train"], row["valid"], row["norm"]] for row in p.history]


def compare(folder: Path) -> dict:
    "All ways in turn, in one group of processes; two of them save."
    results = {how: run(how, **ADAM) for how in ("plain", "ddp", "fsdp")}
    results |= {f"muon {how}": run(how) for how in ("plain", "ddp", "fsdp")}
    for how in ("ddp", "fsdp"):
        run(how, folder / how, **ADAM)
        last = checkpoints_in(folder / how)[-1]
        if rank() == 0:
            last.unlink()  # as if it had ended at the look before
        dist.barrier()
    results["resumed"] = run("fsdp", folder / "one", **ADAM)
    return results


def torchrun(arguments: list, n: int = 2, **options) -> subprocess.Popen:
    "Start processes that train together."
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
    command += ["--standalone", __file__, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, start_new_session=True, **pipes, **options)


def close(a: list, b: list, tolerance: float) -> bool:
    "Are all numbers of two histories alike?"
    a, b = torch.tensor(a), torch.tensor(b)
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * b.abs()).all())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    "What two processes computed, and where they saved."
    folder = tmp_path_factory.mktemp("compared")
    torch.set_num_threads(1)
    run("one", folder / "one", **ADAM)
    checkpoints_in(folder / "one")[-1].unlink()
    process = torchrun(["compare", folder])
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), folder


@pytest.mark.parametrize("how", ["plain", "ddp", "fsdp"])
def test_two_processes_train_to_the_losses_of_one(compared, how):
    # only the order of additions differs; Muon computes in bfloat16, so it differs by more
    assert close(compared[0][how], run("one", **ADAM), 1e-4)
    assert close(compared[0][f"muon {how}"], run("one"), 2e-2)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_resumes_on_one(compared, how):
    folder = compared[1] / how
    assert read_checkpoint(checkpoints_in(folder)[-1])[1]["progress"]["step"] < STEPS
    assert close(run("one", folder, **ADAM), run("one", **ADAM), 1e-4)


def test_a_checkpoint_of_one_process_resumes_on_two(compared):
    assert close(compared[0]["resumed"], run("one", **ADAM), 1e-4)


def lines(log: Path) -> list:
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def wait_for(log: Path, n: int, process: subprocess.Popen) -> None:
    "Wait until a run has logged `n` lines."
    deadline = time.monotonic() + 90
    while process.poll() is None and len(lines(log)) < n and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(lines(log)) >= n, process.communicate()[1] if process.poll() is not None else "slow"


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_killed_worker_ends_the_run_with_a_clear_message_and_it_resumes(tmp_path, how):
    undisturbed, folder, log = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "log"
    process = torchrun(["train", undisturbed / "run", undisturbed / "log", how, 0])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    process = torchrun(["train", folder, log, how, 0.02])
    wait_for(log, 2, process)
    victim = int((tmp_path / "run" / "pid-1").read_text(encoding="utf-8"))
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    out, err = process.communicate(timeout=120)
    assert time.monotonic() - start < 60 and process.returncode != 0
    assert "another of the 2 processes has ended" in err and "Start the same command again" in err
    assert len(lines(log)) < STEPS
    process = torchrun(["train", folder, log, how, 0])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    seen = {step: rest for step, *rest in map(json.loads, lines(log))}
    assert [[step, *seen[step]] for step in sorted(seen)] == [
        json.loads(line) for line in lines(undisturbed / "log")
    ]  # dropout included: the same bits


def test_ctrl_c_saves_what_all_processes_have(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = torchrun(["train", folder, log, "ddp", 0.02])
    wait_for(log, 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert out.count("Stopped after step") == 1 and "same folder" in out
    step = int(out.split("after step ")[1].split(",")[0])
    assert read_checkpoint(checkpoints_in(folder)[-1])[1]["progress"]["step"] == step


def main(task: str, folder: str, *rest: str) -> None:
    from llm_course.train.workers import join_group

    torch.set_num_threads(1)
    with join_group("cpu"):
        work(task, Path(folder), *rest)


def work(task: str, folder: Path, *rest: str) -> None:
    if task == "compare":
        results = compare(folder)
        if rank() == 0:
            print(json.dumps(results))
    else:
        log, how, pause = rest
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"pid-{rank()}").write_text(str(os.getpid()), encoding="utf-8")
        run(how, folder, Path(log), 1, dropout=0.1, pause=float(pause), **ADAM)


if __name__ == "__main__":
    main(*sys.argv[1:])
