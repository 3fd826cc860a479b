"""One runner and one budget for every job: configurations, the clock, and checkpoints by name."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from llm_course.align.chat import add_chat_tokens
from llm_course.align.pair_tuner import PreferenceConfig, train_dpo
from llm_course.align.policy_tuner import PolicyConfig, train_policy
from llm_course.align.reward import train_reward
from llm_course.align.reward_model import RewardModel
from llm_course.align.sft import train_sft
from llm_course.data.batches import RandomWindows
from llm_course.data.shards import memory_shards
from llm_course.evolve.runs import evolve
from llm_course.evolve.search import GA, HillClimb
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.text import ByteTokenizer, CharTokenizer
from llm_course.train.checkpoint import CheckpointFiles, read_checkpoint
from llm_course.train.loop import TrainConfig, train
from llm_course.train.runner import Budget, Job, resume_job, run_job
from llm_course.world.talk import AnswerPair
from llm_course.world.writers import say

BUDGETS = {"Budget": Budget, "TrainConfig": TrainConfig, "PolicyConfig": PolicyConfig}
BUDGETS |= {"PreferenceConfig": PreferenceConfig}


@pytest.mark.parametrize("kind", BUDGETS.values(), ids=BUDGETS)
def test_a_budget_is_exactly_one_number(kind):
    with pytest.raises(ValueError, match="give the budget as either .*none of them"):
        kind()
    with pytest.raises(ValueError, match="give the budget as either .*got .*5"):
        kind(steps=5, minutes=1)
    for wrong in ({"steps": 0}, {"minutes": -1}):
        with pytest.raises(ValueError, match="must be above 0"):
            kind(**wrong)
    assert kind(steps=5).minutes is None and kind(minutes=1).steps is None


def test_a_search_has_one_budget_too():
    for budget in ({}, {"generations": 2, "seconds": 1.0}, {"generations": 2, "evaluations": 16}):
        with pytest.raises(ValueError, match="give the budget as either generations="):
            evolve(GA(torch.zeros(5), 8), sphere, **budget)
    assert len(evolve(GA(torch.zeros(5), 8), sphere, evaluations=16)) == 2


class Count(Job):
    "Counts, slowly if wanted."

    def __init__(self, seed: int = 0, pause: float = 0.0, **budget):
        self.budget, self.seed, self.pause, self.looks = Budget(**budget), seed, pause, []

    def take_step(self):
        time.sleep(self.pause)
        self.step += 1

    def settings(self):
        return {"seed": self.seed}

    def state(self):
        return {}, {"step": self.step, "seconds": self.seconds, "looks": self.looks}

    def load_state(self, tensors, facts):
        self.step, self.seconds, self.looks = facts["step"], facts["seconds"], facts["looks"]

    def evaluate(self):
        self.looks.append(self.step)


def make_training(seed: int = 0):
    torch.manual_seed(0)
    text = "The quick brown fox jumps over the lazy dog. " * 20
    tokenizer = CharTokenizer.train([text])
    model = GPT(GPTConfig(tokenizer.vocab_size, 16, 16, n_layers=1, n_heads=1))
    return model, RandomWindows(memory_shards([text], tokenizer), 2, 16, seed=seed)


def run_training(folder=None, seed=0, **budget):
    model, batches = make_training(seed)
    return train(model, batches, TrainConfig(**budget), folder=folder, eval_every=2, watch=None).step


def run_count(folder=None, seed=0, **budget):
    return run_job(Count(seed, 0.01, **budget), folder, save_every=2).step


def make_chat():
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    return add_chat_tokens(tokenizer, GPT(GPTConfig(tokenizer.vocab_size, 64, 32, 1, 2)))


def run_policy(folder=None, seed=0, **budget):
    tokenizer, model = make_chat()
    settings = {"batch_size": 4, "group": 2, "max_new_tokens": 4, "folder": folder, "seed": seed}
    reward = lambda messages, answers: torch.tensor([float(len(a)) for a in answers])  # noqa: E731
    return len(train_policy(model, tokenizer, [say("Hi")], reward, **settings, **budget))


def run_dpo(folder=None, seed=0, **budget):
    tokenizer, model = make_chat()
    pairs = [AnswerPair(say(f"{n} and {n}?"), "Yes.", "Go away.") for n in range(6)]
    settings = {"batch_size": 2, "folder": folder, "seed": seed}
    return len(train_dpo(model, tokenizer, pairs, **settings, **budget))


def run_sft(folder=None, seed=0, **budget):
    tokenizer, model = make_chat()
    chats = [say(f"{n} and {n}?", "Yes.") for n in range(6)]
    settings = {"batch_size": 2, "folder": folder, "seed": seed, "eval_every": 2, "watch": None}
    return train_sft(model, tokenizer, chats, **settings, **budget).step


def run_reward(folder=None, seed=0, **budget):
    tokenizer, model = make_chat()
    pairs = [AnswerPair(say(f"{n} and {n}?"), "Yes.", "Go away.") for n in range(6)]
    settings = {"batch_size": 2, "folder": folder, "seed": seed, "eval_every": 2, "watch": None}
    return train_reward(RewardModel(model), tokenizer, pairs, **settings, **budget).step


def sphere(candidates):
    return -(candidates - 1).square().sum(dim=1)


def run_evolve(folder=None, seed=0, steps=None, minutes=None):
    "A search counts generations and seconds."
    seconds = None if minutes is None else 60 * minutes
    search = GA(torch.zeros(5), 8, seed=seed)
    return len(evolve(search, sphere, generations=steps, seconds=seconds, folder=folder))


KINDS = {"count": run_count, "train": run_training, "sft": run_sft, "reward": run_reward}
KINDS |= {"policy": run_policy, "dpo": run_dpo}
KINDS["evolve"] = run_evolve


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_minutes_alone_obey_the_clock(kind):
    start = time.perf_counter()
    steps = kind(minutes=1 / 60)
    assert steps > 1 and 0.9 < time.perf_counter() - start < 20


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_checkpoint_names_the_seed_that_differs(kind, tmp_path):
    assert kind(tmp_path, steps=2) == 2
    with pytest.raises(ValueError, match="seed was 0 and is 5"):
        kind(tmp_path, seed=5, steps=2)
    assert kind(tmp_path, steps=2) == 2


def test_looks_and_checkpoints_have_their_cadences(tmp_path):
    saved = []
    job = Count(steps=7)
    run_job(job, tmp_path, "count", keep=9, save_every=2, eval_every=3, watch=saved.append)
    assert job.looks == [3, 6, 7] and len(saved) == 7
    names = [int(path.stem.split("-")[1]) for path in CheckpointFiles(tmp_path, "count", 9).paths()]
    assert names == [2, 4, 6, 7]


def test_a_pause_does_not_count(tmp_path):
    run_job(Count(steps=2, pause=0.1), tmp_path)
    seconds = read_checkpoint(tmp_path / "run.safetensors")[1]["seconds"]
    time.sleep(0.5)
    job = Count(minutes=math.inf, pause=0.01)
    resume_job(job, CheckpointFiles(tmp_path, "run"))
    assert job.seconds == seconds < 0.4
    job.budget = Budget(steps=3)
    assert run_job(job, tmp_path).seconds < seconds + 0.4


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to the whole console")
@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM"])
def test_one_signal_saves_and_says_how_to_go_on(tmp_path, which):
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "run" / "begun").exists():
        time.sleep(0.01)
    process.send_signal(getattr(signal, which))
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert out.count("Stopped after step") == 1 and "same folder" in out
    step = int(out.split("after step ")[1].split(",")[0])
    assert read_checkpoint(tmp_path / "run" / "run.safetensors")[1]["step"] == step


if __name__ == "__main__":
    place = Path(sys.argv[1])
    run_job(
        Count(minutes=1, pause=0.01), place, save_every=10**6,
        watch=lambda job: (place / "begun").touch(),
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="other locks")
@pytest.mark.parametrize("number", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_worked_on_alone(tmp_path, monkeypatch, number, capsys):
    import errno
    import fcntl
    from llm_course.core import folder_lock

    def flock(*_):
        raise OSError(getattr(errno, number), "no locks here")
    monkeypatch.setattr(fcntl, "flock", flock)
    with folder_lock(tmp_path):
        assert "can't be locked" in capsys.readouterr().out
    (tmp_path / "lock").write_text("process 1 on elsewhere\n", encoding="utf-8")
    with pytest.raises(BlockingIOError, match="process 1 on elsewhere"), folder_lock(tmp_path):
        pass


def test_float16_without_a_finite_gradient_is_stopped_and_its_layer_named():
    import torch
    from llm_course.train.precision import LossScale
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight.grad = torch.full((2, 2), float("inf"))
    scale, bad = LossScale(torch.float16), torch.tensor(float("inf"))
    for _ in range(19):
        assert not scale.update(bad, model)
    with pytest.raises(FloatingPointError, match=r"20 float16 steps .* not finite in 1\.weight"):
        scale.update(bad, model)


def test_a_whole_number_that_became_a_fraction_goes_on(tmp_path):
    first, second = (HillClimb(torch.zeros(4), 6, scale=1) for _ in range(2))
    evolve(first, sphere, generations=3, folder=tmp_path)
    assert isinstance(first.facts["scale"], float)
    assert len(evolve(second, sphere, generations=5, folder=tmp_path)) == 5


@pytest.mark.parametrize("kind", ["evaluate", "watch"])
def test_a_failure_in_a_look_or_a_watcher_saves_the_step_first_and_says_where(tmp_path, kind, capsys):
    class Clumsy(Count):
        def evaluate(self):
            super().evaluate()
            if kind == "evaluate" and self.step == 3:
                raise KeyError("a mistake in the look")

    def watch(job):
        if kind == "watch" and job.step == 3:
            raise KeyError("a mistake in the watcher")

    with pytest.raises(KeyError, match="a mistake"):
        run_job(Clumsy(steps=7), tmp_path, save_every=100, eval_every=3, watch=watch)
    said = capsys.readouterr().out
    assert "What came after step 3 failed" in said and str(tmp_path / "run.safetensors") in said
    again = run_job(Count(steps=7), tmp_path, save_every=100, eval_every=3)
    assert again.step == 7 and again.looks == [3, 6, 7]


def test_the_best_is_kept_even_if_its_watcher_fails(tmp_path):
    def clumsy(trainer):
        if trainer.progress.step == 4:
            raise KeyError("a mistake")

    model, batches = make_training()
    valid = [batches.batch(0)]
    whole, whole_batches = make_training()
    train(whole, whole_batches, TrainConfig(steps=8), valid, tmp_path / "whole", 2, watch=None)
    with pytest.raises(KeyError):
        train(model, batches, TrainConfig(steps=8), valid, tmp_path / "run", 2, watch=clumsy)
    best = read_checkpoint(tmp_path / "run" / "best.safetensors")[1]["progress"]
    assert best["step"] == 4 and best["history"][-1]["valid"] == best["best"]
    model, batches = make_training()
    train(model, batches, TrainConfig(steps=8), valid, tmp_path / "run", 2, watch=None)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters()))


def test_numbers_that_are_none_are_not_saved_by_a_look_that_fails(tmp_path):
    class Spoilt(Count):
        def evaluate(self):
            raise FloatingPointError("the loss is not a finite number")

    with pytest.raises(FloatingPointError):
        run_job(Spoilt(steps=7), tmp_path, save_every=3)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_stop_in_a_long_step_is_heard_within_a_second(tmp_path, capsys):
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt, match="Stopped after step 1, saved in"):
        run_job(Count(steps=9, pause=1.6), tmp_path)
    assert capsys.readouterr().err.startswith("Stopping: the step under way is finished first. Ctrl-C again")
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_job(Count(steps=9, pause=0.2), tmp_path)
    assert capsys.readouterr().err == ""  # a short step needs no word
