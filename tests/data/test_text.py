"""Caption and question cleaning, step by step as facts of the reference state it."""

import pytest

from jaxblip.data.text import clean_caption, clean_question, fill_prompt, join_prompt


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("A Red CIRCLE", "a red circle"),
        ("one.two!three", "one two three"),  # each mark becomes one space
        ('a "b" (c) * d # e : f ; g ~ h', "a b c d e f g h"),
        ("it's a well-known, red/blue thing?", "it's a well-known, red/blue thing?"),
        ("  two   spaces \n\n", "two spaces"),
        ("a\tb", "a\tb"),  # one whitespace character is no run
        ("a\t\nb", "a b"),
        ("the end.\n", "the end"),  # ". \n" is a run of two
        ("the end\n", "the end"),
        (" ... ", ""),
        ("", ""),
        ("ÄÖ", "äö"),
    ],
)
def test_clean_caption(raw, cleaned):
    assert clean_caption(raw, 50) == cleaned


def test_words_are_cut_before_the_prompt_is_added():
    assert clean_caption("One two three four", 2, "A photo of: ") == "A photo of: one two"
    assert len(clean_caption("w " * 80).split()) == 50


def test_clean_question_deletes_what_captions_replace():
    assert clean_question("What's one.two (here)?  ") == "what's onetwo here?"
    assert clean_question("  A  B", 50) == "  a  b"  # only the end is stripped, runs stay
    assert clean_question("a b c d", 2) == "a b"


def test_without_a_number_of_words_texts_stay_as_they_are():
    text = "  Look:  It's A (very) big\ndog!! "
    assert clean_caption(text, 0) == clean_question(text, 0) == text.strip()
    assert clean_caption("A cat. ", 0, "It is ") == "It is A cat."


def test_a_prompt_has_one_place_for_the_instruction():
    assert fill_prompt("Question: {} Answer:", "what {} is") == "Question: what {} is Answer:"
    assert fill_prompt("{} or {}", "this") == "this or {}"
    assert fill_prompt("a {photo} of", "what") == "a {photo} of"
    assert fill_prompt("", "what") == ""


def test_one_space_stands_between_a_prompt_and_its_text():
    assert join_prompt("a photo of", "a cat") == join_prompt("a photo of  ", "a cat")
    assert join_prompt("a photo of", "a cat") == "a photo of a cat"
    assert join_prompt(" ", "a cat") == join_prompt("", "a cat") == "a cat"
