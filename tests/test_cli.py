"The commands, called as a person calls them."
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from commands import RHYMES, call
from llm_course import cli, doctor, handout

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(RHYMES) * 12


def start(*arguments, **options):
    "Start a command as a process of its own."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "llm_course", *map(str, arguments)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# --- The program itself -------------------------------------------------------------------------

def test_help_is_quick_and_imports_no_torch():
    program = ("import sys; from typer.testing import CliRunner; from llm_course import cli\n"
               "r = CliRunner().invoke(cli.app, ['--help']); assert r.exit_code == 0, r.output\n"
               "assert all(c in r.output for c in ['lab', 'doctor', 'train', 'build', 'align', 'chat', 'eval'])\n"
               "print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])")
    begin = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr
    assert time.monotonic() - begin < 5


def test_module_runs_as_a_program():
    process = start("--version")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.startswith("llm-course "), err


def test_every_command_explains_its_parameters():
    names = ["lab", "doctor", "train", "build", "align", "chat", "eval"]
    for name in names + ["progress", "grade", "submit", "board", "fetch", "slides"]:
        output = call(name, "--help")
        assert "--help" in output and name in output


# --- lab ----------------------------------------------------------------------------------------

@pytest.fixture
def source(tmp_path, monkeypatch):
    "A course of two lessons that can be brought out in new versions."
    folder = tmp_path / "source"
    folder.mkdir()
    monkeypatch.setattr(handout, "lessons_folder", lambda: folder)

    def publish(**lessons):
        for name, text in lessons.items():
            cell = {"cell_type": "code", "id": name, "metadata": {}, "source": [text]}
            solution = {"cell_type": "code", "id": name + "s", "metadata": {}, "source":
                        ['#| code-summary: "A solution of exercise 1"\n', "answer = 42"]}
            content = {"cells": [cell, solution], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
            (folder / f"{name}.ipynb").write_text(json.dumps(content), encoding="utf-8")
        return folder
    return publish


def lab(folder, *options):
    return call("lab", folder, "--no-start", *options)


def files(folder):
    return {p.name: p.read_text(encoding="utf-8") for p in folder.iterdir() if not p.name.startswith(".")}


def test_lab_copies_then_updates_what_was_not_touched(source, tmp_path):
    source(a="one", b="one")
    mine = tmp_path / "mine"
    assert "2 copied" in lab(mine)
    source(a="two")
    assert "1 brought up to date" in lab(mine)
    assert "two" in files(mine)["a.ipynb"] and "one" in files(mine)["b.ipynb"]
    assert set(files(mine)) == {"a.ipynb", "b.ipynb"}


def test_lab_never_overwrites_what_was_changed(source, tmp_path):
    source(a="one", b="one")
    mine = tmp_path / "mine"
    lab(mine)
    (mine / "a.ipynb").write_text("my work", encoding="utf-8")
    assert "kept as you changed them: a.ipynb" in lab(mine)
    assert set(files(mine)) == {"a.ipynb", "b.ipynb"}
    source(a="two")
    assert "a.new.ipynb" in lab(mine)
    source(a="three")
    assert "a.new2.ipynb" in lab(mine)
    lab(mine)
    found = files(mine)
    assert found["a.ipynb"] == "my work" and set(found) == {"a.ipynb", "a.new.ipynb", "a.new2.ipynb", "b.ipynb"}
    assert "two" in found["a.new.ipynb"] and "three" in found["a.new2.ipynb"]


def test_lab_leaves_strangers_files_and_links_alone(source, tmp_path):
    source(a="one", b="one")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.ipynb").write_text("was here before", encoding="utf-8")
    elsewhere = tmp_path / "elsewhere.ipynb"
    elsewhere.write_text("linked", encoding="utf-8")
    try:
        (mine / "b.ipynb").symlink_to(elsewhere)
    except OSError:
        pytest.skip("this system lets nobody make links")
    lab(mine)
    assert files(mine)["a.ipynb"] == "was here before" and elsewhere.read_text(encoding="utf-8") == "linked"
    assert {"a.new.ipynb", "b.new.ipynb"} <= set(files(mine))


def test_lab_treats_everything_as_changed_when_its_record_is_lost(source, tmp_path):
    source(a="one")
    mine = tmp_path / "mine"
    lab(mine)
    for damaged in [None, "{", "[]", '{"files": 3}']:
        if damaged is None:
            (mine / handout._RECORD).unlink()
        else:
            (mine / handout._RECORD).write_text(damaged, encoding="utf-8")
        source(a=f"after {damaged}")
        before = files(mine)
        lab(mine)
        assert all(files(mine)[name] == text for name, text in before.items())


def test_lab_brings_a_deleted_lesson_back(source, tmp_path):
    source(a="one")
    mine = tmp_path / "mine"
    lab(mine)
    (mine / "a.ipynb").unlink()
    assert "1 copied" in lab(mine) and "one" in files(mine)["a.ipynb"]


def test_lab_without_solutions_and_back(source, tmp_path):
    source(a="one")
    mine = tmp_path / "mine"
    lab(mine, "--no-solutions")
    assert "answer = 42" not in files(mine)["a.ipynb"] and "one" in files(mine)["a.ipynb"]
    lab(mine)
    assert "answer = 42" in files(mine)["a.ipynb"]


def test_lab_refuses_the_originals_and_a_file(source, tmp_path):
    folder = source(a="one")
    before = files(folder)
    assert "originals" in call("lab", folder, "--no-start", code=2)
    assert files(folder) == before
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    assert call("lab", tmp_path / "file", "--no-start", code=2).count("\n") == 1


def test_lab_interrupted_while_it_writes_loses_nothing(source, tmp_path, monkeypatch):
    source(a="one", b="one")
    mine = tmp_path / "mine"
    lab(mine)
    (mine / "b.ipynb").write_text("my work", encoding="utf-8")
    source(a="two", b="two")
    real, calls = handout.hand_out_lesson, []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(handout, "hand_out_lesson", dies)
    call("lab", mine, "--no-start", code=130)
    monkeypatch.setattr(handout, "hand_out_lesson", real)
    assert files(mine)["b.ipynb"] == "my work"
    lab(mine)
    assert set(files(mine)) == {"a.ipynb", "b.ipynb", "b.new.ipynb"}
    assert files(mine)["b.ipynb"] == "my work" and "two" in files(mine)["a.ipynb"]


# --- doctor -------------------------------------------------------------------------------------

def test_doctor_says_what_to_do(monkeypatch):
    sick = doctor.Finding("stomach", "fail", "ate [a bug]", "call a programmer")
    monkeypatch.setattr(doctor, "_EXAMINATIONS", [doctor._examine_python, lambda: sick])
    output = call("doctor", code=1)
    assert "ate [a bug]" in output and "→ call a programmer" in output and "Python" in output


def test_doctor_survives_an_examination_that_breaks(monkeypatch):
    def _examine_luck():
        raise ZeroDivisionError("no luck at all")
    monkeypatch.setattr(doctor, "_EXAMINATIONS", [_examine_luck])
    assert "no luck at all" in call("doctor", code=1)


def test_doctor_examines_this_computer(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code in (0, 1), result.exception
    assert all(word in result.output for word in ["torch", "device", "threads", "network", "disk"])


def test_doctor_refuses_an_accelerator_that_lies(monkeypatch):
    def disagrees(device):
        raise RuntimeError("it does not compute what the CPU computes")
    monkeypatch.setattr(doctor, "check_device", disagrees)
    assert doctor._examine_device()[1] == "fail"


# --- build --------------------------------------------------------------------------------------

@pytest.fixture
def text(tmp_path, monkeypatch):
    "A short text in a folder of its own, which is the working directory."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rhyme.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "rhyme.txt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run, made once."
    folder = tmp_path_factory.mktemp("finished")
    (folder / "rhyme.txt").write_text(TEXT, encoding="utf-8")
    run = folder / "runs" / "rhyme"
    output = call("build", "--data", folder / "rhyme.txt", "--out", run, "--depth", 1, "--steps", 40,
                  "--device", "cpu")
    return run, output


def test_build_makes_everything_that_it_promises(finished):
    run, output = finished
    for name in ["config.json", "stages.json", "tokenizer.bpe", "tokens", "checkpoints", "model.safetensors",
                 "samples.txt", "log.jsonl", "report.html"]:
        assert (run / name).exists(), name
    for word in ["tokens", "parameters", "report.html", "llm-course chat"]:
        assert word in output
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "bits per byte" in page and "rhyme.txt" in page and str(run.parent) not in page.split("chat")[0]


def test_build_again_does_nothing(finished):
    run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != "lock"}
    assert "nothing left to do" in call("build", "--out", run, "--steps", 40)
    after = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != "lock"}
    assert {p.name for p in before if before[p] != after[p]} <= {"config.json"}


