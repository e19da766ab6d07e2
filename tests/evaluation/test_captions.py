"""Metrics of captions, against formulas that are written out here."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from jaxblip.evaluation import captions
from jaxblip.evaluation.captions import caption_metrics, exact_share


def ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def slow_bleu(predictions, references, order):
    """Corpus BLEU of Papineni et al. (2002), on lists of words, without smoothing; 0 to 100."""
    matches, totals, length, reference_length = [0] * order, [0] * order, 0, 0
    for prediction, texts in zip(predictions, references, strict=True):
        words, options = prediction.split(), [text.split() for text in texts]
        length += len(words)
        nearest = min((abs(len(option) - len(words)), len(option)) for option in options)
        reference_length += nearest[1]
        for n in range(1, order + 1):
            most = Counter()
            for option in options:
                most |= ngrams(option, n)
            matches[n - 1] += (ngrams(words, n) & most).total()
            totals[n - 1] += ngrams(words, n).total()
    brevity = min(0.0, 1 - reference_length / length)
    precision = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / order
    return 100 * math.exp(brevity + precision)


def slow_cider(predictions, references):
    """CIDEr-D of Vedantam et al. (2015), equations 2 to 4, sigma 6; 0 to 1000."""
    images = len(references)
    appears = Counter()
    for texts in references:
        appears.update({g for text in texts for n in range(1, 5) for g in ngrams(text.split(), n)})

    def weights(text, n):
        return {
            gram: count * (math.log(images) - math.log(max(1, appears[gram])))
            for gram, count in ngrams(text.split(), n).items()
        }

    def norm(vector):
        return math.sqrt(sum(value * value for value in vector.values()))

    total = 0.0
    for prediction, texts in zip(predictions, references, strict=True):
        score = 0.0
        for text in texts:
            # lengths in the penalty are numbers of bigrams, as in the authors' code
            gap = max(len(prediction.split()) - 1, 0) - max(len(text.split()) - 1, 0)
            for n in range(1, 5):
                said, true = weights(prediction, n), weights(text, n)
                clipped = sum(min(said[g], true.get(g, 0.0)) * true.get(g, 0.0) for g in said)
                norms = norm(said) * norm(true)
                if norms:
                    score += clipped / norms * math.exp(-(gap**2) / (2 * 6.0**2))
        total += 10 * score / 4 / len(texts)
    return 100 * total / images


def slow_rouge(predictions, references):
    """ROUGE-L of Lin (2004) with beta 1.2, best precision and best recall; 0 to 100."""

    def common(a, b):
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return common(a[:-1], b[:-1]) + 1
        return max(common(a[:-1], b), common(a, b[:-1]))

    total = 0.0
    for prediction, texts in zip(predictions, references, strict=True):
        said, options = prediction.split(), [text.split() for text in texts]
        precision = max(common(said, option) / len(said) for option in options)
        recall = max(common(said, option) / len(option) for option in options)
        if precision and recall:
            total += (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return 100 * total / len(predictions)


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


def random_texts(seed, words="red blue dog cat on a the mat small"):
    rng = random.Random(seed)

    def text():
        return " ".join(rng.choice(words.split()) for _ in range(rng.randint(5, 7)))

    count = rng.randint(8, 12)
    return [text() for _ in range(count)], [
        [text() for _ in range(rng.randint(1, 4))] for _ in range(count)
    ]


@pytest.mark.parametrize("seed", [None, *range(6)])
def test_scores_are_those_of_the_formulas(seed):
    predictions, references = random_texts(seed) if seed is not None else (PREDICTIONS, REFERENCES)
    if seed is not None:  # so that every order of BLEU has a match
        predictions[0] = references[0][0]
    found = caption_metrics(predictions, references)
    for order in range(1, 5):
        expected = slow_bleu(predictions, references, order)
        assert found[f"bleu{order}"] == pytest.approx(expected, rel=1e-6)
    assert found["cider"] == pytest.approx(slow_cider(predictions, references), rel=1e-9)
    assert found["rouge_l"] == pytest.approx(slow_rouge(predictions, references), rel=1e-9)


def test_missing_references_do_not_count_as_empty_ones():
    # nearest in length decides the brevity penalty: an empty reference would be a free pass
    predictions = ["a b c d e", "a b c d"]
    references = [["a b c d e", "a b c d e f"], ["a b c d e f g h i"]]
    bleu = caption_metrics(predictions, references)["bleu4"]
    assert bleu == pytest.approx(slow_bleu(predictions, references, 4))
    assert bleu < 70


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_the_order_of_the_images_does_not_count(order):
    found = caption_metrics([PREDICTIONS[i] for i in order], [REFERENCES[i] for i in order])
    assert found == pytest.approx(caption_metrics(PREDICTIONS, REFERENCES))


def test_case_and_punctuation_do_not_count():
    loud = [text.title() + "!" for text in PREDICTIONS]
    assert caption_metrics(loud, REFERENCES) == caption_metrics(PREDICTIONS, REFERENCES)


def test_exact_is_one_of_the_references_but_for_white_space():
    predictions = ["a red  circle ", "two squares", "A star"]
    assert exact_share(predictions, [["x", "a red circle"], ["two"], ["a star"]]) == 1 / 3


def test_perfect_and_empty_captions():
    perfect = caption_metrics([texts[0] for texts in REFERENCES], REFERENCES)
    assert [perfect[f"bleu{n}"] for n in range(1, 5)] == pytest.approx([100.0] * 4)
    empty = caption_metrics(["", "", ""], REFERENCES)
    assert empty["cider"] == 0 and empty["rouge_l"] == 0 and empty["bleu4"] < 1e-3


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="1 predictions and 2 lists"):
        caption_metrics(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="0 predictions"):
        caption_metrics([], [])
    with pytest.raises(ValueError, match=r"prediction 1 has no reference \(1 have none\)"):
        caption_metrics(["a", "b"], [["a"], []])


def test_without_java_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(captions, "has_java", lambda: False)
    (sentence,) = captions.missing_metrics()
    assert "METEOR and SPICE are left out" in sentence and "install a Java runtime" in sentence
    monkeypatch.setattr(captions, "has_java", lambda: True)
    if not captions._SPICE_JAR.is_file():
        (sentence,) = captions.missing_metrics()
        assert sentence.startswith("SPICE is left out") and "get_stanford_models" in sentence


@pytest.mark.skipif(not captions.has_java(), reason="needs a Java runtime")
def test_meteor_is_that_of_the_authors_program():
    found = caption_metrics(["a dog", "the cat"], [["a dog"], ["a cat"]], java=True)
    # as METEOR 1.5 printed it for these two, on its own
    assert found["meteor"] == pytest.approx(45.35606800758789, rel=1e-6)
