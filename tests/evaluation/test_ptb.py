"""Words of captions, compared with what Stanford's PTBTokenizer 3.4.1 made of the same captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxblip.evaluation import captions
from jaxblip.evaluation.ptb import ptb_words

# Caption -> its words, written by Java through `pycocoevalcap`, which drops punctuation.
STORED = json.loads(Path(__file__).with_name("ptb_words.json").read_text(encoding="utf-8"))


def test_words_are_those_of_stanfords_tokenizer():
    assert len(STORED) > 250
    found = {text: " ".join(ptb_words(text)) for text in STORED}
    assert found == STORED


def test_contractions_are_divided_and_punctuation_goes():
    words = ptb_words("It’s a man's black-and-white photo, isn't it? (1,000 of them...)")
    assert words == (
        "it 's a man 's black-and-white photo is n't it -lrb- 1,000 of them -rrb-".split()
    )


@pytest.mark.skipif(not captions.has_java(), reason="needs a Java runtime")
def test_what_is_stored_is_what_java_says():
    texts = list(STORED)[:100] + ["", "two\nlines"]
    found = captions.tokenize(texts, java=True)
    assert found == [STORED[text] for text in texts[:100]] + ["", "two lines"]
