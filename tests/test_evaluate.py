"Is my loss normal? Each mistake is planted in a tiny training and must be found by its own name."
import importlib
import json
import math

import pytest
import torch
from torch import nn

from commands import call
from llm_course.evaluate.loss import (
    bits_per_byte, bootstrap_interval, document_losses, paired_test)
from llm_course.evaluate.yardsticks import (
    YardstickWatch, diagnose_loss, loss_verdict, measure_yardsticks)
from llm_course.model.block import LLAMA
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.train.loop import TrainConfig, train
from llm_course.train.tune import RowBatches

V, T = 12, 32


def chain(n, seed):
    "Tokens of which two tell the next with probability 0.85; and what each costs who knows that."
    g = torch.Generator().manual_seed(0)
    rare = 1 / torch.arange(1, V + 1.0)
    rare /= rare.sum()
    table = torch.multinomial(rare, V * V, replacement=True, generator=g).view(V, V).tolist()
    g = torch.Generator().manual_seed(seed)
    other = torch.multinomial(rare, n, replacement=True, generator=g).tolist()
    sure = (torch.rand(n, generator=g) < 0.85).tolist()
    row, nats = [0, 1], 0.0
    for i in range(2, n):
        told = table[row[-2]][row[-1]]
        row.append(told if sure[i] else other[i])
        nats -= math.log(0.85 * (row[-1] == told) + 0.15 * rare[row[-1]])
    return torch.tensor(row), nats / (n - 2)


TRAIN, VALID = chain(33 * 800, 1)[0], chain(33 * 120, 2)
YARD = measure_yardsticks(TRAIN, VALID[0], V, floor=VALID[1])
ROWS, HELD = TRAIN.view(-1, T + 1), VALID[0].view(-1, T + 1)


class Batches(RowBatches):
    "Batches with a mistake: `spoil` changes tokens and targets."
    spoil = staticmethod(lambda tokens, targets: (tokens, targets))

    def __next__(self):
        return (*self.spoil(*super().__next__()[:2]), None)


class Mistaken(nn.Module):
    "A GPT that gets its tokens through a mistake."
    def __init__(self, change=None, mask=None, style=LLAMA):
        super().__init__()
        torch.manual_seed(0)
        self.gpt = GPT(GPTConfig(V, T, 32, 1, 2, style=style))
        self.change, self.mask = change, mask

    def forward(self, tokens):
        if self.change:
            tokens = self.change(tokens)
        x, rotate = self.gpt.enter(tokens)
        for block in self.gpt.blocks:
            x = block(x, rotate, self.mask)
        return self.gpt.head(self.gpt.norm(x))


def learn(model=None, spoil=None, steps=150, rows=ROWS, **config):
    "The log of a training, and its findings' names."
    batches = Batches(rows)
    batches.spoil = spoil or batches.spoil
    tokens, targets = batches.spoil(HELD[:, :-1], HELD[:, 1:])
    settings = TrainConfig(steps, **{"lr_matrix": None, "precision": "float32", **config})
    progress = train(model or Mistaken(), batches, settings, [(tokens, targets, None)],
                     eval_every=10, watch=None)
    return progress.history, [finding.name for finding in diagnose_loss(progress.history, YARD)]


def test_the_yardsticks_are_in_order_and_the_chain_has_a_floor():
    order = [YARD[name] for name in ("uniform", "unigram", "bigram", "trigram", "floor")]
    assert order == sorted(order, reverse=True) and order[-1] > 0.5
    assert order[0] - order[1] > 0.1 and order[1] - order[2] > 0.1 and order[2] - order[3] > 0.3


def test_a_healthy_training_is_told_nothing():
    said = []
    history, found = learn()
    assert found == [] and history[-1]["valid"] < YARD["bigram"] - 0.1
    watch = YardstickWatch(YARD, said.append)
    for row in history:
        watch(row)
    assert said and all("better now than" in line for line in said)
    assert "Nothing in its losses" in loss_verdict(history, YARD)[-1]


def test_frozen_weights_and_a_tiny_rate_stay_at_ln_v():
    assert learn(lr=1e-9)[1] == ["uniform"]
    model = Mistaken()
    model.gpt.head.weight.detach().zero_()  # as in the course's own style
    model.gpt.head.requires_grad_(False)    # then nothing else moves either
    assert learn(model)[1] == ["uniform"]


def test_targets_of_another_row_stay_at_the_unigram():
    assert learn(spoil=lambda x, y: (x, y.roll(1, dims=0)))[1] == ["unigram"]


def test_targets_that_are_shifted_too_far_stay_at_the_unigram():
    assert learn(spoil=lambda x, y: (x[:, :16], y[:, -16:].flip(0)))[1] == ["unigram"]


