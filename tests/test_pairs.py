"""Preferences in all the forms that people have: read right, or refused by name and line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.align.chat import add_chat_tokens
from llm_course.align.pairs import read_pairs
from llm_course.tokens.text import ByteTokenizer
from llm_course.world.talk import AnswerPair
from llm_course.world.writers import say

ASKED = say("Hi", "Hello.", "Where is Ada?", system="Be kind.")
PLAIN = ASKED[1:]
GOOD, BAD = "In Bridge End.", "Who cares?"


def ends(answer: str) -> list:
    return [{"role": "assistant", "content": answer}]


def transcript(messages: list, answer: str | None = None) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    text = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)
    return f"{text}\n\nAssistant:" + ("" if answer is None else f" {answer}")


def write(tmp_path, *rows) -> str:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def both(make) -> dict:
    return {"chosen": make(GOOD), "rejected": make(BAD)}


FORMS = {
    "messages, texts": ({"prompt": ASKED, **both(str)}, ASKED),
    "messages called so": ({"messages": ASKED, **both(str)}, ASKED),
    "messages, answers alone": ({"prompt": ASKED, **both(ends)}, ASKED),
    "messages, one message": ({"prompt": ASKED, **both(lambda a: ends(a)[0])}, ASKED),
    "messages, whole": ({"prompt": ASKED, **both(lambda a: ASKED + ends(a))}, ASKED),
    "whole alone": (both(lambda a: ASKED + ends(a)), ASKED),
    "first question, whole": ({"prompt": "Hi", **both(lambda a: ASKED + ends(a))}, ASKED),
    "last question, whole": ({"prompt": "Where is Ada?", **both(lambda a: PLAIN + ends(a))}, PLAIN),
    "turns that follow": ({"prompt": "Hi", **both(lambda a: PLAIN[1:] + ends(a))}, PLAIN),
    "prompt without system": ({"prompt": PLAIN, **both(lambda a: ASKED + ends(a))}, ASKED),
    "system beside": ({"prompt": PLAIN, "system": "Be kind.", **both(str)}, ASKED),
    "system beside and inside": (
        {"system": "Be kind.", **both(lambda a: ASKED + ends(a))}, ASKED),
    "HH-RLHF": (both(lambda a: transcript(PLAIN, a)), PLAIN),
    "HH-RLHF with prompt": ({"prompt": transcript(PLAIN), **both(str)}, PLAIN),
    "HH-RLHF, both": (
        {"prompt": transcript(PLAIN), **both(lambda a: transcript(PLAIN, a))}, PLAIN),
    "UltraFeedback": ({"prompt": "Hi", **both(lambda a: PLAIN + ends(a)),
                       "score_chosen": 8.5, "score_rejected": 3}, PLAIN),
    "scores": ({"prompt": PLAIN, "responses": [BAD, GOOD], "scores": [1, 2]}, PLAIN),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_usual_form_of_a_preference_is_read_right(tmp_path, form):
    row, before = FORMS[form]
    found = read_pairs(write(tmp_path, {**row, "source": "me"}))
    assert found.items == [AnswerPair(before, GOOD, BAD)] and not found.notes


def test_labels_of_single_answers_become_pairs(tmp_path):
    rows = [{"prompt": "Hi", "completion": text, "label": label}
            for text, label in (("a", True), ("b", False), ("c", 1), ("d", 0))]
    rows.append({"prompt": "Ho", "completion": "alone", "label": True})
    found = read_pairs(write(tmp_path, *rows))
    assert [(p.chosen, p.rejected) for p in found.items] == [
        ("a", "b"), ("a", "d"), ("c", "b"), ("c", "d")]
    assert len(found.notes) == 1 and "line 5: no answer of the other kind" in found.notes[0]


def test_scores_make_a_pair_for_every_difference(tmp_path):
    row = {"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [1, 3, 3]}
    tie = {"prompt": "Hi", "responses": ["a", "b"], "scores": [2, 2]}
    equal = {"prompt": "Hi", **both(str), "score_chosen": 2, "score_rejected": 2}
    found = read_pairs(write(tmp_path, row, tie, equal))
    assert {(p.chosen, p.rejected) for p in found.items} == {("b", "a"), ("c", "a")}
    assert [n.split("line ")[1] for n in found.notes] == ["2: a tie, left out", "3: a tie, left out"]


REFUSED = {
    "histories differ": ({"chosen": PLAIN + ends(GOOD), "rejected": PLAIN[:1] + ends(BAD)},
                         "answer different"),
    "histories differ under a prompt": (
        {"prompt": "Hi", "chosen": PLAIN + ends(GOOD), "rejected": say("Hi", BAD)},
        "answer different"),
    "transcripts differ": ({"chosen": transcript(PLAIN, GOOD),
                            "rejected": transcript(say("Ho"), BAD)}, "answer different"),
    "systems differ": ({"system": "Be rude.", **both(lambda a: ASKED + ends(a))}, "differ"),
    "prompt elsewhere": ({"prompt": "Ho", **both(lambda a: PLAIN + ends(a))}, "not contain"),
    "prompt is longer": ({"prompt": ASKED, **both(lambda a: say("Hi", a))}, "not contain"),
    "no prompt": (both(str), "answers nothing"),
    "prompt waits for nothing": ({"prompt": say("Hi", "Ho"), **both(str)}, "waits for no answer"),
    "ends with the user": ({"prompt": "Hi", **both(lambda a: say("Hi", "a", a))}, "not end"),
    "one answer": ({"prompt": "Hi", "chosen": GOOD}, "no preference"),
    "a number": ({"prompt": "Hi", "chosen": 1, "rejected": 2}, "list of messages"),
    "lower score": ({"prompt": "Hi", **both(str), "score_chosen": 1, "score_rejected": 2},
                    "lower score"),
    "no number": ({"prompt": "Hi", **both(str), "score_chosen": "8", "score_rejected": 2},
                  "not a number"),
    "NaN": ({"prompt": "Hi", "responses": [GOOD, BAD], "scores": [1, float("nan")]}, "not a number"),
    "fewer scores": ({"prompt": "Hi", "responses": [GOOD, BAD], "scores": [1]}, "same length"),
    "label": ({"prompt": "Hi", "completion": GOOD, "label": "good"}, "true or false"),
    "unknown": ({"instruction": "Hi", "output": GOOD}, "no preference"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_refused_by_name_and_line(tmp_path, kind):
    row, what = REFUSED[kind]
    fine = {"prompt": "Hi", **both(str)}
    with pytest.raises(ValueError, match=f"mine.jsonl, line 2.*{what}"):
        read_pairs(write(tmp_path, fine, row))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "user", "assistant"]), x, max_size=2), max_leaves=5)


@given(st.dictionaries(st.sampled_from(
    ["prompt", "messages", "system", "chosen", "rejected", "responses", "scores", "completion",
     "label", "score_chosen", "score_rejected"]), json_values))
@settings(max_examples=300, deadline=None)
def test_no_line_whatever_is_in_it_ends_in_anything_but_words(tmp_path_factory, row):
    path = write(tmp_path_factory.mktemp("p"), row)
    try:
        read_pairs(path)
    except ValueError as error:
        assert "mine.jsonl, line 1" in str(error)


def test_a_pair_that_is_too_long_is_left_out_and_counted(tmp_path):
    tokenizer, _ = add_chat_tokens(ByteTokenizer())
    rows = [{"prompt": "Hi", **both(str)}, {"prompt": "x" * 99, **both(str)}]
    found = read_pairs(write(tmp_path, *rows), tokenizer, 64)
    assert len(found.items) == 1 and found.notes[0].endswith("line 2: too long, left out")
