"""Evolution in several processes, and CMA-ES beside its reference.

Real processes, and real kills: the weights must be the same, to the last bit, with one, two and
four processes, under torchrun, and among those that survive a kill; a run that is killed in the
middle goes on where it was.
"""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llm_course.evolve.distributed import Exchange, blocks_of_worker, evolve_together
from llm_course.evolve.population import LowRankNoise
from llm_course.evolve.runs import evolve
from llm_course.evolve.vectors import dense_candidates, flatten_model
from llm_course.evolve.cma import CMAES
from llm_course.evolve.strategies import ES, centred_ranks
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.train.checkpoint import checksum

ROOT = Path(__file__).resolve().parent.parent
POPULATION, GENERATIONS, BLOCK = 32, 12, 4

# What every process runs. `die`: generation in which it kills itself, after its first block.
WORKER = """
    import json, os, signal, sys, time
    import torch
    import torch.distributed as dist
    from llm_course.evolve.population import population_loss
    from llm_course.evolve.vectors import flatten_model
    from llm_course.evolve.distributed import Exchange, evolve_together, torchrun_store
    from llm_course.evolve.strategies import ES
    from llm_course.model.gpt import GPT, GPTConfig
    from llm_course.train.checkpoint import checksum
    from llm_course.train.workers import join_group

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, 16, 8, n_layers=1, n_heads=1))
    es = ES(flatten_model(model), population=32, sigma=0.05, lr=0.03)
    blocks = 0

    def score(candidates, generation):
        global blocks
        blocks += 1
        if generation == die and blocks > 1 + die * 8 // workers:
            os.kill(os.getpid(), signal.SIGKILL)
        g = torch.Generator().manual_seed(generation)
        tokens = torch.randint(20, (2, 17), generator=g)
        return -population_loss(model, candidates, tokens[:, :-1], tokens[:, 1:])

    def report(exchange):
        print(json.dumps({"rank": exchange.rank, "weights": checksum({"mean": es.mean}, ""),
                          "sent": exchange.sent, "blocks": blocks, "absent": es.facts["absent"],
                          "members": exchange.members(12)}), flush=True)
"""
ALONE = """
    rank, workers, port, die = map(int, sys.argv[1:5])
    store = dist.TCPStore("127.0.0.1", port, None, False)
    exchange = Exchange(store, rank, workers, patience=float(sys.argv[5]))
    store.add("ready", 1)
    while store.add("ready", 0) < workers:  # a slow start is no loss
        time.sleep(0.01)
    evolve_together(es, score, exchange, 12, block=4)
    report(exchange)
"""
UNDER_TORCHRUN = """
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    die = int(sys.argv[1]) if rank == 1 and first else -1
    exchange = Exchange(torchrun_store(), rank, workers, patience=60.0)
    if sys.argv[1] == "-1":
        with join_group("cpu"):  # beside a gloo group
            evolve_together(es, score, exchange, 12, block=4)
            dist.barrier()
    else:  # and without any: groups of gloo do not always come back after a restart
        evolve_together(es, score, exchange, 12, block=4)
    report(exchange)
"""


def program(tmp_path, text: str) -> str:
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(WORKER) + textwrap.dedent(text), encoding="utf-8")
    return str(path)


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "LLM_COURSE_DEVICE": "cpu"}


def start(tmp_path, workers: int, store, patience: float = 60, die: dict | None = None) -> list:
    "Start workers by themselves; `die`: rank -> generation."
    path = program(tmp_path, ALONE)
    store.set("ready", "0")
    return [
        subprocess.Popen(
            [
                sys.executable,
                path,
                str(r),
                str(workers),
                str(store.port),
                str((die or {}).get(r, -1)),
                str(patience),
            ],
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment(),
        )
        for r in range(workers)
    ]


def finish(processes: list) -> list:
    "What the workers report; None for those that were killed."
    texts = [p.communicate(timeout=240)[0] for p in processes]
    assert all(p.returncode in (0, -signal.SIGKILL) for p in processes)
    return [json.loads(t) if p.returncode == 0 else None for p, t in zip(processes, texts)]