def test_inputs_whose_order_is_lost_stay_at_the_unigram():
    g = torch.Generator().manual_seed(0)
    shuffled = lambda tokens: tokens.gather(1, torch.rand(tokens.shape, generator=g).argsort(dim=1))
    assert learn(Mistaken(shuffled, torch.eye(T, dtype=torch.bool)))[1] == ["unigram"]


def test_a_mask_over_all_inputs_stays_at_the_unigram():
    assert learn(Mistaken(torch.zeros_like))[1] == ["unigram"]


def test_a_mask_over_all_other_positions_stays_at_the_bigram():
    for mask in (torch.eye(T, dtype=torch.bool), torch.zeros(T, T, dtype=torch.bool)):
        assert learn(Mistaken(mask=mask))[1] == ["bigram"]


def test_a_mask_that_shows_the_future_goes_below_the_floor():
    history, found = learn(Mistaken(mask=torch.ones(T, T, dtype=torch.bool)), steps=400)
    assert found == ["leak"] and history[-1]["valid"] < 0.9 * YARD["floor"]


def test_inputs_that_are_the_targets_go_below_the_floor():
    history, found = learn(spoil=lambda x, y: (y, y))
    assert found == ["leak"]
    marks = {name: level for name, level in YARD.items() if name != "floor"}
    assert history[-1]["valid"] > 0.1 * marks["trigram"] or \
        [f.name for f in diagnose_loss(history, marks)] == ["copy"]


def test_few_rows_are_learnt_by_heart():
    history, found = learn(rows=ROWS[:24], steps=300)
    assert found == ["memorising"] and history[-1]["train"] < YARD["floor"]


def test_a_rate_that_is_far_too_high_diverges():
    history, found = learn(lr=300.0, clip=None, schedule="constant", steps=60)
    assert found == ["diverged"] and history[-1]["valid"] > YARD["uniform"]


@pytest.mark.parametrize("rows", [[], [{"train": None, "valid": None}], [{"train": 2.0, "valid": None}]])
def test_a_log_that_says_nothing_is_told_nothing(rows):
    assert diagnose_loss(rows, YARD) == diagnose_loss(rows, {}) == []


# --- Numbers that can be trusted, and bad input -------------------------------------------------

class Spelled:
    "Letters a to k as tokens; 11 ends a text."
    end_id = 11

    def encode(self, text):
        return ["abcdefghijk".index(c) for c in text]


def test_long_documents_are_counted_whole_whatever_the_batch():
    texts = ["abcdefghijk" * 9, "a", "", "kk" * 40]
    model = Mistaken()
    read = document_losses(model, Spelled(), texts, T)
    assert read.tokens.tolist() == [100, 2, 1, 81] and read.bytes.tolist() == [99, 1, 0, 80]
    other = document_losses(model, Spelled(), texts, T, batch_size=1)
    assert torch.allclose(read.nats, other.nats, atol=1e-3)


def test_no_text_no_bytes_no_guess_and_unequal_documents():
    with pytest.raises(ValueError, match="no text to judge by"):
        document_losses(Mistaken(), Spelled(), [], T)
    with pytest.raises(ValueError, match="empty text"):
        bits_per_byte(1.0, 3, 0)
    one = torch.ones(1)
    with pytest.raises(ValueError, match="at least two"):
        paired_test(one, one, one)
    assert bootstrap_interval(one, one) == (1, 1)


