"""The pieces of a streamed text add up to the text."""

import pytest

from jaxblip.decoding.streaming import text_pieces

WORDS = [" a", " cat", " '", " s", " hat", " ,", " n", "'t", " .", " "]


def plain(ids):
    return "".join(WORDS[i] for i in ids)


def cleaned(ids):
    """As the clean-up of transformers."""
    text = plain(ids)
    for old, new in [(" .", "."), (" ,", ","), (" ' ", "'"), (" n't", "n't")]:
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("decode, by_word", [(plain, False), (plain, True), (cleaned, True)])
@pytest.mark.parametrize("ids", [range(10), [1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 0, 9], [2], [9], []])
def test_joined_they_are_the_text(decode, by_word, ids):
    pieces = list(text_pieces(ids, decode, by_word=by_word))
    assert "".join(pieces) == decode(list(ids)).strip()
    assert all(pieces)


def test_a_piece_for_each_token():
    assert list(text_pieces([0, 1, 4], plain)) == ["a", " cat", " hat"]
    assert list(text_pieces([0, 1, 4], plain, by_word=True)) == ["a", " cat", " hat"]


def test_bytes_wait_for_their_character():
    encoded = "zoë 🐈".encode()

    def decode(ids):
        return bytes(encoded[i] for i in ids).decode(errors="replace")

    pieces = list(text_pieces(range(len(encoded)), decode))
    assert pieces == ["z", "o", "ë", " 🐈"]
    assert list(text_pieces([0, 1, 2], decode)) == ["z", "o", "\ufffd"]  # it never came
