"""Our Gopher, C4 and repetition rules beside datatrove's, document by document.

    pip install datatrove && python experiments/rules.py [--documents 2000] [--data FOLDER]

The documents are pages of the invented crawl, their text taken out by `page_text`, or those of a folder. datatrove
takes its English words from spaCy; here both sides get the words and sentences of one regular expression, so that
rules are compared and not tokenizers. The table counts who keeps and who drops, and names the reasons of those that
differ. The last line is JSON; `value` is the smallest share of documents on which both agree or differ for a reason
in `EXPLAINED`, and the bar is 1.
"""

import argparse
import json
import re
import sys
from collections import Counter
from importlib.util import find_spec

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin

from llm_course.data.choose import c4_lines, gopher_quality, gopher_repetition
from llm_course.data.collect import page_text
from llm_course.data.documents import read_documents
from llm_course.data.rules import Drop
from llm_course.world.crawl import crawl

EXPLAINED = {
    "gopher_below_alpha_threshold": "datatrove counts punctuation marks as words without a letter; ours takes the "
    "words between spaces, as the paper says",
    "top_2_gram": "datatrove counts the most frequent group even if it comes only once; ours wants it twice",
    "top_3_gram": "the same",
    "top_4_gram": "the same",
    "a curly bracket": "the paper drops a page with one anywhere; datatrove looks only at the lines that it keeps",
}
WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")


def sentences(text: str, language: str = "") -> list:
    "Sentences as our rule counts them."
    return re.findall(r"[.?!]+[\"')\]]*(?=\s|$)", text)


def their_filters() -> dict:
    "datatrove's filters, with our words."
    from datatrove.pipeline.filters import c4_filters, gopher_quality_filter, gopher_repetition_filter

    for module in (gopher_quality_filter, gopher_repetition_filter):
        module.split_into_words = lambda text, language: WORD.findall(text)
    c4_filters.split_into_sentences = sentences
    return {
        "quality": gopher_quality_filter.GopherQualityFilter(),
        "repetition": gopher_repetition_filter.GopherRepetitionFilter(),
        "lines": c4_filters.C4QualityFilter(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--data")
    chosen = parser.parse_args()
    if not find_spec("datatrove"):
        print("datatrove is missing: pip install datatrove")
        sys.exit(2)
    from datatrove.data import Document

    texts = [page_text(page.body) for page in crawl(chosen.documents, seed=0)]
    if chosen.data:
        documents = read_documents(chosen.data)
        texts = [d.text or page_text(d.body) for _, d in zip(range(chosen.documents), documents)]
    texts = [text for text in texts if text.strip()]
    ours = {"quality": gopher_quality, "repetition": gopher_repetition, "lines": c4_lines}
    agreed = {}
    for name, theirs in their_filters().items():
        rows, same_text = Counter(), 0
        for number, text in enumerate(texts):
            document, mine = Document(text=text, id=str(number)), ours[name](text)
            answer = theirs.filter(document)
            kept, reason = (answer, "") if isinstance(answer, bool) else answer
            dropped = isinstance(mine, Drop)
            same_text += not dropped and kept and document.text == mine
            why = f"{mine if dropped else 'kept'} | {reason or 'kept'}" if dropped == bool(kept) else ""
            rows[not dropped, bool(kept), why] += 1
        same = sum(n for (a, b, _), n in rows.items() if a == b)
        known = sum(n for (_, _, why), n in rows.items() if EXPLAINED.keys() & set(why.split(" | ")))
        agreed[name] = (same + known) / len(texts)
        both, gone = rows[True, True, ""], rows[False, False, ""]
        print(f"{name:12} agree on {same / len(texts):.2%} of {len(texts):,}: {both:,} kept ({same_text:,} with the same "
              f"text), {gone:,} dropped")
        for (_, _, reasons), n in rows.most_common():
            if reasons:
                mine, their = reasons.split(" | ")
                why = EXPLAINED.get(their) or EXPLAINED.get(mine, "not explained")
                print(f"    {n:5}  ours: {mine[:60]}; datatrove: {their} ({why})")
    print(json.dumps({"name": "datatrove", "value": round(min(agreed.values()), 4), "unit": "share", "bar": 1.0}))


if __name__ == "__main__":
    main()
