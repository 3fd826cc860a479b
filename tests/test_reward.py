"Reward models at their edges: judging with kills, odd comparisons, resumed training, odd files."
import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from copy import deepcopy

import pytest
import torch

from llm_course.align.answers import PairBatches, encode_pairs
from llm_course.align.chat import add_chat_tokens, load_assistant, render_answer
from llm_course.align.judge import cohen_kappa, collect_pairs, compare_answers, fleiss_kappa
from llm_course.align.panel import (
    Judge, Judgement, append_json_line, judge_panel, read_judgements, self_agreement)
from llm_course.align.reward import reward_function, reward_margins, train_reward
from llm_course.align.reward_model import RewardModel, load_reward, save_reward
from llm_course.world.writers import say
from llm_course.core import asset
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.model.block import GPT2
from llm_course.tokens.rows import pad_batch
from llm_course.world.talk import Annotator, AnswerPair, Talk, make_annotators, crowd_prefers
from llm_course.tokens.exchange import load_tokenizer

PROMPTS = ["What does Ada do?", say("Hello!", "Good day.", "And who is <b>Bob</b>?")]
ANSWERS = [("Ada bakes.", "No."), ("A <i>friend</i>.", "")]
Plain = namedtuple("Plain", "messages chosen rejected")


@pytest.fixture(scope="module")
def tokenizer():
    return add_chat_tokens(load_tokenizer(asset("story.bpe")))[0]


@pytest.fixture
def small(tokenizer):
    "A reward model with random weights and a short context."
    torch.manual_seed(0)
    body = GPT(GPTConfig(tokenizer.vocab_size, 40, d_model=32, n_layers=2, n_heads=2))
    with torch.no_grad():
        for weight in body.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape))
    return RewardModel(body, tokenizer.special_tokens["<|assistant|>"])


def pairs(n=12):
    return [Plain(say(f"Who is {i}?"), f"It is Ada {i}.", "Who cares?") for i in range(n)]


# --- The judge ----------------------------------------------------------------------------------


def press(panel, *names):
    for name in names:
        panel.buttons[name].click()


def test_buttons_write_and_the_end_is_said(tmp_path):
    path = tmp_path / "new" / "mine.jsonl"
    panel = judge_panel(Judge(PROMPTS, ANSWERS, path))
    assert panel.buttons["undo"].disabled and not panel.buttons["left"].disabled
    press(panel, "left", "right")
    assert [j.choice for j in read_judgements(path)] == ["left", "right"]
    assert "All questions" in panel.children[0].value
    assert panel.buttons["left"].disabled and not panel.buttons["undo"].disabled
    assert "2 decisions in mine.jsonl, 0 questions" in panel.children[2].value


def test_undo_takes_back_one_by_one_and_erases_nothing(tmp_path):
    path = tmp_path / "mine.jsonl"
    panel = judge_panel(Judge(PROMPTS, ANSWERS, path))
    press(panel, "left", "skip", "undo", "undo", "undo")
    assert read_judgements(path) == [] and len(path.read_text(encoding="utf-8").splitlines()) == 4
    press(panel, "right")
    assert [j.choice for j in read_judgements(path)] == ["right"]


def test_what_people_write_stays_text(tmp_path):
    judge = Judge(PROMPTS[1:], ANSWERS[1:], tmp_path / "mine.jsonl")
    shown = judge_panel(judge).children[0].value
    assert "&lt;b&gt;Bob" in shown and "&lt;i&gt;friend" in shown and "(nothing)" in shown


def test_a_new_judge_goes_on_and_asks_the_same_way(tmp_path):
    path = tmp_path / "mine.jsonl"
    prompts, answers = [f"Question {i}?" for i in range(9)], [(f"a{i}", f"b{i}") for i in range(9)]
    seen, judge = [], Judge(prompts, answers, path, repeat_every=3)
    while judge.now is not None:
        seen.append(judge.now)
        judge.choose("left" if judge.now.left.startswith("a") else "right")
        fresh = Judge(prompts, answers, path, repeat_every=3)  # as after a restart
        assert fresh.now == judge.now
    assert len({j.key for j in seen}) == 9 and len(seen) > 9
    same, asked = self_agreement(read_judgements(path))
    assert same == asked == len(seen) - 9
    assert {j.chosen[0] for j in read_judgements(path)} == {"a"}
    assert {j.left[0] for j in seen} == {"a", "b"}  # sides are mixed
    sides = {}
    for j in seen:
        sides.setdefault(j.key, []).append(j.left[0])
    again = [first == second for first, second in (s for s in sides.values() if len(s) == 2)]
    assert {True, False} == set(again)  # and drawn anew for the second time


