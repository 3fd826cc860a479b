"""Searches that are killed, interrupted, misused or short of memory."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from llm_course.evolve.population import population_loss
from llm_course.evolve.runs import SEARCH_FILE, ScoreError, Strategy, evolve, score_one_by_one
from llm_course.evolve.search import GA, HillClimb, RandomSearch
from llm_course.evolve.vectors import dense_candidates, each_loss, flatten_model, parameter_shapes
from llm_course.evolve.stack import LowRank, ModelStack, draw_low_rank
from llm_course.evolve.cma import CMAES
from llm_course.evolve.strategies import ES
from llm_course.model.block import COURSE, GPT2, LLAMA, Style
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.train.checkpoint import read_checkpoint, write_checkpoint

KINDS = [RandomSearch, HillClimb, GA]


def sphere(candidates):
    return -(dense_candidates(candidates) - 1).square().sum(dim=1)


def same_state(a, b):
    (tensors, facts), (others, more) = a.state_dict(), b.state_dict()
    return facts == more and all(torch.equal(tensors[k], others[k]) for k in tensors)


class Low(Strategy):
    "A search whose candidates are low-rank."

    def propose(self, generator):
        return draw_low_rank(self.mean, ((2, 5),), self.population, 0.1, generator=generator)

    def learn(self, scores):
        self.memory["mean"] = dense_candidates(self.candidates[int(scores.argmax()) :])[0]


@pytest.mark.parametrize("kind", [*KINDS, Low])
def test_resumes_bit_for_bit(kind, tmp_path):
    whole, first, second = [kind(torch.zeros(10), 12) for _ in range(3)]
    rows = evolve(whole, sphere, generations=25)
    evolve(first, sphere, generations=9, folder=tmp_path)
    rest = evolve(second, sphere, generations=25, folder=tmp_path)
    assert same_state(whole, second)
    assert rest.column("best") == rows.column("best")
    assert rest.column("seconds") == sorted(rest.column("seconds"))


@pytest.mark.parametrize("kind", [*KINDS, ES, CMAES])
def test_what_is_loaded_lies_in_own_memory(kind):
    "A sum rounds by where its numbers lie: in a file at odd places, in a tensor of torch never."

    def misplaced(tensor):
        size = tensor.numel() * tensor.element_size()
        place = torch.empty(size + 8, dtype=torch.uint8)[8:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor) if size else tensor

    whole, search = kind(torch.zeros(10), population=12), kind(torch.zeros(10), population=12)
    for _ in range(5):
        whole.tell(sphere(whole.ask()))
    tensors, facts = whole.state_dict()
    search.load_state_dict({name: misplaced(t) for name, t in tensors.items()}, facts)
    for _ in range(20):
        whole.tell(sphere(whole.ask()))
        search.tell(sphere(search.ask()))
    assert all(t.data_ptr() % 64 == 0 for t in search.memory.values() if t.numel())
    assert same_state(whole, search)
    own = {t.data_ptr() for t in search.memory.values() if t.numel()}
    assert not own & {t.data_ptr() for t in tensors.values()}, "nothing is shared with the file"


KILLED = """
import sys, time, torch
from llm_course.evolve.runs import evolve
from llm_course.evolve.search import GA
def score(candidates, generation):
    print(generation, flush=True)
    time.sleep(0.01)
    return -(candidates - generation / 50).square().sum(dim=1)