def test_build_refuses_other_settings(finished):
    run, _ = finished
    output = call("build", "--out", run, "--depth", 3, "--seed", 7, code=2)
    assert "depth was 1 and is now 3" in output and "seed was 0 and is now 7" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("arguments, says", [
    (["--data", "missing.txt"], "missing.txt"),
    (["--data", "rhyme.txt", "--depth", 0], "depth"),
    (["--data", "rhyme.txt", "--minutes", 1, "--steps", 5], "not both"),
    (["--data", "rhyme.txt", "--tokenizer", "magic"], "magic"),
    (["--data", "rhyme.txt", "--vocab-size", 3], "257"),
    (["--data", "rhyme.txt", "--device", "abacus"], "abacus"),
    (["--data", "empty.txt"], "empty"),
    (["--data", "tiny.txt"], "short"),
    (["--data", "latin.txt"], "latin.txt"),
    (["--data", "table.csv", "--column", "story"], "story"),
])
def test_build_says_in_one_line_what_is_wrong(text, arguments, says):
    (text.parent / "empty.txt").write_text("", encoding="utf-8")
    (text.parent / "tiny.txt").write_text("Too short.", encoding="utf-8")
    (text.parent / "latin.txt").write_bytes("très naïf\n".encode("latin-1") * 100)
    (text.parent / "table.csv").write_text("title,body\na,b\n", encoding="utf-8")
    output = call("build", *arguments, code=2)
    assert says in output and "Traceback" not in output
    assert output.splitlines()[-1].startswith("llm-course: ")


