"""The package as a stranger gets it: built, installed into an empty environment, and used there.

The environment is kept in .cache and made again when what it needs has changed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSON = "31_model.attention.ipynb"
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
print(sum(cell.cell_type == "code" for cell in notebook.cells), "cells ran")
"""


def run(*command, **options) -> str:
    "Run a command; returns what it printed, and fails with all that it said."
    options = dict(text=True, encoding="utf-8", capture_output=True) | options
    result = subprocess.run([str(part) for part in command], **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A folder with the source archive, and the wheel that was built from it."
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def bin_folder(built):
    "Where the commands of an environment lie that holds the wheel and what it needs, and no more."
    needs = [(ROOT / name).read_bytes() for name in ("settings.ini", "constraints.txt")]
    key = hashlib.sha256(b"".join(needs) + sys.version.encode()).hexdigest()[:12]
    folder = ROOT / ".cache" / f"wheel-{key}"
    if not (folder / "ready").exists():
        for old in folder.parent.glob("wheel-*"):
            shutil.rmtree(old)
        venv.create(folder, with_pip=True)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    wheel = next(built.glob("*.whl"))
    pip = [commands / "python", "-m", "pip", "--quiet", "install", "-c", ROOT / "constraints.txt"]
    run(*pip, wheel, cwd=built)
    run(*pip, "--force-reinstall", "--no-deps", wheel, cwd=built)
    (folder / "ready").touch()
    return commands


def names(archive: Path) -> list:
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).namelist()
    return [name.split("/", 1)[-1] for name in tarfile.open(archive).getnames()]


def test_archives_hold_the_lessons_and_the_modules(built):
    wheel, source = names(next(built.glob("*.whl"))), names(next(built.glob("*.tar.gz")))
    for path in (ROOT / "nbs").glob("*.ipynb"):
        assert f"llm_course/lessons/{path.name}" in wheel
        assert f"nbs/{path.name}" in source
    package = ROOT / "llm_course"
    files = [*package.rglob("*.py"), *(p for p in package.glob("assets/*") if p.is_file())]
    missing = {f"llm_course/{p.relative_to(package).as_posix()}" for p in files} - set(wheel)
    assert not missing, f"the wheel lacks {sorted(missing)}"
    assert not [name for name in wheel if name.startswith(("tests/", "nbs/", "benchmarks/"))]


def test_the_environment_holds_no_more_than_it_should(bin_folder):
    run(bin_folder / "python", "-m", "pip", "check")
    found = run(bin_folder / "python", "-m", "pip", "list", "--format=freeze").lower()
    extra = [
        name for name in ("nbdev", "pytest", "playwright", "transformers") if f"\n{name}==" in found
    ]
    assert not extra, f"the dev extra leaked in: {extra}"


def test_a_lesson_runs_from_the_wheel(bin_folder, tmp_path):
    where = run(
        bin_folder / "python", "-c", "import llm_course; print(llm_course.__file__)", cwd=tmp_path
    )
    package = Path(where.strip()).parent
    assert ROOT / ".cache" in package.parents
    shutil.copy(package / "lessons" / LESSON, tmp_path)
    out = run(bin_folder / "python", "-c", EXECUTE, LESSON, cwd=tmp_path)
    assert "cells ran" in out
    assert [p.name for p in tmp_path.iterdir()] == [LESSON], "the lesson left files behind"


@pytest.mark.skipif(not (ROOT / "llm_course" / "cli.py").exists(), reason="there is no command yet")
def test_the_command_is_there(bin_folder, tmp_path):
    assert "lab" in run(bin_folder / "llm-course", "--help", cwd=tmp_path)


def obeying(*command) -> list:
    "A command for which read-only means read-only, even if root gives it."
    if os.geteuid() != 0:
        return [*command]
    if shutil.which("setpriv") is None:
        pytest.skip("nothing is read-only for root here")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner", "--", *command]


@pytest.fixture
def sealed(bin_folder):
    "The installation, which nobody may write to while the test runs."
    site = Path(run(bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    places = [site, site / "llm_course", *(p for p in (site / "llm_course").rglob("*"))]
    modes = [(p, p.stat().st_mode) for p in places]
    for path, mode in modes:
        path.chmod(mode & ~0o222)
    yield bin_folder
    for path, mode in reversed(modes):
        path.chmod(mode)


@pytest.mark.skipif(os.name == "nt", reason="Unix's permissions")
def test_a_read_only_installation_works_without_a_home(sealed, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    environment |= {"HOME": "/nonexistent", "LC_ALL": "C", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("LANG", None)

    def call(*words, code=(0,)):
        result = subprocess.run(obeying(sealed / "llm-course", *map(str, words)), cwd=tmp_path, env=environment,
                                capture_output=True, text=True, encoding="utf-8", timeout=300)
        assert result.returncode in code and "Traceback" not in result.stderr, result.stdout + result.stderr
        return result.stdout

    package = Path(call_python(sealed, environment, "import llm_course; print(llm_course.__file__)")).parent
    refused = subprocess.run(obeying(sealed / "python", "-c", f"open({str(package / 'x')!r}, 'w')"), cwd=tmp_path,
                             env=environment, capture_output=True, text=True)
    assert "PermissionError" in refused.stderr, "the installation is not read-only"
    assert "torch" in call("doctor", code=(0, 1))
    assert "copied" in call("lab", "mine", "--no-start") and (tmp_path / "mine" / LESSON).exists()
    (tmp_path / "rhyme.txt").write_text("".join(f"The cat saw {n} mice.\n" for n in range(400)), encoding="utf-8")
    call("build", "--data", "rhyme.txt", "--depth", 1, "--steps", 5, "--out", "run", "--device", "cpu")
    assert (tmp_path / "run" / "report.html").exists()
    out = subprocess.run(obeying(sealed / "python", "-c", EXECUTE, LESSON), cwd=tmp_path / "mine", timeout=300,
                         env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert "cells ran" in out.stdout, out.stderr


def call_python(bin_folder, environment, code):
    "What a line of Python prints there."
    return run(bin_folder / "python", "-c", code, env=environment, cwd="/").strip()