search = GA(torch.zeros(30), 12, seed=3)
evolve(search, score, generations=60, folder=sys.argv[1], save_every=1)
torch.save(search.state_dict(), sys.argv[2])
"""


def test_a_killed_search_ends_like_one_that_was_not(tmp_path):
    def start(name):
        command = [sys.executable, "-c", KILLED, str(tmp_path / name), str(tmp_path / f"{name}.pt")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    assert len(start("whole").communicate()[0].split()) == 60
    for generation in (5, 25):
        process = start("killed")
        while process.stdout.readline() != f"{generation}\n":
            assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.communicate()
    assert len(start("killed").communicate()[0].split()) < 40, "it went on, not from the start"
    (a, facts), (b, more) = [torch.load(tmp_path / f"{n}.pt") for n in ("whole", "killed")]
    assert facts == more and all(torch.equal(a[k], b[k]) for k in a)


def test_other_settings_are_refused(tmp_path):
    evolve(GA(torch.zeros(5), 8), sphere, generations=2, folder=tmp_path)
    with pytest.raises(ValueError, match="other settings: seed was 0 and is 1, scale was 0.05 and is 1.0"):
        evolve(GA(torch.zeros(5), 8, scale=1.0, seed=1), sphere, generations=4, folder=tmp_path)
    with pytest.raises(ValueError, match="kind"):
        evolve(HillClimb(torch.zeros(5), 8), sphere, generations=4, folder=tmp_path)


def test_a_folder_without_settings_at_the_top_is_continued(tmp_path):
    "As searches were saved before they had the runner of the course."
    whole, first, second = [GA(torch.zeros(5), 8) for _ in range(3)]
    rows = evolve(whole, sphere, generations=6)
    history = evolve(first, sphere, generations=3)
    tensors, facts = first.state_dict()
    write_checkpoint(
        tmp_path / SEARCH_FILE, tensors, {"search": facts, "history": history, "chunk": None}
    )
    rest = evolve(second, sphere, generations=6, folder=tmp_path)
    assert same_state(whole, second) and rest.column("best") == rows.column("best")
    write_checkpoint(
        tmp_path / SEARCH_FILE, tensors, {"search": facts, "history": history, "chunk": None}
    )
    with pytest.raises(ValueError, match="other settings: seed"):
        evolve(GA(torch.zeros(5), 8, seed=1), sphere, generations=6, folder=tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    evolve(GA(torch.zeros(5), 8), sphere, generations=2, folder=tmp_path)
    data = (tmp_path / SEARCH_FILE).read_bytes()
    (tmp_path / SEARCH_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged"):
        evolve(GA(torch.zeros(5), 8), sphere, generations=4, folder=tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_worst_and_counted(kind):
    def score(candidates):
        scores = sphere(candidates)
        scores[::3] = math.nan
        return scores

    search = kind(torch.zeros(5), 9)
    rows = evolve(search, score, generations=10)
    assert search.facts["nans"] == rows[-1]["nans"] == 30
    assert math.isfinite(search.best[1]) and search.best[0].isfinite().all()
    nothing = kind(torch.zeros(5), 9)
    rows = evolve(nothing, lambda c: torch.full((len(c),), math.nan), generations=3)
    assert nothing.best[1] == -math.inf and rows[-1]["best"] == -math.inf
    assert nothing.mean.isfinite().all()


@pytest.mark.parametrize("kind", [*KINDS, Low])
@pytest.mark.parametrize("chunk", ["auto", 4, 1])
def test_a_failing_score_names_who_failed(kind, chunk, tmp_path):
    seen = {}

    def score(candidates, generation):
        if generation == 3:
            for i, vector in enumerate(dense_candidates(candidates)):
                if torch.equal(vector, seen["bad"]):
                    raise KeyError("lost")
        return sphere(candidates)

    def note(strategy, _):
        if strategy.generation == 3:
            seen["bad"] = strategy.replay(3, 7)

    search = kind(torch.zeros(10), 9, seed=5)
    with pytest.raises(ScoreError, match="individual 7 of generation 3 .seed 5.: KeyError") as got:
        evolve(search, score, generations=9, chunk=chunk, watch=note, folder=tmp_path)
    error = got.value
    assert (error.generation, error.index, error.seed) == (3, 7, 5)
    assert torch.equal(search.replay(3, 7), seen["bad"])
    tensors, facts = read_checkpoint(tmp_path / SEARCH_FILE)  # another day, another process
    later = kind(torch.zeros(10), 9, seed=5)
    later.load_state_dict(tensors, facts["search"])
    assert torch.equal(later.replay(3, 7), seen["bad"])
    evolve(search, sphere, generations=9)  # the search itself is as good as before
    assert search.generation == 9


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
@pytest.mark.parametrize("kind", [GA, Low])
def test_chunks_shrink_until_they_fit(kind, error, tmp_path):
    sizes = []

    def score(candidates):
        sizes.append(len(dense_candidates(candidates)))
        if sizes[-1] > 5:
            raise error
        return sphere(candidates)

    whole, chunked = kind(torch.zeros(10), 20), kind(torch.zeros(10), 20)
    evolve(whole, sphere, generations=6)
    evolve(chunked, score, generations=3, folder=tmp_path)
    assert sizes[:3] == [20, 10, 5] and max(sizes[2:]) == 5
    sizes.clear()
    evolve(chunked := kind(torch.zeros(10), 20), score, generations=6, folder=tmp_path)
    assert max(sizes) == 5, "the chunk that fits is remembered"
    assert same_state(whole, chunked)


def test_one_that_does_not_fit_alone_is_an_error():
    def score(candidates):
        raise MemoryError

    with pytest.raises(ScoreError, match="individual 0 of generation 0.*MemoryError"):
        evolve(GA(torch.zeros(5), 8), score, generations=2)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds(kind):
    def run(seed):
        search = kind(torch.zeros(10), 8, seed=seed)
        evolve(search, sphere, generations=8)
        return search

    torch.manual_seed(1)
    a = run(4)
    torch.manual_seed(2)  # the global generator has no say
    assert same_state(a, run(4))
    assert not torch.equal(a.best[0], run(5).best[0])


@pytest.mark.parametrize("kind", KINDS)
def test_misuse(kind):
    search = kind(torch.zeros(5), 6)
    with pytest.raises(RuntimeError, match="without ask"):
        search.tell(torch.zeros(6))
    search.ask()
    with pytest.raises(RuntimeError, match="twice"):
        search.ask()
    for wrong in (torch.zeros(5), torch.zeros(6, 1), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="expected .6,."):
            search.tell(wrong)
    search.tell(torch.zeros(6))
    with pytest.raises(RuntimeError, match="without ask"):
        search.tell(torch.zeros(6))
    with pytest.raises(ValueError, match="generation 1, not 0"):
        search.replay(0, 0)
    with pytest.raises(ValueError, match="at least 1"):
        kind(torch.zeros(5), 0)
    for wrong in (torch.zeros(2, 2), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="one vector"):
            kind(wrong)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="budget.*none of them"):
        evolve(GA(torch.zeros(5)), sphere)
    for two in ({"generations": 3, "seconds": 1.0}, {"generations": 3, "evaluations": 9}):
        with pytest.raises(ValueError, match="budget as either generations.*got generations=3"):
            evolve(GA(torch.zeros(5)), sphere, **two)
    with pytest.raises(ValueError, match="above 0"):
        evolve(GA(torch.zeros(5)), sphere, evaluations=0)
    with pytest.raises(ScoreError, match="expected a tensor"):
        evolve(GA(torch.zeros(5)), lambda c: 1.0, generations=1)
    for wrong in ({"selection": "luck"}, {"crossover": "both"}):
        with pytest.raises(ValueError, match="luck|both"):
            GA(torch.zeros(5), **wrong).ask()


def test_an_interrupt_saves(tmp_path):
    def score(candidates, generation):
        if generation == 4:
            raise KeyboardInterrupt
        return sphere(candidates)

    with pytest.raises(KeyboardInterrupt):
        evolve(GA(torch.zeros(5), 8), score, generations=9, folder=tmp_path, save_every=100)
    search, whole = GA(torch.zeros(5), 8), GA(torch.zeros(5), 8)
    assert len(evolve(search, sphere, generations=9, folder=tmp_path)) == 9
    evolve(whole, sphere, generations=9)
    assert same_state(search, whole)


def test_budgets():
    search = GA(torch.zeros(5), 8)
    assert len(evolve(search, sphere, evaluations=30)) == 4
    assert len(evolve(search, sphere, generations=6)) == 2, "counted from the search's beginning"
    begun = time.perf_counter()
    evolve(GA(torch.zeros(5), 8), sphere, seconds=0.2)
    assert time.perf_counter() - begun < 5


def test_progress_goes_to_stderr(capsys):
    evolve(GA(torch.zeros(5), 8), sphere, generations=5, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "best" in err and "mean" in err and "evaluations/s" in err


def test_flatten_makes_views():
    model = GPT(GPTConfig(11, 8, 8, 1, 2, style=GPT2))
    tokens = torch.arange(8)[None]
    before = model(tokens)
    vector = flatten_model(model)
    assert torch.equal(model(tokens), before)
    assert len(vector) == sum(p.numel() for p in model.parameters())
    first = vector.data_ptr()
    size = vector.element_size() * len(vector)
    assert all(first <= p.data_ptr() < first + size for p in model.parameters())
    vector.zero_()
    assert all((p == 0).all() for p in model.parameters())
    with torch.no_grad():
        model.embed.weight.fill_(2.0)
    assert (vector[: model.embed.weight.numel()] == 2).all()
    assert torch.equal(model.head.weight, model.embed.weight), "tied weights stay tied"
    with pytest.raises(ValueError, match="one dtype"):
        flatten_model(torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).double()]))


STYLES = [
    COURSE,
    GPT2,
    LLAMA,
    Style(position="sinusoidal", qk_norm=True),
    Style(norm="layer", position="learned", bias=True, shift=True),
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("population", [1, 3, 20])
def test_all_ways_agree(style, threads, population):
    g = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(17, 16, 16, 2, 4, n_kv_heads=2, style=style))
    vector = flatten_model(model)
    crowd = draw_low_rank(vector, tuple(parameter_shapes(model).values()), population, 0.3, 2, g)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for rows, length in ((1, 4), (30, 16), (70, 16)):  # shared products, chunks, a loop
            tokens = torch.randint(17, (2, rows, length), generator=g)
            want = each_loss(model, crowd, *tokens)
            assert torch.allclose(population_loss(model, crowd, *tokens), want, atol=1e-4)
            assert torch.allclose(population_loss(model, dense_candidates(crowd), *tokens), want, atol=1e-4)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(flatten_model(model), vector), "the model itself is left alone"


def test_what_cannot_be_stacked_is_looped():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.randn(7))

        def forward(self, tokens):
            return torch.nn.functional.one_hot(tokens, 7) + self.shift

    model, tokens = Odd(), torch.arange(6).view(2, 3)
    with pytest.raises(TypeError, match="Odd"):
        ModelStack(model)
    crowd = torch.randn(5, 7)
    got = population_loss(model, crowd, tokens, tokens)
    assert torch.allclose(got, population_loss(model, crowd, tokens, tokens, how="vmap"))
    with pytest.raises(TypeError, match="auto"):
        population_loss(model, crowd, tokens, tokens, how="stack")


def test_low_rank_is_what_it_says():
    low = draw_low_rank(torch.zeros(26), ((4, 5), (6,)), 3000, 0.5, 2, torch.Generator().manual_seed(0))
    every = dense_candidates(low)
    assert isinstance(low, LowRank) and every.shape == (3000, 26)
    assert torch.allclose(every.std(dim=0), torch.full((26,), 0.5), atol=0.05)
    ranks = torch.linalg.matrix_rank(every[:9, :20].view(9, 4, 5))
    assert (ranks == 2).all()


def test_one_by_one():
    seen = []

    def score(vector, generation):
        seen.append(generation)
        return -vector.square().sum()

    search = GA(torch.ones(3), 5)
    evolve(search, score_one_by_one(score), generations=2)
    assert seen == [0] * 5 + [1] * 5
    json.dumps(search.state_dict()[1])
