"""Answers scored as the evaluation server of VQA v2 scores them."""

from __future__ import annotations

import random

import pytest

from jaxblip.evaluation.vqa import (
    english_lemma,
    is_exact_answer,
    means_by,
    normalize_answer,
    normalize_punctuation,
    vqa_accuracy,
)

# Answers, and what the script of the VQA evaluation makes of them (its version of 2019, run).
OFFICIAL = {
    "a cat": "cat", "the cat": "cat", "an apple": "apple", "The Cat and the Dog": "cat and dog",
    "a": "", "a the an": "", "none": "0", "None": "0", "zero": "0", "one": "1", "Ten": "10",
    "eleven": "eleven", "twenty one": "twenty 1", "two dogs": "2 dogs", "1,000": "1000",
    "1,000 dollars": "1000 dollars", "10, 20": "10 20", "3.5": "3.5", "$3.50": "$3.50", "1.": "1",
    "no.": "no", "Mr. Smith": "mr smith", "u.s.a.": "usa", ".5": ".5", "a.m.": "am",
    "12:30": "12:30", "o'clock": "o'clock", "5 oclock": "5 o'clock", "dont know": "don't know",
    "don't know": "don't know", "cant": "can't", "can't": "can't", "wont": "won't",
    "isnt": "isn't", "its": "its", "it's": "it's", "let's": "let's", "yall": "y'all",
    "y'allll": "y'all'll", "couldnt've": "couldn't've", "couldn'tve": "couldn't've",
    "couldntve": "couldntve", "somebody'd": "somebodyd", "somebodyd": "somebodyd",
    "ow'sat": "ow'sat", "'ow'sat": "'ow's'at", "Im": "im", "I'm": "i'm", "im": "im", "Ive": "ive",
    "black-white": "black white", "black - white": "black white",
    "black and white": "black and white", "black/white": "black white",
    "black / white": "black white", "red, white": "red white", "red,white": "red white",
    "red, white, blue": "red white blue", "yes!": "yes", "yes !": "yes", "what?": "what",
    "(left)": "left", "left (side)": "left side", "[x]": "x", "a_b": "b", "50%": "50%", "#1": "#1",
    "t-shirt": "t shirt", "blond-haired": "blond haired", "men's": "men's", "mens": "mens",
    "café": "café", "naïve": "naïve", "ＡＢＣ": "ａｂｃ", "one’s": "one’s", "don’t": "don’t",
    "2 1/2": "2 1 2", "1/2": "1 2", "3-4": "3 4", "100,000,000": "100000000", "1,2,3": "123",
    "1, 2": "1 2", "hello\nworld": "hello world", "  tab\there ": "tab here", "": "", "?": "",
    "...": "", "a...b": "ab", "1.2.3": "1.2.3", "version 2.": "version 2", "-1": "1", "+5": "5",
    "=": "", "@home": "home", "\"quoted\"": "quoted", "`tick`": "tick", "semi;colon": "semi colon",
    "semi; colon": "semi colon", "A": "", "THE END": "end", "thirteen": "thirteen",
    "Zero degrees": "0 degrees", "none of them": "0 of them", "x<y": "x y", "{set}": "set",
    "back\\slash": "back slash", "over-the-counter": "over counter", "the-end": "end",
    "no, the cat": "no cat", "1,000-2,000": "10002000", "ten-thirty": "10 thirty",
}  # fmt: skip
# Prediction, ten answers, and the accuracy by the same script, in percent.
SCORED = [
    ("2", ["2"] * 3 + ["3"] * 7, 90.0),
    ("two", ["2"] * 4 + ["3"] * 6, 100.0),
    ("2", ["two"] * 10, 0.0),  # true answers keep their words
    ("red white", ["red, white"] * 2 + ["red"] * 8, 60.0),
    ("red, white", ["red, white"] * 10, 0.0),  # and, where they are all alike, their punctuation
    ("yes", ["yes"] + ["no"] * 9, 30.0),
    ("cat", ["a cat"] * 5 + ["cat"] + ["dog"] * 4, 30.0),
    ("the dog", ["a cat"] * 5 + ["cat"] + ["dog"] * 4, 100.0),
    ("bird", ["dog"] * 10, 0.0),
]


def test_there_are_enough_tricky_answers():
    assert len(OFFICIAL) >= 60


@pytest.mark.parametrize("answer", OFFICIAL)
def test_an_answer_is_normalised_as_by_the_official_script(answer):
    assert normalize_answer(answer) == OFFICIAL[answer]


@pytest.mark.parametrize("prediction, answers, percent", SCORED)
def test_the_accuracy_is_that_of_the_official_script(prediction, answers, percent):
    assert vqa_accuracy(prediction, answers) == pytest.approx(percent / 100)


def test_ten_answers_are_scored_with_each_annotator_left_out():
    rng = random.Random(0)
    for _ in range(300):
        pool = ["yes", "no", "2", "two", "a cat", "cat", "red, white", "red white"]
        answers = [rng.choice(pool[: rng.randint(1, 8)]) for _ in range(rng.randint(10, 12))]
        prediction = rng.choice(pool)
        true = [normalize_punctuation(a) if len(set(answers)) > 1 else a for a in answers]
        parts = []
        for left_out in range(len(true)):
            others = true[:left_out] + true[left_out + 1 :]
            parts.append(min(1, others.count(normalize_answer(prediction)) / 3))
        assert vqa_accuracy(prediction, answers) == pytest.approx(sum(parts) / len(parts))


def test_fewer_answers_count_as_ten():
    assert vqa_accuracy("a cat.", ["Cat"]) == 1 and vqa_accuracy("dog", ["cat"]) == 0
    assert vqa_accuracy("two", ["2", "3", "3", "3", "3"]) == pytest.approx(0.6)  # as 2 of ten
    assert vqa_accuracy("3", ["2", "3", "3", "3", "3"]) == 1
    for count in range(1, 10):
        assert vqa_accuracy("yes", ["yes"] * count) == 1


def test_lemmas_make_forms_of_a_word_equal():
    pytest.importorskip("simplemma")
    lemma = english_lemma()
    assert vqa_accuracy("racing", ["race"] * 10) == 0
    assert vqa_accuracy("racing", ["race"] * 10, lemma) == 1
    assert vqa_accuracy("The Glasses", ["glass"] * 5 + ["cup"] * 5, lemma) == 1


def test_an_exact_answer_is_the_same_when_normalised():
    assert is_exact_answer("The dog.", ["dog"]) and is_exact_answer("2", ["two"])
    assert not is_exact_answer("dog", ["dogs"])


def test_means_by_group_leave_out_what_has_none():
    found = means_by([1.0, 0.0, 0.5, 1.0], ["b", "a", "b", ""])
    assert found == {"a": 0.0, "b": 0.75} and list(found) == ["a", "b"]
