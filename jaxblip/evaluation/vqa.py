"""Accuracy of answers: that of VQA v2 with its normalisation, OK-VQA's lemmas, GQA's exact match.

The rules are those of the VQA evaluation server (Antol et al., arXiv 1505.00468, and the notes on
https://visualqa.org/evaluation.html), down to what its script does where they are silent.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from jaxblip.errors import UserError

ANNOTATORS = 10  # answers that a question has in VQA v2
_ENOUGH = 3  # annotators who make an answer fully right

_ARTICLES = ("a", "an", "the")
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten".split()
    )
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # of a decimal number it stays
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# Each also stands for itself without one of its apostrophes; one entry goes the other way.
_RESTORED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalize_punctuation(answer: str) -> str:
    """Without punctuation, which leaves a space where it stood between two words.

    It leaves none where one of its kind stands beside a space, or where the answer has a comma
    between digits, as in 1,000. Periods go, but those before a digit; apostrophes and colons stay.
    """
    has_number = _COMMA_IN_NUMBER.search(answer) is not None
    cleaned = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if beside_space or has_number else " ")
    return _PERIOD.sub("", cleaned)


def normalize_words(answer: str) -> str:
    """Lower case, numbers to ten as digits, no articles, contractions with their apostrophe."""
    words = (_NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def normalize_answer(answer: str) -> str:
    """What the evaluation of VQA v2 makes of a predicted answer."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    return normalize_words(normalize_punctuation(answer))


def vqa_accuracy(
    prediction: str, answers: Sequence[str], lemma: Callable[[str], str] | None = None
) -> float:
    """Accuracy (0 to 1) of a prediction: the mean, over the annotators, of min(others / 3, 1).

    "Others" are the other annotators whose answer is the prediction. As in the script, the true
    answers keep their words, and lose punctuation where they are not all the same.

    Fewer answers than ten stand for ten, each for 10 / n annotators: a single answer is right or
    wrong, and one of five counts as two of ten. They are normalised as the prediction is, since
    they are not of VQA v2, whose answers are so already.

    Args:
      answers: of all annotators, with repeats.
      lemma: makes of a word of the normalised answers its base form, on both sides, as OK-VQA is
        scored.
    """
    predicted, true = normalize_answer(prediction), answers
    if len(answers) < ANNOTATORS:
        true = map(normalize_answer, answers)
    elif len(set(answers)) > 1:
        true = map(normalize_punctuation, answers)
    if lemma is not None:
        predicted, *true = (" ".join(map(lemma, text.split())) for text in (predicted, *true))
    matching = sum(answer == predicted for answer in true)
    annotators = max(ANNOTATORS, len(answers))
    matching *= annotators / len(answers)
    # Of those who said it one less remains among the others.
    said = matching * min(1.0, max(matching - 1, 0) / _ENOUGH)
    not_said = (annotators - matching) * min(1.0, matching / _ENOUGH)
    return (said + not_said) / annotators


def is_exact_answer(prediction: str, answers: Sequence[str]) -> bool:
    """Whether both are the same when normalised, as GQA is scored."""
    return normalize_answer(prediction) in map(normalize_answer, answers)


def english_lemma() -> Callable[[str], str]:
    """A word's base form, as `glasses` has `glass` and `running` `run`.

    Raises:
      UserError: the package simplemma is missing.
    """
    try:
        from simplemma import lemmatize
    except ImportError as error:
        raise UserError(
            "Answers to OK-VQA are compared by their lemmas, and the package simplemma is missing: "
            "pip install 'jaxblip[okvqa]', or set config.eval.kind to vqa."
        ) from error
    return lambda word: lemmatize(word, lang="en")


def means_by(values: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """The mean of each group, those without a name left out; groups in alphabetical order."""
    found: Mapping[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        if group:
            found[group].append(value)
    return {group: sum(found[group]) / len(found[group]) for group in sorted(found)}
