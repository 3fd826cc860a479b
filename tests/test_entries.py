"""The capstone: an entry is checked from its file, by a process that does not know its making."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from llm_course import entries
from llm_course.model.gpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "llm_course" / "assets"
MINUTES = (1, 5, 15)


def test_our_entries_are_on_the_board():
    "By the command, in a fresh process: all ranked, each better than the one with less time."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llm_course", "board", str(ASSETS)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^ *(\d+) +1 +([\d.]+) +([\d.]+)  the course$", result.stdout, re.M)
    assert [int(minutes) for minutes, _, _ in rows] == list(MINUTES), result.stdout
    excess = [float(x) for _, x, _ in rows]
    assert excess == sorted(excess, reverse=True) and excess[1] < 0.02 and excess[2] < 0.01


@pytest.mark.parametrize("minutes", MINUTES)
def test_what_our_entries_claim(minutes):
    facts = entries.read_entry(ASSETS / f"capstone-{minutes}.entry.zip").facts
    assert facts["minutes"] == minutes and 0.9 < facts["used"] <= 1.0
    assert "def course_recipe" in facts["recipe"] and len(facts["log"]) > 30


def archive(**files) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, data in files.items():
            made.writestr(name.replace("__", "."), data)
    return io.BytesIO(buffer.getvalue())


@pytest.mark.parametrize(
    "facts",
    ["", "[]", "3", "{}", '{"hashes": [1]}', '{"hashes": {}, "minutes": "x"}']
    + ['{"hashes": {}, "minutes": 1, "used": NaN, "excess": 1}', "\x00", '{"hashes":' * 50],
)
def test_facts_that_make_no_sense_are_refused(facts):
    with pytest.raises(ValueError):
        entries.read_entry(
            archive(model__safetensors=b"", tokenizer__bpe=b"", entry__json=facts.encode())
        )


def test_archives_that_are_no_entry_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="expected"):
        entries.read_entry(archive(a__txt=b"1"))
    monkeypatch.setattr(entries, "_MOST", 10)
    with pytest.raises(ValueError, match="larger"):
        entries.read_entry(
            archive(model__safetensors=b"x" * 99, tokenizer__bpe=b"", entry__json=b"{}")
        )


def test_a_damaged_model_is_said_on_the_board(tmp_path):
    good = entries.read_entry(ASSETS / "capstone-1.entry.zip")
    spoilt = good._replace(model=good.model[: len(good.model) // 2])
    verdict = entries.judge_entry(spoilt, fresh=5, test=5)
    assert verdict.problem and verdict.excess == float("inf")
    (tmp_path / "x.entry.zip").write_bytes(b"PK")
    assert "no entry" in entries.board_lines(entries.board_verdicts(tmp_path))[1]


def test_a_slow_machine_gets_more_seconds_and_the_same_steps():
    slow, fast = (entries.CpuClock(1, step=s * entries.REFERENCE) for s in (3.0, 0.5))
    assert slow.total == pytest.approx(6 * fast.total) and slow.total == pytest.approx(180)


def test_an_accelerator_is_refused():
    model = GPT(GPTConfig(10, 8, d_model=8, n_layers=1, n_heads=1))
    entries._refuse_accelerator(model)
    with pytest.raises(ValueError, match="accelerator"):
        entries._refuse_accelerator(model.to(torch.device("meta")))


def test_facts_are_json(tmp_path):
    entries._write_facts(tmp_path / "entry.json", {"a": 1})
    assert json.loads((tmp_path / "entry.json").read_text(encoding="utf-8")) == {"a": 1}
