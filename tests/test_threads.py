"A machine with other work: threads that wait spin shortly, everywhere, unless the user chose."

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
