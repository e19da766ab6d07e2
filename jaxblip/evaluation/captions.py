"""Captions against their references: exact match, and BLEU-4 through sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import sacrebleu


def is_exact(prediction: str, references: Sequence[str]) -> bool:
    """Whether a caption equals one of its references but for white space."""
    return _normalised(prediction) in map(_normalised, references)


def caption_metrics(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Scores captions, each against all references of its image.

    Args:
        predictions: one caption an image.
        references: the true captions of each image, one or more; their number may vary.

    Returns:
        "caption_exact": share (0-1) of captions that are exactly one of their references, white
        space aside; "bleu4": corpus BLEU-4, 0-100, as `sacrebleu.corpus_bleu` computes it (13a
        tokens, the reference nearest in length for the brevity penalty).

    Raises:
        ValueError: nothing to score, lists of different lengths, or an image without a reference.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} lists of references; "
            "expected as many of both, at least one"
        )
    without = [index for index, captions in enumerate(references) if not captions]
    if without:
        raise ValueError(f"prediction {without[0]} has no reference ({len(without)} have none)")
    exact = sum(map(is_exact, predictions, references)) / len(predictions)
    # sacrebleu wants one stream per reference position, and cuts off silently at the shortest;
    # None, unlike an empty string, means that a segment has no reference in that stream.
    streams = [list(stream) for stream in zip_longest(*references)]
    bleu = sacrebleu.corpus_bleu(list(predictions), streams)
    return {"caption_exact": exact, "bleu4": float(min(bleu.score, 100.0))}


def _normalised(caption: str) -> str:
    return " ".join(caption.split())