def test_build_may_be_tried_again_after_a_mistake(text):
    (text.parent / "table.csv").write_text("title,body\n" + "a,b c d e\n" * 500, encoding="utf-8")
    call("build", "--data", "table.csv", "--steps", 1, code=2)
    call("build", "--data", "table.csv", "--column", "body", "--depth", 1, "--steps", 3)


def test_build_leaves_a_folder_of_something_else_alone(text):
    mine = text.parent / "project"
    mine.mkdir()
    (mine / "config.json").write_text('{"mine": true}', encoding="utf-8")
    assert "other files" in call("build", "--data", "rhyme.txt", "--out", "project", "--steps", 1, code=2)
    assert files(mine) == {"config.json": '{"mine": true}'}


def test_build_notices_that_the_text_changed_but_not_that_it_is_gone(text):
    options = ["build", "--data", "rhyme.txt", "--depth", 1, "--steps", 3, "--out", "run"]
    call(*options)
    text.write_text(TEXT.replace("cat", "pig"), encoding="utf-8")
    assert "has changed" in call(*options, code=2)
    text.unlink()
    assert "nothing left to do" in call(*options)


def test_build_in_the_story_world_gives_its_two_grades(text):
    call("build", "--data", "world", "--depth", 1, "--steps", 5, "--limit", 300, "--vocab-size", 400,
         "--out", "run")
    page = (text.parent / "run" / "report.html").read_text(encoding="utf-8")
    assert "excess over the floor" in page and "possible stories" in page and "the best that any" in page
    figures = json.loads(call("eval", "run", "--json"))
    assert figures["excess"] > 0 and figures["possible"] == 0