def test_a_skipped_question_is_not_asked_again(tmp_path):
    judge = Judge(PROMPTS, ANSWERS, tmp_path / "mine.jsonl", repeat_every=1)
    judge.choose("skip")
    judge.choose("skip")
    assert judge.now is None and self_agreement(judge.done) == (0, 0)


KILLED = """
import sys
from llm_course.align.panel import append_json_line
from llm_course.world.writers import say
i = 0
while True:
    i += 1
    left = "x" * 20000
    append_json_line(sys.argv[1], dict(messages=say(str(i)), left=left, right="no", choice="left"))
    print(i, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_all_that_was_written_survives_a_kill(tmp_path):
    path = tmp_path / "mine.jsonl"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    for _ in range(5):
        told = int(child.stdout.readline())
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    told = max([told, *(int(line) for line in child.stdout.read().split())])
    child.wait()
    assert len(read_judgements(path)) >= told
    judge = Judge(PROMPTS, ANSWERS, path)
    judge.choose("left")
    assert read_judgements(path)[-1].choice == "left"


@pytest.mark.parametrize("size", [1, 30, 60])
def test_every_cut_is_survived(tmp_path, size):
    "A line may be cut off anywhere, even within a letter."
    path = tmp_path / "mine.jsonl"
    whole = Judgement(say("Où?"), "là", "ici", "left")
    append_json_line(path, whole._asdict())
    before = path.read_bytes()
    path.write_bytes(before + before[:size])
    assert read_judgements(path) == [whole]
    append_json_line(path, whole._asdict())
    append_json_line(path, {"undo": True})
    assert read_judgements(path) == [whole] and path.read_bytes().startswith(before)


def test_a_last_line_without_its_end_counts(tmp_path):
    "As an editor may leave it."
    path = tmp_path / "mine.jsonl"
    whole = Judgement(say("Hm?"), "a", "b", "right")
    path.write_text(json.dumps(whole._asdict()), encoding="utf-8")
    assert read_judgements(path) == [whole]
    append_json_line(path, whole._asdict())
    assert read_judgements(path) == [whole] * 2


BAD = ['{"messages": [', "[1, 2]", '{"choice": "left"}', "3", "",
       '{"messages": [], "left": "a", "right": "b", "choice": "both"}']  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "mine.jsonl"
    good = json.dumps(Judgement(say("Hm?"), "a", "b", "left")._asdict())
    path.write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="mine.jsonl, line 2"):
        Judge(PROMPTS, ANSWERS, path)
    assert path.read_text(encoding="utf-8") == f"{good}\n{line}\n{good}\n"


def test_as_many_answers_as_prompts(tmp_path):
    with pytest.raises(ValueError):
        Judge(PROMPTS, ANSWERS[:1], tmp_path / "mine.jsonl")


# --- The crowd ----------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_crowd():
    talk, crowd = Talk(), make_annotators(7, seed=3, length=0.2, flattery=0.1, first=0.3)
    for messages in talk.prompts(5, seed=8):
        answers = talk.answers(talk.read(messages), 3, seed=1)
        for pair in compare_answers(talk, messages, answers, crowd, torch.Generator().manual_seed(0)):
            seen = [(talk.reward(messages, a), a) for a in pair[1:3]]
            assert pair.prob == pytest.approx(crowd_prefers(crowd, *seen), abs=1e-5)
            assert pair.chosen != pair.rejected and 0 <= pair.annotator < 7


def test_choices_happen_as_often_as_they_should():
    talk, crowd = Talk(), [Annotator(noise=0.3, first=0.2), Annotator(noise=0.1)]
    messages = talk.prompts(1, seed=0)[0]
    answers, g = ["Certainly, my friend.", "Who cares?"], torch.Generator().manual_seed(0)
    drawn = [compare_answers(talk, messages, answers, crowd, g)[0] for _ in range(1500)]
    share = sum(p.chosen == answers[0] for p in drawn) / 1500
    exact = crowd_prefers(crowd, *[(talk.reward(messages, a), a) for a in answers])
    assert abs(share - exact) < 4 * (exact * (1 - exact) / 1500) ** 0.5
    assert {p.annotator for p in drawn} == {0, 1}


def test_odd_answers_can_be_compared():
    talk = Talk()
    messages = talk.prompts(1, seed=0)[0]
    g = torch.Generator().manual_seed(0)
    assert len(compare_answers(talk, messages, ["", "ö\n" * 9, "<|end|>"], make_annotators(3), g)) == 3
    assert compare_answers(talk, messages, ["a", "a"], make_annotators(3), g) == []


def test_kappa_at_its_edges():
    assert cohen_kappa("aaa", "aaa") == 1.0 and cohen_kappa("ab", "ba") == -1.0
    assert cohen_kappa("aabb", "abab") == 0.0
    assert fleiss_kappa(torch.tensor([[3, 0], [3, 0]])) == 1.0
    assert fleiss_kappa(torch.tensor([[3, 0], [0, 3]])) == 1.0
    with pytest.raises(ValueError):
        cohen_kappa("aa", "a")


def test_cohen_kappa_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(3, (2, 50), generator=g).tolist()
    assert cohen_kappa(a, b) == pytest.approx(metrics.cohen_kappa_score(a, b))


# --- The model ----------------------------------------------------------------------------------


def test_padding_and_company_change_nothing(small, tokenizer):
    with torch.no_grad():
        small.head.weight.normal_()
    rows = [render_answer(tokenizer, say("Hm?"), "Yes. " * n, 40) for n in (1, 4, 9)]
    together = small(pad_batch(rows, -1)[0], torch.tensor([len(row) for row in rows]))
    alone = [small(torch.tensor([row]), torch.tensor([len(row)]))[0] for row in rows]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)


def test_only_the_answer_earns_points(small, tokenizer):
    "The score stays what it was at the start until the answer begins."
    with torch.no_grad():
        small.head.weight.normal_()
    row = torch.tensor([render_answer(tokenizer, say("Who?", "Ada.", "And?"), "Bob.", 40)])
    before = int((row[0] == small.reply_id).nonzero().max()) + 1
    scores = small.every_score(row)[0]
    assert (scores[:before] == -small.mean).all() and (scores[before:] != -small.mean).all()


def test_the_body_is_copied_and_its_words_stay(tokenizer):
    torch.manual_seed(0)
    body = GPT(GPTConfig(tokenizer.vocab_size, 40, d_model=32, n_layers=1, n_heads=2, style=GPT2))
    before = {name: w.clone() for name, w in body.state_dict().items()}
    model = RewardModel(body)
    train_reward(model, tokenizer, pairs(), epochs=2, watch=None)
    assert all(torch.equal(w, before[name]) for name, w in body.state_dict().items())
    assert torch.equal(model.body.embed.weight, body.embed.weight)  # tied with the head, too
    assert not torch.equal(model.body.norm.weight, body.norm.weight)
    assert body.embed.weight.requires_grad


def test_training_learns_an_easy_taste(small, tokenizer):
    progress = train_reward(small, tokenizer, pairs(), epochs=40, valid=pairs(3), watch=None)
    assert progress.best < 0.3 and (reward_margins(small, tokenizer, pairs(15)) > 0).all()


def test_a_killed_training_goes_on_to_the_same_end(small, tokenizer, tmp_path):
    whole, cut = small, deepcopy(small)
    settings = dict(epochs=4, batch_size=6, eval_every=2, watch=None, seed=3)
    train_reward(whole, tokenizer, pairs(), **settings)

    def stop(trainer):
        if trainer.progress.step == 8:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        first = {**settings, "watch": stop}
        train_reward(deepcopy(cut), tokenizer, pairs(), folder=tmp_path, **first)
    train_reward(cut, tokenizer, pairs(), folder=tmp_path, **settings)
    same = [torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters())]
    assert all(same)


def test_other_comparisons_are_not_continued(tokenizer):
    groups = encode_pairs(pairs(), tokenizer, 40).groups
    state = PairBatches(groups).state_dict()
    with pytest.raises(ValueError, match="12 groups"):
        PairBatches(groups[:5]).load_state_dict(state)


def test_another_seed_is_not_continued(small, tokenizer, tmp_path):
    settings = dict(steps=2, batch_size=6, eval_every=2, watch=None, folder=tmp_path)
    train_reward(deepcopy(small), tokenizer, pairs(), **settings)
    with pytest.raises(ValueError, match="seed was 0 and is 5"):
        train_reward(deepcopy(small), tokenizer, pairs(), seed=5, **settings)


def test_one_budget_and_no_other(small, tokenizer):
    with pytest.raises(ValueError, match="give the budget as either .*epochs=2.*minutes=1"):
        train_reward(small, tokenizer, pairs(), epochs=2, minutes=1, watch=None)
    assert train_reward(small, tokenizer, pairs(), steps=3, watch=None).step == 3
    assert train_reward(small, tokenizer, pairs(), minutes=0.01, watch=None).step >= 1


def test_what_is_left_out_is_counted(tokenizer):
    odd = [Plain(say("Hm?"), "Yes.", "Yes."), Plain(say("Hm? " * 50), "Yes.", "No.")]
    found = encode_pairs([*pairs(3), *odd], tokenizer, 40)
    assert (len(found.groups), found.same, found.too_long) == (3, 1, 1)
    empty = encode_pairs([Plain(say("Hm?"), "", "No.")], tokenizer, 40)
    assert len(empty.groups) == 1  # saying nothing is an answer
    with pytest.raises(ValueError, match="1 have two answers that are alike, 1 are longer than 40"):
        encode_pairs(odd, tokenizer, 40)


def test_a_long_conversation_gets_a_score(small, tokenizer):
    reward = reward_function(small, tokenizer)
    scores = reward([say("Hm? " * 100), say("Hm?"), say("Hm?")], ["Yes.", "Yes. " * 100, ""])
    assert scores.shape == (3,) and scores.isfinite().all() and scores.device.type == "cpu"


def test_role_tokens_in_an_answer_stay_text(small, tokenizer):
    with torch.no_grad():
        small.head.weight.normal_()
    pieces = small.token_points(tokenizer, say("Hm?"), "<|assistant|> Yes.")
    assert "".join(text for text, _ in pieces).startswith(" <|assistant|> Yes.")


def test_files(small, tokenizer, tmp_path):
    with torch.no_grad():
        small.head.weight.normal_()
    path = tmp_path / "reward.safetensors"
    state = torch.get_rng_state()
    save_reward(small, path, torch.bfloat16)
    assert load_reward(path).reply_id == small.reply_id  # no number for bfloat16
    save_reward(small, path)
    again = load_reward(path)
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no numbers of yours
    assert not again.training
    assert torch.equal(reward_margins(again, tokenizer, pairs()), reward_margins(small, tokenizer, pairs()))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"):
        load_reward(path)
    with pytest.raises(ValueError, match="holds no reward model"):
        load_reward(asset("story.safetensors"))


def test_the_shipped_model():
    "Near the best that is possible on phrasings nobody trained on, and deaf to cheap tricks."
    talk, (assistant, tokenizer) = Talk(), load_assistant()
    model = load_reward(asset("reward.safetensors"))
    held = talk.pairs(400, seed=77, split="held-out")
    right = (reward_margins(model, tokenizer, held) > 0).float().mean().item()
    best = sum(max(p.prob, 1 - p.prob) for p in held) / len(held)
    assert right / best > 0.9
    reward = reward_function(model, tokenizer)
    asked = [m for m in talk.prompts(60, seed=5, split="held-out") if len(m) == 1][:30]
    ideal = [talk.ideal(talk.read(m)) for m in asked]
    for trick in ("", "Certainly. " * 10, "my friend " * 12, "yes", "You are so wise!"):
        assert (reward(asked, ideal) > reward(asked, [trick] * len(asked))).float().mean() > 0.9
    assert len(collect_pairs(assistant, tokenizer, talk, 4)) <= 4 * 6


def test_any_pair_will_do(small, tokenizer):
    "Judgements, pairs of the crowd and plain tuples train alike."
    mixed = [Judgement(say("Hm?"), "Yes.", "No.", "right"), AnswerPair(say("Ha?"), "Yes.", "No.", 0, 0.7)]
    progress = train_reward(small, tokenizer, [*mixed, *pairs(2)], watch=None)
    assert progress.step == 1