def new_store():
    "Held by the test, so that it outlives every worker."
    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    "What one process finds."
    store = new_store()
    return finish(start(tmp_path_factory.mktemp("alone"), 1, store))[0]


@pytest.mark.parametrize("workers", [2, 4])
def test_many_processes_are_identical_to_one(tmp_path, alone, workers):
    store = new_store()
    found = finish(start(tmp_path, workers, store))
    assert [f["weights"] for f in found] == [alone["weights"]] * workers
    assert sum(f["blocks"] for f in found) == alone["blocks"] == GENERATIONS * POPULATION // BLOCK
    scores = GENERATIONS * 4 * POPULATION // workers
    for f in found:  # its scores, a checksum, and at most a proposal per generation
        assert scores < f["sent"] <= scores + GENERATIONS * (8 + 40)


def torchrun(tmp_path, n: int, *more: str, die: int = -1) -> list:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), *more, program(tmp_path, UNDER_TORCHRUN), str(die)]
    result = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment(), timeout=300
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(found) for found in re.findall(r"{.*?}", result.stdout)]  # lines may merge


@pytest.mark.skipif(sys.platform == "win32", reason="gloo under torchrun needs POSIX here")
@pytest.mark.parametrize("workers", [2, 4])
def test_torchrun_is_identical_to_one_process(tmp_path, alone, workers):
    found = torchrun(tmp_path, workers)
    assert [f["weights"] for f in found] == [alone["weights"]] * workers


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_torchrun_starts_again_after_a_kill_and_loses_nothing(tmp_path, alone):
    found = torchrun(tmp_path, 2, "--max-restarts", "1", die=5)
    assert [f["weights"] for f in found] == [alone["weights"]] * 2
    assert sum(f["blocks"] for f in found) < alone["blocks"]  # the first half was replayed


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_a_killed_worker_costs_its_share_of_one_generation(tmp_path, alone):
    store = new_store()
    found = finish(start(tmp_path, 4, store, patience=8, die={2: 5}))
    assert found[2] is None
    left = [f for f in found if f]
    assert len({f["weights"] for f in left}) == 1 and left[0]["weights"] != alone["weights"]
    assert [f["absent"] for f in left] == [POPULATION // 4] * 3
    assert [f["members"] for f in left] == [[0, 1, 3]] * 3
    again = first_strategy()  # the record is enough to make all steps again
    evolve_together(again, forbidden, Exchange(store, 0, 4), GENERATIONS, BLOCK)
    assert checksum({"mean": again.mean}, "") == left[0]["weights"]


def first_strategy() -> ES:
    "As in WORKER."
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, 16, 8, n_layers=1, n_heads=1))
    return ES(flatten_model(model), POPULATION, sigma=0.05, lr=0.03)


def forbidden(candidates, generation):
    raise AssertionError("a replay evaluates nothing")


def bowl(x, generation=0):
    return -(x - 0.5).square().sum(dim=-1)


def test_who_was_left_out_comes_back(tmp_path):
    store = dist.HashStore()
    two = [Exchange(store, rank, 2, patience=0.0) for rank in range(2)]
    first, second = (ES(torch.zeros(20), 8, 0.1, 0.05) for _ in range(2))
    evolve_together(first, bowl, two[0], 3, block=2)
    assert [*two[0].decision(0)] == [[0], [0]]
    assert first.facts["absent"] == 4  # of the first generation; afterwards 0 does it all

    take_part_of_second = ES(torch.zeros(20), 8, 0.1, 0.05)
    evolve_together(take_part_of_second, bowl, two[1], 3, block=2)
    two[1].take_part(take_part_of_second, bowl, block=2)  # asks to be let in
    evolve_together(first, bowl, two[0], 4, block=2)
    assert [*two[0].decision(3)] == [[0], [0, 1]]
    evolve_together(second, bowl, two[1], 4, block=2)
    assert torch.equal(first.mean, second.mean)
    assert two[0].members(4) == [0, 1]


def test_every_individual_has_one_worker():
    for members in ([0], [0, 1], [1, 3, 4], [0, 1, 2, 3, 4, 5]):
        for population, block in [(32, 4), (30, 4), (6, 8), (7, 2)]:
            rows = [s for r in members for s in blocks_of_worker(members, r, population, block)]
            found = sorted(i for s in rows for i in range(s.start, s.stop))
            assert found == list(range(population))


