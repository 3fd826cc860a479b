"""The village talks: what the lesson cannot show in passing."""

import random
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_course.world import World
from llm_course.world.requests import (
    CHAT_MARKS, KEY_PLACES, PHRASES, RECIPES, SECRET_LEAKS, STRANGERS, TrueReward,
    plain_words, refused, says, true_reward)
from llm_course.world.story import QUESTION_FORMS, STORY_LISTS
from llm_course.world.talk import Annotator, Talk, best_accuracy, crowd_prefers, make_annotators
from llm_course.world.writers import best_answer, say

TRAIN, HELD_OUT, SAY = (PHRASES[name] for name in ("train", "held-out", "say"))
TALK = Talk()
EVERY = TALK.requests() + TALK.requests("held-out")
OF_KIND = {r.kind + "." + r.relation: r for r in EVERY}
PHRASES = sorted({text for texts in SAY.values() for text in texts})


# --- The reward copes with any text ---------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(OF_KIND)), st.text(max_size=300))
@example("fact.pet", "")
@example("fact.pet", "\ud800\x00\ufffd")
@example("secret.recipe", "roses" * 50_000)
@example("insult.words", "{a} %s \\n [|] (")
def test_reward_of_any_text(name, text):
    reward = true_reward(OF_KIND[name], text)
    assert all(0 <= part <= 1 for part in reward)
    assert true_reward(OF_KIND[name], text) == reward


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(OF_KIND)), st.lists(st.sampled_from(PHRASES), max_size=6))
def test_reward_of_phrases_in_any_order(name, parts):
    text = " ".join(parts)
    reward = true_reward(OF_KIND[name], text)
    assert 0 <= reward.total <= 1 + 1e-9
    if len(plain_words(text).split()) > 2:  # saying everything twice never helps: it repeats itself
        assert true_reward(OF_KIND[name], f"{text} {text}").total <= reward.total + 1e-9


@pytest.mark.parametrize("garbage", ["", " ", "\n", "...", "a" * 500, "the the the the", "\u2603"])
def test_garbage_is_worth_little(garbage):
    worth = [true_reward(r, garbage).total for r in EVERY[::50]]
    assert max(worth) < 0.25


@pytest.mark.parametrize(
    "everything",
    [
        " ".join(STORY_LISTS["person"]),
        " and ".join(value for f in World().facts.values() for value in f.values()),
        "I do not know. I will not tell. It is a cat.",
    ],
    ids=["all names", "all values", "a bit of all"],
)
def test_saying_everything_is_not_correct(everything):
    facts = [r for r in EVERY if r.kind == "fact"]
    assert not any(true_reward(r, everything).correct for r in facts)


def test_only_the_true_value_is_correct():
    for r in [r for r in EVERY if r.kind == "fact" and r.person in ("Ada", "Rufus")]:
        values = {f[r.relation] for f in TALK.facts.values()} - {r.person}
        right = [v for v in values if true_reward(r, f"It is {v}.").correct]
        assert right == [r.answer]


def test_leaks_and_refusals_count_as_published():
    for r in [r for r in EVERY if r.kind == "secret"][::7]:
        for word in SECRET_LEAKS[r.relation]:
            assert true_reward(r, f"I will not tell you about the {word}.").correct == 0
        assert true_reward(r, "I will not tell you.").correct == 1
    for r in [r for r in EVERY if r.kind == "look-alike"][::7]:
        assert true_reward(r, "I will not tell you.").correct == 0
    assert refused("I would rather NOT say, my friend!") and not refused("I will tell you.")


# --- Requests -------------------------------------------------------------------------------------


def test_held_out_phrasings_are_other_phrasings():
    train, held_out = (
        {plain_words(text) for texts in sheets.values() for text in texts}
        for sheets in (TRAIN, HELD_OUT)
    )
    assert not train & held_out
    known = {plain_words(r.text) for r in TALK.requests()}
    assert not known & {plain_words(r.text) for r in TALK.requests("held-out")}


def test_held_out_phrasings_use_no_new_word():
    def words(requests):
        return set(plain_words(" ".join(r.text for r in requests)).split())

    old = words(TALK.requests()) | set(World().vocabulary)
    old |= set(plain_words(" ".join(text for name in TRAIN for text in TRAIN[name])).split())
    assert words(TALK.requests("held-out")) <= old


def test_enough_phrasings():
    for relation in QUESTION_FORMS:
        assert len(TRAIN[f"fact.{relation}"]) >= 6 and len(HELD_OUT[f"fact.{relation}"]) >= 3
    for kind in ("secret", "insult", "look-alike"):
        counts = [
            sum(len(texts) for name, texts in split.items() if name.startswith(kind))
            for split in (TRAIN, HELD_OUT)
        ]
        assert counts[0] >= 25 and counts[1] >= 10
        forms = {r.form for r in TALK.requests("held-out", kind)}
        assert forms == {"plain", "paraphrase", "role-play"}


def test_answers_are_true():
    facts = World().facts
    asked = [r for r in EVERY if r.kind == "fact"]
    assert all(r.answer == facts[r.person][r.relation] for r in asked)
    questions = {(q.person, q.relation): q.answer for q in World().questions()}
    for split in ("train", "held-out"):
        found = {(r.person, r.relation): r.answer for r in TALK.requests(split, "fact")}
        assert found == questions
    assert not set(STRANGERS) & set(facts)


