"""Several processes: `Workers` under every kind of failure, three processes, torchrun, the wire.

The lesson itself shows that each way to share gives the numbers of one process; here is what a
lesson cannot show: what happens when things go wrong, and what the kernel says of the bytes.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llm_course.model.block import COURSE, GPT2, LLAMA
from llm_course.model.gpt import GPT, GPTConfig, count_params
from llm_course.train.activations import parameter_counts
from llm_course.train.cluster import (
    A100, H100, Cluster, ClusterPlan, best_save_interval, bytes_sent, lost_to_failures,
    predicted_mfu, step_times)
from llm_course.core import whole_tensor
from llm_course.train.parallel import distribute_model
from llm_course.train.workers import SENT_SHARE, Workers, load_sharded, save_sharded

ROOT = Path(__file__).resolve().parent.parent
SCALE = 3


def alive(pid: int) -> bool:
    "Is there still a process with this number (and not only its remains)?"
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" not in status.read_text(encoding="utf-8")


def gone(pids: list, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def my_pid():
    return os.getpid()


def helper(x):
    return SCALE * x


def add_up(x):
    y = helper(x) * (dist.get_rank() + 1)
    dist.all_reduce(y)
    print("rank", dist.get_rank())
    return y


@pytest.fixture(scope="module")
def three():
    with Workers(3, seconds=60) as workers:
        yield workers


def test_three_processes_add_up(three, capsys):
    results = three.run(add_up, torch.ones(2))
    assert [r.tolist() for r in results] == [[18.0, 18.0]] * 3
    assert capsys.readouterr().out == "[0] rank 0\n[1] rank 1\n[2] rank 2\n"
    assert three.sent == [{"allreduce": round(4 / 3 * 8)}] * 3


def every_message():
    rank, n = dist.get_rank(), dist.get_world_size()
    x, parts = torch.ones(12), [torch.empty(12) for _ in range(n)]
    dist.broadcast(x, 0)
    dist.all_gather(parts, x)
    dist.reduce_scatter_tensor(torch.empty(4), x)
    if rank == 0:
        dist.send(x, 1)
    elif rank == 1:
        dist.recv(x, 0)


def test_each_kind_of_message_is_counted(three):
    three.run(every_message)
    common = {"broadcast": 32, "allgather": 96, "reducescatter": 32}
    assert three.sent == [{**common, "send": 48}, common, common]


def fail_on_one(x):
    if dist.get_rank() == 1:
        raise ValueError("no good")
    dist.all_reduce(x)


def die_on_one(x):
    if dist.get_rank() == 1:
        sys.stderr.write("these are my last words")
        sys.stderr.flush()
        os._exit(3)
    dist.all_reduce(x)


def hang_on_one(x):
    if dist.get_rank() == 1:
        return None
    dist.all_reduce(x)


def test_failures_are_clear_and_leave_no_process():
    with Workers(2, seconds=60) as workers:
        for function, words in [
            (fail_on_one, ["process 1 of 2", "ValueError: no good", "in fail_on_one", "raise V"]),
            (die_on_one, ["process 1 of 2", "exit code 3", "these are my last words"]),
        ]:
            pids = workers.run(my_pid)
            start = time.monotonic()
            with pytest.raises(RuntimeError) as error:
                workers.run(function, torch.ones(2))
            assert time.monotonic() - start < 30
            for word in words:
                assert word in str(error.value)
            assert gone(pids)
        assert [r.tolist() for r in workers.run(add_up, torch.ones(1))] == [[9.0]] * 2
        pids = workers.run(my_pid)
    assert gone(pids)


def test_a_hang_says_where():
    with Workers(2, seconds=6) as workers:
        pids = workers.run(my_pid)
        with pytest.raises(RuntimeError) as error:
            workers.run(hang_on_one, torch.ones(2))
        assert "process 0 of 2: it has not finished after 6 seconds" in str(error.value)
        assert "dist.all_reduce(x)" in str(error.value)
        assert gone(pids)


def outer(x):
    @torch.no_grad()
    def inner(y):
        return helper(x + y)

    return inner


def make_generator():
    return (i for i in range(3))


def test_what_is_sent_and_what_is_not():
    with Workers(2) as workers:
        assert workers.run(outer(1), 2) == [9, 9]
        assert workers.run(lambda x: x + SCALE, 1) == [4, 4]
        with pytest.raises(TypeError, match="helper or an argument cannot be sent"):
            workers.run(helper, (i for i in range(3)))
        with pytest.raises(RuntimeError, match="the result cannot be sent"):
            workers.run(make_generator)


def script(tmp_path, text: str) -> list:
    "A program without `if __name__ == '__main__'`, as a learner writes it."
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return [sys.executable, str(path)]


ENDLESS = """
    import os, time
    import torch.distributed as dist
    from llm_course.train.workers import Workers

    class Mine:
        pid = os.getpid

    def pid():
        return Mine.pid()

    def wait():
        time.sleep(1000)

    workers = Workers(2, seconds=900)
    print(*workers.run(pid), flush=True)
    workers.run(wait)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_program(tmp_path, number):
    command = script(tmp_path, ENDLESS)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as program:
        pids = [int(word) for word in program.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        time.sleep(0.5)
        program.send_signal(number)
        program.communicate(timeout=30)
    assert gone(pids)


def test_no_process_outlives_a_forgotten_pool(tmp_path):
    text = ENDLESS.replace("workers.run(wait)", "")
    result = subprocess.run(
        script(tmp_path, text), capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert gone([int(word) for word in result.stdout.splitlines()[-1].split()])


def loopback_bytes() -> int:
    "What the kernel has sent over the loopback network so far."
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    fields = next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()
    return int(fields[8])


def send_much():
    dist.all_reduce(torch.ones(4_000_000))


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="needs Linux's counters")
def test_the_kernel_counts_the_same_bytes(three):
    ratios = []
    for _ in range(4):  # others may use this network, too: the least disturbed try counts
        before = loopback_bytes()
        three.run(send_much)
        ratios.append((loopback_bytes() - before) / sum(s["allreduce"] for s in three.sent))
    assert 1.0 <= min(ratios) < 1.1, ratios
    assert three.sent[0]["allreduce"] == round(SENT_SHARE["allreduce"](3) * 16_000_000)


def gradients(config, tokens, how):
    torch.manual_seed(dist.get_rank() if how else 0)  # process 0 has the weights that count
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if how:
        model = distribute_model(model, how)
        tokens = tokens[dist.get_rank() :: dist.get_world_size()]
    model(tokens).square().mean().backward()
    return {name.removeprefix("module."): whole_tensor(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("style", [COURSE, GPT2, LLAMA], ids=["course", "gpt2", "llama"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_three_processes_have_the_gradient_of_one(three, style, how):
    config = GPTConfig(50, 8, 24, 2, 4, style=style)  # 24 and 50 cannot be cut by 3 and 4 evenly
    tokens = torch.randint(50, (6, 8))
    expected = gradients(config, tokens, None)
    for found in three.run(gradients, config, tokens, how):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def round_trip(folder, write, config):
    torch.manual_seed(0 if write else 1)
    model = distribute_model(GPT(config), "fsdp")
    state = model.state_dict()
    (save_sharded if write else load_sharded)(state, folder)
    return {name: whole_tensor(w.detach()) for name, w in model.state_dict().items()}


@pytest.mark.parametrize("writers, readers", [(3, 1), (1, 3), (3, 2), (2, 3)])
def test_checkpoints_cross_numbers_of_processes(three, tmp_path, writers, readers):
    config = GPTConfig(50, 8, 16, 2, 4)  # 16 and 50 cannot be cut by 3 evenly

    def go(n, write):
        if n == 1:
            return [round_trip(tmp_path, write, config)]
        if n == 3:
            return three.run(round_trip, tmp_path, write, config)
        with Workers(n) as workers:
            return workers.run(round_trip, tmp_path, write, config)

    expected = go(writers, True)[0]
    for found in go(readers, False):
        assert all(torch.equal(found[name], w) for name, w in expected.items())
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".safetensors"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_sharded({"a": torch.ones(2, 2)}, tmp_path)
    with pytest.raises(ValueError, match="Missing key.* b"):
        load_sharded({"b": torch.ones(2, 2)}, tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded: .*[Ss]ize"):
        load_sharded({"a": torch.ones(3, 2)}, tmp_path)
    with pytest.raises(FileExistsError, match="new folder"):
        save_sharded({"a": torch.ones(2, 2)}, tmp_path)
    piece = next(tmp_path.iterdir())
    piece.write_bytes(piece.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_sharded({"a": torch.ones(2, 2)}, tmp_path)


TORCHRUN = """
    import torch
    import torch.distributed as dist
    from llm_course.train.parallel import distribute_model
    from llm_course.train.workers import join_group

    with join_group("cpu") as device:
        with join_group("cpu"):  # one that is already there is used
            pass
        model = distribute_model(torch.nn.Linear(4, 4).to(device), "fsdp")
        print("rows", model.weight.to_local().shape[0], "of", model.weight.shape[0], flush=True)
    assert not dist.is_initialized()
"""


def test_torchrun_and_alone(tmp_path):
    program = script(tmp_path, TORCHRUN)[1]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*run, program], capture_output=True, text=True, encoding="utf-8", timeout=180
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rows 2 of 4") == 2
    text = TORCHRUN.replace(".to_local()", "")
    result = subprocess.run(
        script(tmp_path, text), capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    assert result.returncode == 0 and "rows 4 of 4" in result.stdout, result.stderr


def test_the_best_interval_is_the_best():
    tried = [lost_to_failures(m / 100, 1, 50) for m in range(1, 5000)]
    assert min(tried) == pytest.approx(lost_to_failures(best_save_interval(1, 50), 1, 50), rel=1e-4)


@pytest.mark.parametrize("style", [COURSE, GPT2, LLAMA], ids=["course", "gpt2", "llama"])
def test_parameters_are_counted_without_making_the_model(style):
    config = GPTConfig(500, 64, 64, 3, 4, n_kv_heads=2, style=style)
    assert parameter_counts(config).total == pytest.approx(count_params(GPT(config)), rel=0.05)


def test_the_cluster_behaves():
    config = GPTConfig(50_000, 2048, 4096, 32, 32, style=LLAMA)
    alone = ClusterPlan(batch_size=64)
    assert predicted_mfu(config, alone, H100) == pytest.approx(H100.efficiency)
    assert sum(bytes_sent(config, alone).values()) == 0
    assert sum(step_times(config, alone, A100).values()) > sum(
        step_times(config, alone, H100).values()
    )
    inside, across = ClusterPlan(tensor=8, batch_size=64), ClusterPlan(tensor=16, batch_size=64)
    assert predicted_mfu(config, inside, H100) > 1.5 * predicted_mfu(config, across, H100)
    more = [predicted_mfu(config, ClusterPlan(pipeline=8, batch_size=b), H100) for b in (8, 16, 64, 512)]
    assert more == sorted(more)
    uneven = ClusterPlan(data=3, batch_size=4)  # one copy has two texts, and the others wait for it
    assert predicted_mfu(config, uneven, Cluster(inner=1e30)) == pytest.approx(0.59 * 4 / 6)