STRATEGIES = {
    "ES": lambda: ES(torch.zeros(12), 16, 0.1, 0.05, seed=3),
    "low rank": lambda: ES(
        torch.zeros(12), 16, 0.1, 0.05, 3, LowRankNoise({"w": (2, 5), "b": (2,)}, rank=2)
    ),
    "CMA-ES": lambda: CMAES(torch.zeros(12), 0.3, seed=3),
    "CMA-ES, diagonal": lambda: CMAES(torch.zeros(12), 0.3, seed=3, diagonal=True),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_resume_bit_for_bit(tmp_path, name):
    whole, first, second = (STRATEGIES[name]() for _ in range(3))
    one = evolve(whole, from_dense, generations=30)
    evolve(first, from_dense, generations=13, folder=tmp_path)
    two = evolve(second, from_dense, generations=30, folder=tmp_path)
    assert torch.equal(whole.mean, second.mean) and torch.equal(whole.best[0], second.best[0])
    assert one.column("mean") == two.column("mean")
    assert torch.equal(whole.replay(30, 5), second.replay(30, 5))
    assert whole.best[1] > bowl(torch.zeros(12))


def from_dense(candidates):
    return bowl(dense_candidates(candidates))


@pytest.mark.parametrize("name", STRATEGIES)
def test_not_a_number_ranks_worst(name):
    def holes(candidates):
        scores = from_dense(candidates)
        return scores.masked_fill(torch.arange(len(scores)) % 3 == 0, math.nan)

    strategy = STRATEGIES[name]()
    evolve(strategy, holes, generations=40)
    assert strategy.mean.isfinite().all() and strategy.facts["nans"] > 0
    assert bowl(strategy.mean) > bowl(torch.zeros(12))


def test_ranks_ignore_what_is_absent_and_share_what_is_equal():
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(6, (20,), generator=g).float()
        present = torch.rand(20, generator=g) < 0.7
        ranks = centred_ranks(scores, present)
        assert ranks[~present].eq(0).all() and abs(ranks.sum()) < 1e-5
        for value in scores[present].unique():
            assert ranks[present & (scores == value)].unique().numel() == 1
        some = ranks[present][scores[present].argsort()]
        assert (some.diff() >= 0).all()


def sphere(x):
    return x.square().sum(dim=-1)


def ellipsoid(x):
    return (x.square() * torch.logspace(0, 6, x.shape[-1], dtype=x.dtype)).sum(dim=-1)


def rosenbrock(x):
    here, after = x[..., :-1], x[..., 1:]
    return (100 * (after - here**2) ** 2 + (1 - here) ** 2).sum(dim=-1)


def our_evaluations(landscape, start: float, seed: int) -> float:
    es = CMAES(torch.full((10,), start, dtype=torch.float64), sigma=0.5, seed=seed)
    while es.best[1] < -1e-8:
        if es.evaluations > 20_000:
            return math.inf  # another valley
        es.tell(-landscape(es.ask()))
    return es.evaluations


def their_evaluations(landscape, start: float, seed: int) -> float:
    import cma

    options = {"seed": seed + 1, "verbose": -9, "ftarget": 1e-8, "maxfevals": 20_000}
    es = cma.CMAEvolutionStrategy([start] * 10, 0.5, options)
    while not es.stop():
        tries = es.ask()
        es.tell(tries, [landscape(torch.tensor(x)).item() for x in tries])
    return es.countevals if es.best.f < 1e-8 else math.inf


@pytest.mark.parametrize("landscape, start", [(sphere, 1.0), (ellipsoid, 1.0), (rosenbrock, 0.0)])
def test_cma_needs_hardly_more_evaluations_than_the_reference(landscape, start):
    pytest.importorskip("cma")
    ours = statistics.median(our_evaluations(landscape, start, seed) for seed in range(10))
    theirs = statistics.median(their_evaluations(landscape, start, seed) for seed in range(10))
    print(f"{landscape.__name__}: ours {ours:.0f}, cma {theirs:.0f}")
    assert ours < 1.5 * theirs
