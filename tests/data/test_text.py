"""Caption and question cleaning, step by step as facts of the reference state it."""

import pytest

from jaxblip.data.text import clean_caption, clean_question


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
