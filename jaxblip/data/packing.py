"""Several texts in one row, so that nearly no position of a batch is padding."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import BadSample, Source, counts_as_text
from jaxblip.data.text import clean_caption, join_prompt
from jaxblip.errors import RunStopped

_CHUNK = 1000  # examples whose texts are encoded together


class PackedSource:
    """A source of rows, each of whole texts: `{"texts": [example, ...], "image_id": row}`.

    Which texts share a row follows from the source, the tokenizer and the seed, and is the same in
    every epoch. Texts that cannot be used are in no row.

    Args:
      source: of examples with one caption each, whose texts are all read once, for their lengths.
      preprocess: what is made of each; its encoder's `max_tokens` is the length of a row. Where it
        draws from several prompts, there is room for the longest.
      seed: of which texts of a length share a row.
      max_bad_share: share of texts that cannot be used, above which there is no source.

    Raises:
      RunStopped: too many texts cannot be used.
    """

    def __init__(
        self, source: Source, preprocess: Preprocess, seed: int, max_bad_share: float = 0.05
    ):
        self._source = source.without_images() if hasattr(source, "without_images") else source
        self.row_tokens = preprocess.encoder.max_tokens
        self.left_out, first_bad = Counter(), ""
        lengths = np.empty(len(source), np.int32)
        for index, found in enumerate(_text_lengths(self._source, preprocess)):
            if isinstance(found, BadSample):
                self.left_out[found.reason] += 1
                first_bad = first_bad or f"{found.reason} ({found.detail})"
                found = 0
            lengths[index] = found
        if self.left_out.total() > max_bad_share * len(source):
            raise RunStopped(
                f"{self.left_out.total()} of {len(source)} texts were bad: "
                f"{counts_as_text(self.left_out)}, above data.max_bad_share={max_bad_share:g}; one "
                f"of them: {first_bad}; fix the data or raise data.max_bad_share"
            )
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        rows = plan_rows(lengths, self.row_tokens, seed)
        self._texts = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        self._ends = np.cumsum([len(row) for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin, end = self._ends[index - 1] if index else 0, self._ends[index]
        texts = [self._source[text] for text in self._texts[begin:end].tolist()]
        return {"texts": texts, "image_id": index}

    def describe(self) -> str:
        """Texts, rows and how full they are, in one line."""
        used = self.num_tokens / max(1, len(self) * self.row_tokens)
        left_out = f"; left out: {counts_as_text(self.left_out)}" if self.left_out else ""
        return (
            f"Packing: {len(self._texts):,} texts in {len(self):,} rows of {self.row_tokens} "
            f"tokens, {used:.1%} of the positions used{left_out}."
        )


@dataclasses.dataclass(frozen=True)
class PackTexts:
    """The texts of a `PackedSource`'s row one after the other, as `Preprocess` makes each.

    "segment_ids" tells them apart: 1, 2, ... in their order, 0 for padding.

    Attributes:
      preprocess: of each text, with the fields of a text alone.
    """

    preprocess: Preprocess

    @property
    def fields(self) -> tuple[str, ...]:
        return self.preprocess.fields

    def texts(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of one row, without a batch axis.

        Raises:
          BadSample: a text cannot be used any more, as it could when the rows were planned.
        """
        parts = [self.preprocess.texts(text, rng) for text in example["texts"]]
        texts = [part["text_ids"][part["text_mask"]] for part in parts]
        encoder = self.preprocess.encoder
        # Cut, because a text may have become longer since the rows were planned.
        ids = np.concatenate(texts)[: encoder.max_tokens]
        numbers = np.repeat(np.arange(1, len(texts) + 1), list(map(len, texts)))
        padding = (0, encoder.max_tokens - len(ids))
        segment_ids = np.pad(numbers[: encoder.max_tokens], padding).astype(np.int32)
        arrays = {
            "text_ids": np.pad(ids, padding, constant_values=encoder.pad_id),
            "text_mask": segment_ids > 0,
            "segment_ids": segment_ids,
        }
        return {field: arrays[field] for field in self.fields}


def plan_rows(lengths: Int[np.ndarray, " texts"], capacity: int, seed: int) -> list[list[int]]:
    """Row by row: the longest text that is left, and of the others those that fill the row best.

    Args:
      lengths: tokens of each text, at most `capacity`; one of 0 is in no row.
      seed: which of the texts of a length are taken.

    Returns:
      The indices of the texts of each row.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    texts = {
        length: list(group)
        for length, group in itertools.groupby(order.tolist(), key=lengths.tolist().__getitem__)
        if length
    }
    rows = []
    while texts:
        counts = {length: len(group) for length, group in texts.items()}
        fill = _fullest(counts, capacity)
        # As often as there are texts for it, or one search a row would take long.
        for _ in range(min(counts[length] // number for length, number in fill.items())):
            rows.append(
                [texts[length].pop() for length, number in fill.items() for _ in range(number)]
            )
        texts = {length: group for length, group in texts.items() if group}
    return rows


def _fullest(counts: dict[int, int], capacity: int) -> dict[int, int]:
    """How many texts of each length fill a row best, with the longest and rather long than short.

    Args:
      counts: length -> texts that there are of it, the longest first.
    """
    longest = next(iter(counts))
    room = capacity - longest
    others = counts | {longest: counts[longest] - 1}
    # Bit s of a number is set where some of the texts so far have s tokens together.
    sums = [1]
    for length, count in others.items():
        reached, left, step = sums[-1], min(count, room // length), 1
        while left:
            step = min(step, left)
            reached |= reached << step * length
            left, step = left - step, 2 * step
        sums.append(reached & (1 << room + 1) - 1)
    total, numbers = sums.pop().bit_length() - 1, {longest: 1}
    for length in reversed(others):
        without = sums.pop()
        while not without >> total & 1:
            numbers[length] = numbers.get(length, 0) + 1
            total -= length
    return numbers


def _text_lengths(source: Source, preprocess: Preprocess) -> Iterator[int | BadSample]:
    """Tokens of each example's text, behind the longest prompt, or why it cannot be used."""
    for begin in range(0, len(source), _CHUNK):
        texts = [
            _texts_of(source, index, preprocess)
            for index in range(begin, min(begin + _CHUNK, len(source)))
        ]
        good = itertools.chain.from_iterable(text for text in texts if isinstance(text, list))
        lengths = iter(preprocess.encoder.lengths(list(good)).tolist())
        for text in texts:
            yield text if isinstance(text, BadSample) else max(itertools.islice(lengths, len(text)))


def _texts_of(source: Source, index: int, preprocess: Preprocess) -> list[str] | BadSample:
    """The caption of an example behind each prompt that may be drawn."""
    try:
        example = source[index]
        caption = clean_caption("".join(example["captions"]), preprocess.max_words)  # there is one
        if not caption:
            raise BadSample("empty caption", f"captions {example['captions']}")
        prompts, _ = preprocess.prompts(example)
    except BadSample as bad:
        return bad
    return [join_prompt(prompt, caption) for prompt in prompts]
