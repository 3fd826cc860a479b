"Encoders, translators and the labels that they learn from: what holds for any input."

import json
import random
import re

import pytest
import torch

from llm_course.core import asset
from llm_course.model.encoder import Classifier, DocumentModel, Encoder, RowReader, TreeModel, mask_words
from llm_course.model.gpt import GPT, GPTConfig, count_params
from llm_course.model.pairs import (
    fill_rows,
    load_translator,
    save_translator,
    translator_flops,
    write_greedily,
)
from llm_course.model.translate import TranslatorConfig, make_translator
from llm_course.world.labels import (
    draw_entailments,
    draw_guest_books,
    draw_opinions,
    opinion_sign,
    summarise_story,
)
from llm_course.world.sister import Sister
from llm_course.world.story import World

KINDS = ("vector", "attention", "transformer")
CONFIG = GPTConfig(50, 24, d_model=16, n_layers=2, n_heads=2)


def translator(kind: str):
    torch.manual_seed(0)
    return make_translator(TranslatorConfig(30, kind, d_model=16, n_layers=2, n_heads=2)).eval()


def shaken(model):
    "No weight is nought, so that everything can be seen."
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


# --- The sister language ------------------------------------------------------------------------


def test_every_sentence_has_a_translation_and_every_word_a_source():
    sister = Sister()
    for sentence in sister.sentences(500, seed=4):
        words = sentence.replace(".", " .").split()
        said = sister.speak(sentence)
        assert all(0 <= word.source < len(words) for word in said)
        assert len({word.source for word in said}) == len(said)
        assert said[-1].text == "." and sister.translate(sentence).count(" ") == len(said) - 2


def test_the_language_stays_as_it_is():
    "Shipped models know these words: a change here asks for training them again."
    said = Sister().translate("Clementine found the lantern.")
    assert said == "Clementine rovota kamima gavemet."


@pytest.mark.parametrize(
    "text", ["", ".", "Ada", "Ada lost the moon.", "Ada lost the kettle", "ada lost the kettle.", "Ada lost the kettle. "]
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="no sentence of this grammar"):
        Sister().speak(text)


# --- Labels ---------------------------------------------------------------------------------------


def test_what_follows_says_no_more():
    jobs = {fact["job"]: name for name, fact in World(0).facts.items()}
    for pair in draw_entailments(300, seed=8):
        first, second = (set(re.findall(r"\w+", t)) for t in (pair.premise, pair.hypothesis))
        second = {jobs.get(word, word) for word in second} - {"The"}
        if pair.label == 0:
            assert second <= first, pair
        assert (pair.label != 1) or " not " in pair.hypothesis


def test_opinions_agree_with_their_trees():
    def sign(tree):
        if tree == () or isinstance(tree, str):
            return None
        words = re.findall(r"[\w']+|[.,]", " ".join(flat(tree)))
        return opinion_sign(" ".join(words).replace(" ,", ",").replace(" .", "."))

    def flat(tree):
        return [tree] if isinstance(tree, str) else [w for part in tree for w in flat(part)]

    assert all(sign(o.tree) == o.sign for o in draw_opinions(300, seed=6))
    assert all(book.sign for book in draw_guest_books(20, seed=6))


def test_summaries_of_any_world_keep_what_the_story_says():
    world = World(3)
    for story in world.sample(60, seed=9):
        assert all(fact in story for fact in summarise_story(world, story).facts)
    with pytest.raises(ValueError, match="can't be told"):
        summarise_story(world, "Once upon a time.")


