"A training run under torchrun, with a killed worker, and where the memory is short."
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import RHYMES, call

ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--preset", "tiny", "--layers", "1", "--width", "32", "--context", "64", "--batch-size", "4",
         "--steps", "120", "--vocab-size", "300", "--device", "cpu", "--lr", "0.005", "--lr-matrix", "0.01"]
posix = pytest.mark.skipif(os.name == "nt", reason="torchrun and signals as Linux and macOS have them")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    "A text that is read less than four times, so that there is no dropout."
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("".join(RHYMES * 120), encoding="utf-8")
    return path


def torchrun(n, *arguments):
    "Start a command as `n` processes."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
               "-m", "llm_course", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def log(run):
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def losses(run, key="valid"):
    return [row[key] for row in log(run)]


def same_losses(run, other, key="valid"):
    "To 0.2 % at the beginning; rounding errors grow while a model trains, so to 1 % at the end."
    here, there = losses(run, key), losses(other, key)
    assert here[:2] == pytest.approx(there[:2], rel=2e-3)
    assert here == pytest.approx(there, rel=1e-2)


@pytest.fixture(scope="module")
def alone(text):
    "What one process arrives at."
    folder = text.parent / "alone"
    call("train", "--data", text, "--out", folder, *SIZES)
    return folder


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert condition()


def workers_of(process):
    "Process ids of the workers, by rank."
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return sorted(pid for pid, parent in pairs if parent == process.pid)


# --- Several processes --------------------------------------------------------------------------

@posix
def test_two_processes_that_share_weights_arrive_where_one_does(text, alone):
    folder = text.parent / "shared"
    process = torchrun(2, "train", "--data", text, "--out", folder, "--parallel", "fsdp", *SIZES)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("trained ") == 1 and out.count("tokenizer ") == 1 and "Traceback" not in err
    same_losses(folder, alone)
    same_losses(folder, alone, "train")
    assert losses(folder, "tokens") == losses(alone, "tokens")
    assert len(call("chat", folder, "--tokens", 3)) >= 0


@posix
def test_killed_worker_ends_the_others_and_one_process_goes_on(text, alone):
    folder = text.parent / "killed"
    command = ["train", "--data", text, "--out", folder, *SIZES]
    process = torchrun(2, *command)
    wait_for(lambda: len(log(folder)) >= 2, process)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    start = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - start < 60
    said = [line for line in err.splitlines() if line.startswith("llm-course: ")]
    assert len(said) == 1 and "has ended" in said[0] and "Start the same command again" in said[0], err
    reached = log(folder)[-1]["step"]
    assert reached < 120
    output = call(*command)
    assert "tokenizer " not in output and "trained     120 steps" in output
    assert losses(folder, "step") == list(range(10, 121, 10))
    same_losses(folder, alone)


def test_batch_that_can_not_be_shared_is_refused(monkeypatch):
    from llm_course.train import plan
    monkeypatch.setattr(plan, "world_size", lambda: 3)
    made = plan.Plan(plan.PRESETS["tiny"].model, plan.TrainConfig(steps=1), 16, False)
    with pytest.raises(ValueError, match="start 1, 2, 4, 8, 16 of them.*multiple of 3"):
        made.check_share()


# --- Faults -------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from llm_course import cli
import torch, llm_course.pipeline.run
torch.zeros(8) @ torch.zeros(8)
pages = int(open("/proc/self/statm", encoding="ascii").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + int(sys.argv.pop(1)), -1))
cli.app()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_out_of_memory_names_the_number_to_halve_and_the_smaller_batch_goes_on(text):
    folder = text.parent / "memory"
    arguments = ["train", "--data", text, "--out", folder, *SIZES, "--steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    large = ["--batch-size", "4096", "--context", "512"]
    result = subprocess.run([sys.executable, "-c", LIMITED, str(700 << 20), *map(str, arguments), *large],
                            env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    line = result.stderr.splitlines()[-1]
    assert "out of memory" in line and "--batch-size 2048 --accumulate 2" in line
    assert float(re.search(r"needs about ([\d.]+) GB", line)[1]) > 1
    assert "trained     2 steps" in call(*arguments, "--batch-size", 8, "--accumulate", 2)


def test_more_than_there_is_is_refused_before_the_start(monkeypatch):
    import torch

    from llm_course.data.shards import Shards
    from llm_course.train import plan
    row = torch.randint(0, 50, (5000,)).numpy().astype("<u2")
    shards = Shards(None, {"end_id": 0, "vocab_size": 50}, [row])
    monkeypatch.setattr(plan, "device_memory", lambda device: 1_000_000)
    preset = plan.PRESETS["tiny"].with_changes({"n_layers": 1, "d_model": 32, "context_length": 32, "steps": 1})
    with pytest.raises(MemoryError, match="needs about .* GB.*--batch-size 8"):
        plan.make_plan(preset, shards, plan.Machine(compile="off"), torch.device("cpu"))


def test_loss_that_is_no_number_stops_with_the_lengths_of_the_gradient(text):
    folder = text.parent / "infinite"
    output = call("train", "--data", text, "--out", folder, *SIZES, "--lr", "1e30", "--lr-matrix", "1e30", code=2)
    assert "not a finite number" in output and "lengths of the gradient" in output


# --- Processes that do not meet ------------------------------------------------------------------

@pytest.mark.parametrize("given, says", [
    ({"RANK": "1", "WORLD_SIZE": "2"}, "but MASTER_ADDR and MASTER_PORT not"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "but MASTER_PORT not"),
    ({"RANK": "0"}, "but WORLD_SIZE and MASTER_ADDR and MASTER_PORT not"),
    ({"WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "but RANK not"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK must be a number from 0"),
    ({"RANK": "-1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK must be a number from 0"),
    ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK must be a number from 0"),
])
def test_half_of_what_torchrun_says_is_one_clear_sentence(text, monkeypatch, given, says):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    output = call("train", "--data", text, "--out", text.parent / "half", *SIZES, code=2)
    assert says in output and "unset RANK and WORLD_SIZE" in output and output.count("\n") == 1
    assert not (text.parent / "half").exists()


def test_one_process_of_one_works_alone(monkeypatch):
    from llm_course.train.workers import join_group
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_group("cpu") as device:
        assert device.type == "cpu"


def test_others_that_never_come_are_one_clear_sentence(monkeypatch, capsys):
    import socket

    from llm_course.terminal import exit_code
    from llm_course.train.workers import join_group
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError, match=f"process 1 of 2 has not met the others at 127.0.0.1:{port}") as raised:
        with join_group("cpu", minutes=0.02):
            pass
    assert exit_code(raised.value) == 2
    assert f"waits at 127.0.0.1:{port} for the others, at most 0.02 minutes" in capsys.readouterr().err


PROBE = """
import os, sys
import torch.distributed as dist
from llm_course.cli import app, command
from llm_course.train.workers import join_group

@command
def _probe() -> None:
    "Fails in the second process only."
    with join_group("cpu"):
        if os.environ["RANK"] == "1":
            raise ValueError("row 7 of my share is no number")
        dist.barrier()
app(["probe"])
"""


@posix
def test_an_error_in_the_second_process_only_is_shown(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*program, str(tmp_path / "probe.py")], env=environment, capture_output=True, text=True,
                            timeout=90)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("llm-course: process 1: ")]
    assert said == ["llm-course: process 1: row 7 of my share is no number"], result.stderr
