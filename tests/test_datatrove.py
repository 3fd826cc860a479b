"""Our Gopher, C4 and repetition rules and our MinHash beside datatrove's, on 2,000 pages.

Both sides cut a text into the same words and sentences, so that rules are compared and not
tokenizers (datatrove's own needs spaCy). `DIFFERENT` holds each difference that is meant.
"""

import re
from collections import Counter
from functools import partial

import numpy as np
import pytest

from llm_course.data.choose import c4_lines, gopher_quality, gopher_repetition
from llm_course.data.collect import page_text
from llm_course.data.dedup import (
    MinHasher,
    band_keys,
    candidate_pairs,
    find_clusters,
    jaccard_similarity,
    shingle_hashes,
    similar_pairs,
)
from llm_course.data.rules import Drop
from llm_course.world.crawl import crawl

pytest.importorskip("datatrove")
WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")
SENTENCE = re.compile(r"[.?!]+[\"')\]]*(?=\s|$)")


@pytest.fixture(scope="module")
def texts() -> list:
    "What is on 2,000 pages, and some texts that the crawl has not: bullets, ellipses, chants."
    pages = [page_text(page.body) for page in crawl(2000, seed=3)]
    story = next(text for text in pages if len(text) > 600)
    lines = story.replace(". ", ".\n").split("\n")
    made = ["\n".join("- " + line for line in lines), "\n".join(line + " ..." for line in lines),
            "# " * 40 + story, story + "\n\n" + story, "\n".join([lines[0]] * 30),
            "\n".join(lines + [lines[1]] * len(lines)), "la la " * 200, "12 34 56 - " * 60 + story,
            "a b c d e " * 60, "supercalifragilistic " * 60 + story, story + " {", story[:200]]
    return [text for text in pages if text] + made


def same_words(monkeypatch, *modules) -> None:
    "Let datatrove take our words and sentences."
    for module in modules:
        for name, cut in (("split_into_words", lambda text, language: WORD.findall(text)),
                          ("split_into_sentences", lambda text, language: SENTENCE.findall(text))):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, cut)


def verdicts(filters: list, texts: list) -> list:
    "Of each text: is it kept by all of these, and what is left of it?"
    from datatrove.data import Document

    found = []
    for i, text in enumerate(texts):
        document = Document(text=text, id=str(i))
        kept = [f.filter(document) for f in filters]
        found.append(document.text if all(k is True for k in kept) else None)
    return found


def compare(ours, theirs: list, texts: list) -> list:
    "The texts on which the two sides do not agree: (text, our reason, what they keep)."
    mine = [ours(text) for text in texts]
    return [(text, str(m) if isinstance(m, Drop) else "kept", their)
            for text, m, their in zip(texts, mine, theirs)
            if (None if isinstance(m, Drop) else str(m)) != their]


def test_the_quality_rules_of_gopher(texts, monkeypatch):
    import datatrove.pipeline.filters.gopher_quality_filter as module

    same_words(monkeypatch, module)
    theirs = verdicts([module.GopherQualityFilter(max_non_alpha_words_ratio=None)], texts)
    assert 0.02 < np.mean([t is None for t in theirs]) < 0.98
    assert compare(partial(gopher_quality, letters=None), theirs, texts) == []
    # Meant: of the words between blanks, as the paper says, 80 % need a letter; datatrove counts
    # each full stop and comma as a word without one, and drops a tenth of the pages for them.
    theirs = verdicts([module.GopherQualityFilter()], texts)
    different = compare(gopher_quality, theirs, texts)
    assert all(mine == "kept" and their is None for _, mine, their in different)


def test_the_repetition_rules_of_gopher(texts, monkeypatch):
    import datatrove.pipeline.filters.gopher_repetition_filter as module

    same_words(monkeypatch, module)
    theirs = verdicts([module.GopherRepetitionFilter()], texts)
    assert 0.01 < np.mean([t is None for t in theirs]) < 0.99
    # Meant: a group of words that occurs once is no repetition; datatrove drops notes of up to 30
    # words because their longest group is a fifth of them.
    for text, mine, their in compare(gopher_repetition, theirs, texts):
        words = WORD.findall(text)
        assert mine == "kept" and their is None and len(text.split()) < 50
        assert max(Counter(zip(*(words[i:] for i in range(4)))).values()) == 1


def test_the_rules_of_c4(texts, monkeypatch):
    import datatrove.pipeline.filters.c4_filters as module

    same_words(monkeypatch, module)
    theirs = verdicts([module.C4QualityFilter(remove_citations=False)], texts)
    assert 0.01 < np.mean([t is None for t in theirs]) < 0.99
    # Meant: a page with a curly bracket goes, as the paper says; datatrove looks only at lines that
    # end like sentences.
    different = compare(c4_lines, theirs, texts)
    assert [(text[-1], mine) for text, mine, _ in different] == [("{", "a curly bracket")]


class Words:
    "Cuts at blanks, as our shingles do."

    def word_tokenize(self, text: str) -> list:
        return text.split()


def test_minhash(texts, monkeypatch, tmp_path):
    import datatrove.pipeline.dedup.minhash as module

    monkeypatch.setattr(module, "load_word_tokenizer", lambda language: Words())
    sha1 = module.HashConfig(hash_fc="sha1")
    config = module.MinhashConfig(5, num_buckets=20, hashes_per_bucket=6, hash_config=sha1)
    datatrove = module.MinhashDedupSignature(str(tmp_path), config=config)
    # As a text of fewer than five words has no group there, and because datatrove also takes out
    # punctuation, both get the same words in small letters.
    texts = [" ".join(re.findall("[a-z]+", t.lower())) for t in texts]
    texts = [t for t in texts if len(t.split()) >= 5]
    theirs = [np.concatenate(datatrove.get_signature(datatrove.get_shingles(t))) for t in texts]
    theirs, ours = np.array(theirs), MinHasher(120, 5).sign_all(texts)
    assert theirs.shape == ours.shape
    pairs, groups = candidate_pairs(band_keys(ours, 20)), shingle_hashes
    true = np.array([jaccard_similarity(groups(texts[a]), groups(texts[b])) for a, b in pairs])
    for signatures in (ours, theirs):
        told = np.array([(signatures[a] == signatures[b]).mean() for a, b in pairs])
        error = (told - true) / np.sqrt(np.maximum(true * (1 - true), 1e-3) / 120)
        assert abs(error.mean()) < 0.2 and error.std() < 1.3
    clusters = []
    for signatures in (ours, theirs):
        near = candidate_pairs(band_keys(signatures, 20))
        clusters.append(find_clusters(len(texts), similar_pairs(near, texts.__getitem__)))
    assert clusters[0] == clusters[1]