NOTHING = torch.zeros(0)
EMPTY = {  # a statistic of nothing, and what the message names
    "evaluate.loss.calibration_error": (([],), "guesses"),
    "evaluate.loss.fit_temperature": ((torch.zeros(0, 5), NOTHING.long()), "targets"),
    "evaluate.loss.bootstrap_interval": ((NOTHING, NOTHING), "documents"),
    "evaluate.loss.signal_to_noise": (([[1.0], [2.0]],), "seeds of a recipe"),
    "evaluate.loss.paired_test": ((NOTHING, NOTHING, NOTHING), "documents"),
    "evaluate.scores.wilson_interval": ((0, 0), "cases"),
    "evaluate.scores.bleu_score": (([], []), "texts"),
    "evaluate.scores.chrf_score": ((["a"], [[]]), "references of a text"),
    "evaluate.people.blind_pairs": ((["Ada"], 3, 5), "writers"),
    "evaluate.people.weighted_kappa": (([], []), "marks"),
    "evaluate.people.judge_report": ((NOTHING, NOTHING, NOTHING, NOTHING), "cases"),
    "evaluate.people.expected_best": ((3, 0, 0.5), "questions"),
    "align.judge.raw_agreement": (([], []), "items"),
    "align.judge.cohen_kappa": (([], []), "items"),
    "align.judge.fleiss_kappa": ((torch.tensor([[1, 0], [2, 3]]),), "people for an item"),
    "align.choose.best_of_n_kl": ((0,), "answers"),
    "align.choose.best_of_n_expected": ((torch.zeros(0, 4), torch.zeros(0, 4), 2), "rewards"),
    "align.reward.regression_effects": ((torch.ones(1), {"a": torch.ones(1)}), "values to explain"),
    "align.rl.leave_one_out": ((NOTHING, 1), "rewards"),
    "align.rl.group_advantages": ((NOTHING, 2), "rewards"),
    "evaluate.people.expected_best ": ((0, 5, 0.5), "models"),
    "evaluate.yardsticks.zip_nats": (("", 0), "tokens"),
    "evaluate.compare.judgement_lines": (([],), "models"),
    "align.answers.draw_answers": ((None, None, []), "answers to draw"),
    "align.refuse.refusal_errors": ((None, None, [], [], bool), "requests of a kind"),
    "align.rlhf.evaluate_policy": ((None, None, [], {}), "prompts"),
    "align.masked.masked_variance": ((torch.ones(3), torch.zeros(3) > 0), "variance of 0"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_statistic_of_nothing_is_said_and_never_nan(name):
    module, function = f"llm_course.{name.strip()}".rsplit(".", 1)
    given, what = EMPTY[name]
    with pytest.raises(ValueError, match=what):
        getattr(importlib.import_module(module), function)(*given)


def test_two_models_that_are_alike_on_every_document():
    from llm_course.evaluate.loss import chance_to_see, documents_needed
    same = paired_test(torch.ones(3), torch.ones(3), torch.ones(3))
    assert chance_to_see(0.0, same.error) == pytest.approx(0.05, abs=1e-3)
    assert chance_to_see(0.1, same.error) == 1
    with pytest.raises(ValueError, match="a difference of 0"):
        documents_needed(same, 0.0)


def test_logits_that_are_no_numbers_are_said(tmp_path):
    from llm_course.pipeline.build import load_run
    from llm_course.pipeline.evaluate import judge_model
    loaded = load_run(None, "cpu")
    loaded.model.head.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="is the model broken"):
        judge_model(loaded, ["One day."])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two trainings on one text, and one on another."
    folder = tmp_path_factory.mktemp("runs")
    text = "".join(f"The {a} saw the {b}.\n\n" for a in "cat dog hen".split()
                   for b in "moon mouse ball".split()) * 30
    for name, seed, words in (("a", 0, text), ("b", 1, text), ("c", 0, text.replace("cat", "pig"))):
        data = folder / f"{'other' if name == 'c' else 'rhyme'}.txt"
        data.write_text(words, encoding="utf-8")
        told = call("train", "--data", data, "--tokenizer", "char", "--layers", 1, "--width", 32,
                    "--steps", 50, "--seed", seed, "--out", folder / name, "--device", "cpu")
        assert "yardsticks  uniform" in told and "Its best loss is" in told
        assert "unigram" in told.split("trained  ")[1]  # beside the curve
    return folder


def test_eval_of_two_runs_tests_whether_they_differ(runs):
    out = call("eval", runs / "a", runs / "b", "--device", "cpu", "--out", runs / "out")
    assert "bits per byte: " in out and "p = " in out and "eval.html" in out
    read = json.loads((runs / "out" / "eval.json").read_text(encoding="utf-8"))
    assert len(read["runs"]) == 2 and 0 < read["first_minus_second"]["bits_per_byte"]["p_value"] <= 1
    assert "Do they differ?" in (runs / "out" / "eval.html").read_text(encoding="utf-8")
    same = call("eval", runs / "a", runs / "a", "--device", "cpu", "--out", runs / "out")
    assert "no difference" in same


def test_eval_of_one_run_has_intervals_and_writes_both_files(runs):
    out = call("eval", runs / "a", "--device", "cpu")
    assert " to " in out and "counting" in out and (runs / "a" / "eval.html").exists()
    read = json.loads(call("eval", runs / "a", "--device", "cpu", "--json"))
    assert read["intervals"]["loss"][0] < read["loss"] < read["intervals"]["loss"][1]


def test_eval_says_what_it_cannot_do(runs):
    assert "--data" in call("eval", runs / "a", runs / "c", code=2)
    assert "limit is 0" in call("eval", runs / "a", "--limit", 0, code=2)
    assert "without tasks" in call("eval", runs / "a", "--harness", code=2)
    empty = runs / "empty.txt"
    empty.write_text("", encoding="utf-8")
    assert "text" in call("eval", runs / "a", "--data", empty, code=2)
    assert "no-such" in call("eval", runs / "a", "--tasks", runs / "no-such.jsonl", code=2)
