"""The quick questions of the lessons: one right choice each, and a reason beside every choice."""

import re
from collections import Counter

import pytest

import rules

QUESTION = re.compile(r"^\*\*(.+?)\*\*$((?:\s*<details>.*?</details>)+)", re.M | re.S)
CHOICE = re.compile(r"<details><summary>(.+?)</summary>\n(.+?)\n</details>", re.S)


def questions(lesson) -> list:
    "(question, [(choice, reply)]) of a lesson."
    texts = [cell.source for cell in lesson.cells if cell.kind == "markdown"]
    quiz = [text for text in texts if text.startswith("## Quick questions")]
    return [(q, CHOICE.findall(part)) for text in quiz for q, part in QUESTION.findall(text)]


ASKING = [lesson for lesson in rules.lessons() if questions(lesson)]


def is_right(choice: tuple) -> bool:
    return choice[1].startswith("Right:")


@pytest.mark.parametrize("lesson", ASKING, ids=lambda lesson: lesson.name)
def test_one_choice_is_right_and_each_has_its_reason(lesson):
    for question, choices in questions(lesson):
        assert len(choices) >= 3, question
        assert sum(map(is_right, choices)) == 1, question
        for choice, reply in choices:
            assert re.match(r"(Right|No): \S", reply), f"{question}: {reply}"
            assert len(reply.split()) >= 4, f"{question}: {choice!r} has no reason"


def test_nothing_in_a_quiz_is_lost():
    "What looks like a choice is one."
    for lesson in ASKING:
        text = "".join(cell.source for cell in lesson.cells if cell.kind == "markdown")
        quiz = text[text.index("## Quick questions") :]
        found = sum(len(choices) for _, choices in questions(lesson))
        assert quiz.count("Right: ") + quiz.count("No: ") == found, lesson.name


def test_the_place_of_the_right_choice_gives_nothing_away():
    at = [[*map(is_right, choices)].index(True) for x in ASKING for _, choices in questions(x)]
    assert len(ASKING) > 20
    assert min(Counter(at)[place] for place in range(3)) > len(at) / 6, Counter(at)
