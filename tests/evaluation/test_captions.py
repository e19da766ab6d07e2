import math
from collections import Counter

import pytest

from jaxblip.evaluation.captions import caption_metrics


def ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def slow_bleu4(predictions, references):
    """Corpus BLEU-4 of Papineni et al. (2002), on lists of words, without smoothing."""
    matches, totals, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for prediction, captions in zip(predictions, references, strict=True):
        words, options = prediction.split(), [caption.split() for caption in captions]
        length += len(words)
        reference_length += min(
            (abs(len(option) - len(words)), len(option)) for option in options
        )[1]
        for n in range(1, 5):
            most = Counter()
            for option in options:
                most |= ngrams(option, n)
            matches[n - 1] += (ngrams(words, n) & most).total()
            totals[n - 1] += ngrams(words, n).total()
    brevity = min(0.0, 1 - reference_length / length)
    precision = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4
    return 100 * math.exp(brevity + precision)


PREDICTIONS = [
    "a red circle above a small blue square",
    "two green triangles beside a circle",
    "a large yellow star",
]
REFERENCES = [
    ["a red circle above a small blue square", "a small blue square below a red circle"],
    ["two green triangles beside a large red circle in the middle"],
    ["a yellow star", "a very large yellow star", "one large yellow star on a white ground"],
]


def test_bleu_agrees_with_the_formula_where_the_number_of_references_varies():
    assert caption_metrics(PREDICTIONS, REFERENCES)["bleu4"] == pytest.approx(
        slow_bleu4(PREDICTIONS, REFERENCES)
    )


def test_missing_references_do_not_count_as_empty_ones():
    # nearest in length decides the brevity penalty: an empty reference would be a free pass
    predictions = ["a b c d e", "a b c d"]
    references = [["a b c d e", "a b c d e f"], ["a b c d e f g h i"]]
    bleu = caption_metrics(predictions, references)["bleu4"]
    assert bleu == pytest.approx(slow_bleu4(predictions, references))
    assert bleu < 70


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_all_references_count_wherever_the_longest_list_stands(order):
    predictions = [PREDICTIONS[i] for i in order]
    references = [REFERENCES[i] for i in order]
    assert caption_metrics(predictions, references)["bleu4"] == pytest.approx(
        slow_bleu4(PREDICTIONS, REFERENCES)
    )


def test_exact_is_one_of_the_references_but_for_white_space():
    metrics = caption_metrics(
        ["a red  circle ", "two squares", "A star"], [["x", "a red circle"], ["two"], ["a star"]]
    )
    assert metrics["caption_exact"] == pytest.approx(1 / 3)


def test_perfect_captions():
    perfect = [references[0] for references in REFERENCES]
    assert caption_metrics(perfect, REFERENCES) == {"caption_exact": 1.0, "bleu4": 100.0}


@pytest.mark.parametrize(
    "predictions, references", [([], []), (["a"], []), (["a", "b"], [["a"], []])]
)
def test_nothing_to_compare_is_an_error(predictions, references):
    with pytest.raises(ValueError):
        caption_metrics(predictions, references)
