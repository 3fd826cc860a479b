"""The story world: what its lesson cannot show in passing."""

import hashlib
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.core import asset
from llm_course.world import World
from llm_course.world.grammar import Grammar, read_grammar, read_lists, read_sections
from llm_course.world.story import STORY_LISTS, STORY_RULES
from llm_course.world.talk import Talk

WORLD = World()
STORIES = WORLD.sample(50, seed=3)


def fingerprint(thing) -> str:
    "A short name for what can be written as JSON."
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:16]


# --- The models that ship have learned this village, and no other one -----------------------------


def test_the_village_is_the_one_that_the_shipped_models_know():
    again = "the village has changed: train the models that ship again (make checkpoint)"
    assert WORLD.floor() == pytest.approx(50.847121283114774, abs=1e-9), again
    assert fingerprint(STORIES) == "eef04d92cffd888d", again
    assert fingerprint(WORLD.facts) == "b851789929903ebf", again


def test_the_talk_is_the_one_that_the_shipped_assistant_knows():
    talk = Talk()
    again = "what people say has changed: train the models that ship again (make checkpoint)"
    assert fingerprint([r.text for r in talk.requests()]) == "8dffca62b508352b", again
    assert fingerprint(talk.conversations(50, seed=3)) == "98d1be6ad0bfad67", again
    pairs = [pair[1:4] for pair in talk.pairs(50, seed=3)]
    assert fingerprint(pairs) == "4c26556582b24ce1", again


# --- Reading copes with any text ------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_any_text_has_a_probability_and_a_diagnosis(text):
    assert WORLD.log_prob(text) == -math.inf
    problem = WORLD.explain(text)
    assert problem.found not in problem.possible
    assert WORLD.prefix_log_prob(text[: problem.position]) > -math.inf


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(STORIES), st.data())
def test_one_wrong_letter_is_found(story, data):
    at = data.draw(st.integers(0, len(story) - 1))
    ahead = WORLD.next_probs(story[:at])
    wrong = data.draw(st.sampled_from([c for c in "qxZ~" if c not in ahead]))
    assert WORLD.explain(story[:at] + wrong + story[at + 1 :]).position == at


def test_a_story_is_possible_in_one_world_only_if_its_facts_are():
    other = World(seed=1)
    possible = [other.explain(story) is None for story in STORIES]
    assert sum(possible) < len(possible) / 2
    assert all(WORLD.explain(story) is None for story in STORIES)


# --- The file -------------------------------------------------------------------------------------


def test_every_rule_is_used_and_every_list_is_drawn_from():
    rules = read_grammar(STORY_RULES)
    text = " ".join(rules.values())
    assert [name for name in rules if name != "story" and f"<{name}>" not in text] == []
    assert [name for name in STORY_LISTS if f"={name}" not in text] == []


def test_a_story_can_be_added():
    "What the lesson promises at its end: a rule, named in `story`."
    more = STORY_RULES.replace("story: [<lost>|", "story: [<nap>|<lost>|")
    more += "\nnap: ^<when>, <intro> slept until <meal>. <closing>\n"
    bigger = Grammar(more, STORY_LISTS, WORLD.facts)
    assert set(bigger.rules) == {*WORLD.rules, "nap"}
    naps = [text for text in bigger.sample(200, seed=1) if " slept until " in text]
    assert naps and all(bigger.explain(text) is None for text in naps)
    assert all(WORLD.explain(text) is not None for text in naps)


@pytest.mark.parametrize("name", ["village.txt", "phrases.txt"])
def test_the_file_is_tidy(name):
    text = asset(name).read_text(encoding="utf-8")
    assert "\t" not in text and text.endswith("\n") and text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    assert len(read_sections(text)) >= 3


def test_sections_and_lists_of_awkward_texts():
    assert read_sections("no section at all") == {}
    assert read_sections("== a\n== b\nx: y\n") == {"a": "", "b": "x: y"}
    assert read_lists("a: one\nb: two,three , 4") == {"a": ["one"], "b": ["two", "three", "4"]}


def test_the_package_imports_nothing_until_it_is_asked():
    names = ["torch", "llm_course.world"]
    code = f"import llm_course, sys; print(*(name in sys.modules for name in {names}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