def wait_for(condition, process, seconds=180):
    "Wait until something happens or the process ends."
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    assert condition()


def steps_logged(run):
    path = run / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to whole consoles, not to one process")
def test_interrupted_build_says_how_to_go_on_and_goes_on(text):
    run = text.parent / "runs" / "rhyme"
    options = ["build", "--data", "rhyme.txt", "--depth", 1, "--steps", 400, "--device", "cpu"]
    process = start(*options, cwd=text.parent)
    wait_for(lambda: len(steps_logged(run)) > 3, process)

    second = start(*options, cwd=text.parent)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 2 and f"process {process.pid}" in err

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "llm-course build --out runs/rhyme" in err and "Traceback" not in err
    stopped = max(steps_logged(run))
    assert stopped < 400 and not (run / "model.safetensors").exists() or stopped < 400

    third = start("build", "--out", "runs/rhyme", cwd=text.parent)
    out, err = third.communicate(timeout=120)
    assert third.returncode == 0, err
    finished = max(steps_logged(run)) >= 399 or "no improvement" in out  # a small text, by heart
    assert finished and max(steps_logged(run)) > stopped, out
    assert (run / "report.html").exists()
    assert "tokenizer   " not in out  # the first stages were not done again


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_build_leaves_no_lock_behind(text):
    run = text.parent / "runs" / "rhyme"
    options = ["build", "--data", "rhyme.txt", "--depth", 1, "--steps", 60, "--device", "cpu"]
    process = start(*options, cwd=text.parent)
    wait_for(lambda: (run / "lock").exists(), process)
    process.kill()
    process.communicate()
    call(*options)
    assert (run / "report.html").exists()


# --- train --------------------------------------------------------------------------------------