# --- Translators --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_change_nothing(kind):
    model = translator(kind)
    source = fill_rows([[5, 6, 7, 8, 9], [4, 3]], 0)
    target = torch.randint(1, 30, (2, 6))
    both = model(source, target)
    assert torch.allclose(model(source[1:, :2], target[1:])[0], both[1], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_later_words_are_not_seen(kind):
    model, source = translator(kind), torch.randint(1, 30, (1, 5))
    target = torch.randint(1, 30, (1, 6))
    other = target.clone()
    other[0, 4] = 30 - other[0, 4]
    a, b = model(source, target), model(source, other)
    assert torch.allclose(a[:, :4], b[:, :4], atol=1e-6) and not torch.allclose(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("kind", KINDS)
def test_translators_come_back_from_their_files(kind, tmp_path):
    model, path = translator(kind), tmp_path / "t.safetensors"
    save_translator(model, path)
    source = torch.randint(1, 30, (3, 4))
    assert write_greedily(load_translator(path), source, 2, 9) == write_greedily(model, source, 2, 9)
    assert translator_flops(model.config) > 0
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        load_translator(path)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="choose vector, attention or transformer"):
        TranslatorConfig(9, "convolution")


# --- Encoders -----------------------------------------------------------------------------------


def test_an_encoder_sees_all_and_a_decoder_what_was():
    tokens = torch.randint(1, 50, (1, 8))
    other = tokens.clone()
    other[0, 5] = 50 - other[0, 5]
    for model, sees in ((shaken(Encoder(CONFIG)), True), (shaken(GPT(CONFIG)), False)):
        changed = (model.hidden(tokens) - model.hidden(other)).abs()[0, :5].max() > 1e-5
        assert bool(changed) == sees
    assert count_params(Encoder(CONFIG)) == count_params(GPT(CONFIG))


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_classes_do_not_depend_on_padding(pool):
    model = shaken(Classifier(Encoder(CONFIG), 3, pool))
    tokens = torch.randint(1, 50, (2, 8))
    longer = torch.nn.functional.pad(tokens, (0, 4))
    assert torch.allclose(model(tokens), model(longer), atol=1e-5)


def test_masks_spare_what_is_no_word():
    tokens = torch.randint(0, 60, (50, 20), generator=torch.Generator().manual_seed(0))
    read, targets = mask_words(tokens, 99, 50, share=1.0)
    assert (targets[tokens >= 50] == -100).all() and (read[tokens >= 50] == tokens[tokens >= 50]).all()
    assert (targets[tokens < 50] == tokens[tokens < 50]).all()


def random_tree(rng: random.Random, depth: int):
    if depth == 0 or rng.random() < 0.2:
        return rng.randrange(20)
    return tuple(random_tree(rng, depth - 1) for _ in range(rng.randint(2, 4)))


def test_a_tree_is_read_the_same_alone_and_in_company():
    "And the same as by going down the tree."
    rng, model = random.Random(0), shaken(TreeModel(20, 2, 8))

    def read(tree):
        if isinstance(tree, int):
            memory = model.embed(torch.tensor(tree))
            return memory, memory.tanh()
        memory, shown = read(tree[0])
        for part in tree[1:]:
            other, seen = read(part)
            left, right, write, show, new = model.join(torch.cat([shown, seen])).chunk(5)
            memory = left.sigmoid() * memory + right.sigmoid() * other + write.sigmoid() * new.tanh()
            shown = show.sigmoid() * memory.tanh()
        return memory, shown

    trees = [random_tree(rng, depth) for depth in (0, 1, 2, 3, 4, 5, 5)]
    with torch.no_grad():
        want = torch.stack([model.head(read(tree)[1]) for tree in trees])
        assert torch.allclose(model(trees), want, atol=1e-5)


def test_documents_do_not_depend_on_padding():
    model = shaken(DocumentModel(30, 2, 8))
    documents = torch.randint(1, 30, (2, 3, 5))
    documents[0, 2] = 0
    documents[1, 1, 3:] = 0
    wider = torch.nn.functional.pad(documents, (0, 2, 0, 2))
    assert torch.allclose(model(documents), model(wider), atol=1e-6)
    assert RowReader(30, 8)(documents[0, :2]).shape == (2, 8)


# --- Records ------------------------------------------------------------------------------------


def test_records_hold_what_the_lessons_say():
    found = json.loads(asset("translate.json").read_text(encoding="utf-8"))
    assert min(found["kinds"]["attention"]["exact"]) >= 0.95
    assert min(found["kinds"]["transformer"]["exact"]) >= 0.95
    found = json.loads(asset("encoder.json").read_text(encoding="utf-8"))
    for readers in found["tasks"].values():
        assert all(len(rows) == 3 for reader in readers.values() for rows in reader.values())


@pytest.mark.parametrize("name", ["translate.safetensors", "encoder.safetensors", "decoder.safetensors"])
def test_shipped_models_are_small(name):
    assert asset(name).stat().st_size < 500_000