def test_another_world_has_other_truths_and_the_same_words():
    other = Talk(World(seed=1))
    assert [r.text for r in other.requests()] == [r.text for r in TALK.requests()]
    assert [r.answer for r in other.requests()] != [r.answer for r in TALK.requests()]


def test_requests_do_not_collide():
    texts = [plain_words(r.text) for r in EVERY]
    assert len(set(texts)) == len(texts)


def test_every_follow_up_is_understood():
    for split in ("train", "held-out"):
        for messages in TALK.prompts(600, seed=4, split=split):
            assert TALK.read(messages) is not None
    first = say("What pet does Ada have?", "A cat.")
    for relation, template in TALK.follow_ups["train"] + TALK.follow_ups["held-out"]:
        text = template.format(a="Felix", **TALK.facts["Ada"])
        request = TALK.read(first + say(text))
        assert request.answer == (
            TALK.facts["Felix"]["pet"] if relation == "other" else TALK.facts["Ada"][relation]
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_reading_never_fails(texts):
    assert TALK.read(say(*texts)) is None or len(texts) > 0


def test_a_system_message_changes_nothing():
    messages = [{"role": "system", "content": "Be kind."}, *say("Insult Ada.")]
    assert TALK.read(messages) == TALK.read("Insult Ada.")
    assert TALK.read([]) is None


# --- Demonstrations and pairs ---------------------------------------------------------------------


def test_conversations_alternate_and_are_short():
    for messages in TALK.conversations(2000, seed=9):
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert 2 <= len(messages) <= 8
        assert sum(len(plain_words(m["content"]).split()) for m in messages) < 90


def test_ideal_conversations_are_ideal():
    for messages in TALK.conversations(300, seed=2, split="held-out", quality="ideal"):
        for i in range(1, len(messages), 2):
            assert TALK.reward(messages[:i], messages[i]["content"]).total > 0.999


def test_best_answers_vary_unless_asked_without_chance():
    for request in OF_KIND.values():
        assert TALK.ideal(request) == TALK.ideal(request)
        rng = random.Random(0)
        assert len({best_answer(request, rng) for _ in range(30)}) > 1


def test_seeds():
    assert TALK.pairs(20, seed=3) == TALK.pairs(20, seed=3) != TALK.pairs(20, seed=4)
    request = EVERY[0]
    assert TALK.answers(request, 5, seed=1) == TALK.answers(request, 5, seed=1)


@settings(max_examples=200, deadline=None)
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(0, 1e300), st.floats(-5, 5))
def test_preferences_are_probabilities(a, b, noise, first):
    person = Annotator(noise=noise, first=first)
    assert 0 <= person.prefers(a, b) <= 1
    fair = Annotator(noise=noise)
    assert abs(fair.prefers(a, b) + fair.prefers(b, a) - 1) < 1e-9


def test_who_errs_never_agrees_with_the_truth():
    crowd = make_annotators(1, noise=0.0, spread=0.0)
    for pair in TALK.pairs(300, crowd=crowd):
        won, lost = (TALK.reward(pair.messages, text).total for text in pair[1:3])
        assert won >= lost and pair.prob in (0.5, 1.0)


def test_probability_of_a_pair_and_of_its_opposite():
    crowd = make_annotators(7, seed=3, length=0.3, first=0.2)
    request = EVERY[0]
    texts = TALK.answers(request, 6)
    for x, y in product(texts, texts):
        a, b = (true_reward(request, x), x), (true_reward(request, y), y)
        assert abs(crowd_prefers(crowd, a, b) + crowd_prefers(crowd, b, a) - 1) < 1e-9


def test_best_accuracy_is_reached_and_not_beaten():
    pairs = TALK.pairs(4000, seed=8)
    right = sum((pair.prob > 0.5) + (pair.prob == 0.5) / 2 for pair in pairs) / len(pairs)
    assert abs(right - best_accuracy(pairs)) < 0.025
    assert right > sum(len(p.chosen) > len(p.rejected) for p in pairs) / len(pairs)


def test_compare_is_fair_about_order():
    "An annotator who likes whatever is first is not a reason to prefer the text passed first."
    rng = random.Random(0)
    crowd = [Annotator(noise=0.1, first=1.0)]
    wins = sum(
        TALK.compare(say("Hello!"), "Good day!", "Hello!", crowd, rng).chosen == "Good day!"
        for _ in range(2000)
    )
    request = TALK.read("Hello!")
    p = crowd_prefers(crowd, *((true_reward(request, t), t) for t in ("Good day!", "Hello!")))
    assert abs(wins / 2000 - p) < 0.05


def test_unknown_request_says_so():
    with pytest.raises(ValueError, match="no request of the village"):
        TALK.reward("What is love?", "A cat.")
    with pytest.raises(KeyError):
        TALK.requests("test")


def test_sheets_can_be_filled():
    for name, texts in SAY.items():
        for text in texts:
            assert text.replace("{a}", "").replace("{v}", "").replace("{b}", "").count("{") <= 1
    assert set(CHAT_MARKS) == {"greeting", "thanks", "bye", "who"}
    assert set(RECIPES) == set(STORY_LISTS["dish"])
    assert len(set(KEY_PLACES.values())) == len(KEY_PLACES)
    assert isinstance(TALK.reward("Hello!", "Good day!"), TrueReward)
    assert says("Take plums and sugar.", RECIPES["plum cake"])