SMALL = ["--preset", "tiny", "--layers", 1, "--width", 32, "--context", 64, "--batch-size", 8, "--steps", 40,
         "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A finished training, made once."
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rhyme.txt").write_text(TEXT, encoding="utf-8")
    (folder / "my_tracker.py").write_text("rows = []\nlog = rows.append\n\n\ndef broken(row):\n    1 / 0\n",
                                          encoding="utf-8")
    run = folder / "run"
    before = Path.cwd()
    os.chdir(folder)
    try:
        output = call("train", "--data", "rhyme.txt", "--out", run, "--tracker", "my_tracker:log", *SMALL)
        tracked = sys.modules["my_tracker"].rows
    finally:
        os.chdir(before)
    return run, output, tracked


def logged(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_train_explains_every_option():
    program = subprocess.run([sys.executable, "-m", "llm_course", "train", "--help"], capture_output=True, text=True,
                             encoding="utf-8", env={**os.environ, "COLUMNS": "200", "TERM": "dumb"}, cwd=ROOT)
    lines = [line for line in program.stdout.splitlines() if "--" in line]
    assert len(lines) >= 24
    for line in lines:
        words = re.sub(r"--[\w-]+|<\w+>|[│|,]|-h\b", " ", line).split()
        assert len(words) >= 2, line


def test_train_makes_a_run_that_chat_and_eval_take(trained):
    run, output, _ = trained
    assert "trained     40 steps" in output and "llm-course chat" in output and "tokens/s  MFU" in output
    assert "The cat" in call("chat", run, "--tokens", 3, stdin="The cat\n")
    assert json.loads(call("eval", run, "--json"))["loss"] > 0


def test_train_logs_json_and_tells_the_tracker(trained):
    run, output, tracked = trained
    rows = logged(run)
    assert [row["step"] for row in rows] == [10, 20, 30, 40] and rows == tracked
    wanted = {"step", "tokens", "seconds", "train", "valid", "rate", "norm", "tokens_per_second", "mfu", "memory"}
    assert wanted <= set(rows[-1]) and all(row["tokens_per_second"] > 0 and row["mfu"] > 0 for row in rows)


def test_train_again_does_nothing_and_build_goes_on_to_the_report(trained):
    run, _, _ = trained
    rows = logged(run)
    assert "nothing left to do" in call("train", "--out", run)
    assert "nothing left to do" in call("train", "--out", run, *SMALL, "--compile", "off")
    assert logged(run) == rows
    call("build", "--out", run)
    assert "bits per byte" in (run / "report.html").read_text(encoding="utf-8")


def test_train_refuses_other_settings_by_name(trained):
    run, _, _ = trained
    output = call("train", "--out", run, "--width", 64, "--lr", 0.5, "--seed", 3, code=2)
    for words in ["d_model was 32 and is now 64", "lr was None and is now 0.5", "seed was 0 and is now 3"]:
        assert words in output
    assert "preset was 'tiny' and is now 'laptop'" in call("train", "--out", run, "--preset", "laptop", code=2)


@pytest.mark.parametrize("arguments, says", [
    (["--preset", "gpt5"], "gpt2 (one GPU)"),
    (["--preset", "tiny", "--heads", 7], "n_heads=7"),
    (["--batch-size", 0], "batch_size is 0"),
    (["--compile", "perhaps"], "auto on off"),
    (["--parallel", "magic"], "auto ddp fsdp"),
    (["--tracker", "no_such_module:log"], "module:function"),
    (["--minutes", 1, "--steps", 1], "not both"),
])
def test_train_says_in_one_line_what_is_wrong(text, arguments, says):
    output = call("train", "--data", "rhyme.txt", "--out", "run", *arguments, code=2)
    assert says in output and output.count("\n") == 1
    assert not (text.parent / "run" / "stages.json").exists()


def test_train_reports_a_failing_tracker_once_and_goes_on(text, trained):
    (text.parent / "other_tracker.py").write_text("def broken(row):\n    1 / 0\n", encoding="utf-8")
    output = call("train", "--data", "rhyme.txt", "--out", "run", *SMALL, "--tracker", "other_tracker:broken")
    assert output.count("the tracker failed (ZeroDivisionError") == 1 and "trained     40 steps" in output


def test_train_may_choose_sizes_anew_until_there_is_a_plan(text):
    (text.parent / "short.txt").write_text("Too short. " * 8, encoding="utf-8")
    call("train", "--data", "short.txt", "--out", "run", *SMALL, code=2)
    assert "limit was None" in call("train", "--out", "run", "--limit", 3, code=2)
    assert "too short" in call("train", "--data", "short.txt", "--out", "run", "--preset", "gpt2", code=2)


def test_train_takes_ready_shards_with_the_tokenizer_beside_them(text, trained):
    from llm_course.data.shards import write_shards
    from llm_course.tokens.bpe import BPETokenizer
    tokenizer = BPETokenizer.train([TEXT], 300)
    write_shards([TEXT] * 3, tokenizer, text.parent / "shards")
    options = ["train", "--data", "shards", *SMALL]
    assert "none beside the shards" in call(*options, "--out", "mute")
    tokenizer.save(text.parent / "tokenizer.bpe")
    call(*options, "--out", "run")
    assert not (text.parent / "run" / "tokens").exists()
    assert "The cat" in call("chat", "run", "--tokens", 3, stdin="The cat\n")
    assert call("chat", "mute", code=2).count("no tokenizer.bpe") == 1


def test_train_takes_a_tokenizer_from_a_file(text, trained):
    from llm_course.tokens.bpe import BPETokenizer
    from llm_course.tokens.formats import write_ranks
    ranks = {bytes([b]): b for b in range(256)} | {b"The ": 256, b" the": 257}
    write_ranks(ranks, text.parent / "mine.tiktoken")
    output = call("train", "--data", "rhyme.txt", "--out", "run", *SMALL, "--tokenizer", "mine.tiktoken")
    assert "tokenizer   259 tokens" in output
    BPETokenizer.train([TEXT], 280).save(text.parent / "mine.bpe")
    again = call("train", "--data", "rhyme.txt", "--out", "run2", *SMALL, "--tokenizer", "mine.bpe")
    assert "tokenizer   280 tokens" in again


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process could hear")
def test_train_asked_to_end_saves_and_goes_on(text):
    run = text.parent / "run"
    options = ["train", "--data", "rhyme.txt", "--out", "run", *SMALL, "--steps", 400]
    process = start(*options, cwd=text.parent)
    wait_for(lambda: len(steps_logged(run)) > 1, process)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "llm-course train --out run" in err and "Traceback" not in err
    reached = max(steps_logged(run))
    assert reached < 400 and "trained     400 steps" in call("train", "--out", "run")
    assert steps_logged(run) == list(range(10, 401, 10))


# --- chat and eval ------------------------------------------------------------------------------

def test_chat_continues_each_line_of_standard_input(finished):
    run, _ = finished
    lines = "The cat\n/temperature 0\n/tokens 5\nThe hen\n/nonsense\n/temperature hot\n/quit\nnever\n"
    output = call("chat", run, "--seed", 1, "--tokens", 20, "--device", "cpu", stdin=lines)
    assert "The cat" in output and "temperature is 0" in output and "never" not in output
    assert "/reset" in output and "needs a number" in output and "\ufffd" not in output
    assert output == call("chat", run, "--seed", 1, "--tokens", 20, "--device", "cpu", stdin=lines)


def test_chat_takes_any_letters(finished):
    run, _ = finished
    assert "猫 é 🙂" in call("chat", run, "--tokens", 3, stdin="猫 é 🙂\n\n")


def test_eval_gives_figures_for_people_and_for_programs(finished, tmp_path):
    run, _ = finished
    assert "bits per byte" in call("eval", run)
    figures = json.loads(call("eval", run, "--json"))
    assert figures["loss"] > 0 and figures["bytes"] > 100
    other = tmp_path / "greek.txt"
    other.write_text("μῆνιν ἄειδε θεά\n" * 20, encoding="utf-8")
    greek = json.loads(call("eval", run, "--data", other, "--json"))
    assert greek["bits_per_character"] > 1.7 * greek["bits_per_byte"] > figures["bits_per_byte"]


def test_chat_and_eval_say_what_is_missing(tmp_path):
    for name in ["chat", "eval"]:
        output = call(name, tmp_path / "nowhere", code=2)
        assert "nowhere" in output and output.count("\n") == 1


# --- the model that ships -----------------------------------------------------------------------

def excess_of(model, tokenizer, n=200):
    "Loss above the floor on stories that no training has seen."
    from llm_course.train.floor import floor_excess
    from llm_course.world import World
    world = World(seed=0)
    return floor_excess(model, tokenizer, world, world.sample(n, seed=987_654)).excess


def shipped():
    from llm_course.pipeline.build import load_run
    try:
        return load_run(None, "cpu")
    except FileNotFoundError:
        pytest.skip("no model ships with this version")


def test_shipped_model_is_close_to_the_floor_and_writes():
    loaded = shipped()
    assert excess_of(loaded.model, loaded.tokenizer, n=50) < 0.04
    assert len(call("chat", "--tokens", 20, "--seed", 1, "--device", "cpu", stdin="One grey morning,\n")) > 40


@pytest.mark.slow
def test_shipped_model_can_be_made_again(tmp_path):
    from llm_course.model.files import load_model
    from llm_course.tokens.exchange import load_tokenizer
    loaded = shipped()
    subprocess.run([sys.executable, ROOT / "benchmarks" / "world_floor.py", "--seeds", "1", "--save", tmp_path],
                   check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    again = load_model(tmp_path / "story.safetensors"), load_tokenizer(tmp_path / "story.bpe")
    assert excess_of(loaded.model, loaded.tokenizer) < excess_of(*again) + 0.01
