"A machine with other work: threads that wait spin shortly, everywhere, unless the user chose."

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llm_course

ROOT = Path(__file__).resolve().parent.parent
SHOW = "import os; print({n: os.environ[n] for n in %r if n in os.environ})" % (llm_course.OWN_SPIN,)


def run(code: str, **chosen) -> str:
    "What a fresh process prints, with nothing of the kind set but what is chosen."
    clean = {k: v for k, v in os.environ.items() if k not in (*llm_course.OWN_SPIN, "OMP_NUM_THREADS")}
    environment = {**clean, "PYTHONPATH": str(ROOT), **chosen}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT,
                            capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_package_lets_threads_spin_shortly():
    assert run("import llm_course; " + SHOW) == str(dict(llm_course.SPIN))


@pytest.mark.parametrize("name", llm_course.OWN_SPIN)
def test_a_users_own_choice_wins(name):
    assert run("import llm_course; " + SHOW, **{name: "7"}) == str({name: "7"})


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's runtime shows what it has read")
def test_torch_reads_what_the_package_sets():
    code = "import llm_course.core"
    environment = {k: v for k, v in os.environ.items() if k not in llm_course.OWN_SPIN}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                            text=True)
    assert f"GOMP_SPINCOUNT = '{llm_course.SPIN['GOMP_SPINCOUNT']}'" in result.stderr


@pytest.mark.parametrize("first, late", [("llm_course", False), ("torch", True)])
def test_it_is_known_when_torch_came_first(first, late):
    code = f"import {first}, llm_course; print(llm_course.spin_is_late)"
    assert run(code) == str(late)
    assert run(code, **llm_course.SPIN) == "False"


def test_the_lab_and_its_kernels_inherit_it():
    code = "import llm_course.handout as h, os; os.execv = lambda *a: None; h.importlib.util.find_spec = lambda n: 1; h.open_lab(h.Path('.')); "
    assert run(code + SHOW).endswith(str(dict(llm_course.SPIN)))


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("target", ["lab", "test", "bench"])
def test_make_sets_it(target):
    want = " ".join(f"{k}={v}" for k, v in llm_course.SPIN.items())
    clean = {k: v for k, v in os.environ.items() if k not in llm_course.OWN_SPIN}
    for chosen, there in (({}, True), ({"OMP_WAIT_POLICY": "ACTIVE"}, False)):
        shown = subprocess.run(["make", "-n", target], cwd=ROOT, env={**clean, **chosen},
                               capture_output=True, text=True, check=True).stdout
        assert (want in shown) is there


LATE = """
import io, sys, contextlib, torch
torch.set_num_threads(2)
from llm_course.train.runner import Budget, Job, run_job
class Nothing(Job):
    budget = Budget(steps=30)
    def take_step(self): self.step += 1
said = io.StringIO()
with contextlib.redirect_stderr(said):
    run_job(Nothing()); run_job(Nothing())
print(said.getvalue().count("a trial chose"), torch.get_num_threads() in (1, 2))
"""


def test_where_torch_came_first_a_trial_chooses_and_says_so_once():
    assert run(LATE) == "1 True"
    assert run("import llm_course; " + LATE) == "0 True"       # it was in time
    assert run(LATE, OMP_NUM_THREADS="2") == "0 True"          # the user chose


SCRIPTS = sorted(p for folder in ("benchmarks", "experiments") for p in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_script_imports_the_course_before_torch(path):
    "Or it measures, and computes, with torch's own spin."
    first = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) else [])
        for name in names:
            package = (name or "").split(".")[0]
            first[package] = min(first.get(package, node.lineno), node.lineno)
    assert "torch" not in first or first["llm_course"] < first["torch"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how long a thread waited")
def test_waiting_for_a_core_is_counted():
    "One core for three processes: about two thirds of the time is spent waiting."
    code = """
import os, subprocess, sys, time
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from llm_course.threads import waited_seconds
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
try:
    time.sleep(0.2)
    before, start = waited_seconds(), time.perf_counter()
    while time.perf_counter() < start + 1.0:
        pass
    print((waited_seconds() - before) / (time.perf_counter() - start))
finally:
    for other in others:
        other.kill()
"""
    from llm_course.threads import waited_seconds
    if not waited_seconds():
        pytest.skip("this kernel does not count")
    assert 0.3 < float(run(code)) < 0.95


def test_a_job_shares_the_cores_while_others_want_them_and_only_then(monkeypatch):
    from llm_course import threads
    from llm_course.train import runner
    now, calls, seen = [0.0], [], []

    class Team:
        def __init__(self): calls.append("called")
        def dismiss(self): calls.append("dismissed")

    class Work(runner.Job):
        budget = runner.Budget(steps=30)
        def take_step(self):
            start = threads.time.perf_counter()
            while threads.time.perf_counter() < start + 1e-3:
                pass
            self.step += 1
            now[0] += 1.0 if 10 <= self.step < 20 else 0.0  # much more than the step itself
            seen.append(self.pace.team is not None)

    monkeypatch.setattr(threads, "IdleTeam", Team)
    pace = lambda: threads.StepPace(active=False, waited=lambda: now[0])
    monkeypatch.setattr(runner, "StepPace", pace)
    runner.run_job(Work())
    assert calls == ["called", "dismissed"]
    assert not any(seen[:11]) and all(seen[11:20]) and not any(seen[21:])
    calls.clear()
    Work.budget = runner.Budget(steps=15)  # it ends while others want the cores
    now[0] = 0.0
    runner.run_job(Work())
    assert calls == ["called", "dismissed"]
