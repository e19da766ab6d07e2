"""A stage-2 model on any number of images and prompts, in batches of few shapes.

What is compiled depends on shapes alone. Batches are filled up to powers of two, and so are prompts
and candidates, so that other images and other words run what has been compiled before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from jaxblip import sharding
from jaxblip.data import inputs
from jaxblip.decoding.generation import compiler_options, decode, jit_on_mesh, prefill
from jaxblip.decoding.ranking import candidate_log_likelihoods, read_input
from jaxblip.decoding.search import DecodingConfig
from jaxblip.decoding.streaming import advance_stream, begin_stream, text_pieces
from jaxblip.errors import UserError
from jaxblip.tasks.stage2 import Stage2Task

Images = UInt8[np.ndarray, "images size size 3"]
Tokens = Sequence[int]

SHORTEST_PROMPT = 8  # tokens that prompts of 2 and more are padded to, or to its doubles
SHORTEST_CANDIDATE = 4  # the same of candidates, stop token included
RANKED_TOKENS = 4096  # tokens of candidates whose logits are in memory at a time


class Prompt(NamedTuple):
    """What is read before a text.

    Attributes:
      tokens: by the language model.
      instruction: by a Q-Former that reads the prompt as well, in its own vocabulary.
    """

    tokens: Tokens
    instruction: Tokens = ()


class Batch(NamedTuple):
    """Rows that are computed together; those beyond `count` repeat others.

    Attributes:
      start: number of rows before this batch.
      images: the distinct ones of the batch, and repeated ones.
      index: of each row, in `images`.
    """

    start: int
    count: int
    images: Images
    index: Int[np.ndarray, " rows"]


class ImageToText:
    """The compiled functions of a stage-2 task. Parameters are an argument of every call.

    Images are given once, and `rows` says which image each row of the result is about: several
    prompts, or several captions, of an image cost its encoding once.

    Attributes:
      encoder: text to tokens, for prompts and candidates.
    """

    def __init__(self, task: Stage2Task, tokenizer: Any, mesh: Mesh):
        self.task, self.tokenizer, self.mesh = task, tokenizer, mesh
        self.encoder = inputs.text_encoder(task.config, tokenizer)
        self._whole = NamedSharding(mesh, PartitionSpec())
        rows = sharding.batch_sharding(mesh)
        jit = partial(jit_on_mesh, mesh=mesh, compiler_options=compiler_options(mesh))
        self._encode = jit(self._visual_tokens, out_shardings=rows)
        compiled = partial(jit, static_argnames="config")
        self._prefill = jit(self._prefilled, static_argnames=("max_new_tokens", "num_beams"))
        self._decode = compiled(
            self._decoded, out_shardings=(self._whole, None), donate_argnames="state"
        )
        self._begin = compiled(self._begun, out_shardings=(self._whole, None))
        self._advance = compiled(
            self._advanced, out_shardings=(self._whole, None), donate_argnames="stream"
        )
        self._read = jit(self._read_rows)
        self._score = jit(self._scored, out_shardings=self._whole)

    def decoding_config(self, **changes: Any) -> DecodingConfig:
        """How the run's evaluation decodes (`config.eval`), but for `changes`."""
        settings = self.task.config.eval
        fields = {
            "max_new_tokens": settings.max_new_tokens,
            "min_new_tokens": settings.min_new_tokens,
            "num_beams": settings.num_beams,
            "length_penalty": settings.length_penalty,
        }
        return DecodingConfig(
            stop_token_id=self.encoder.stop_id,
            pad_token_id=self.encoder.pad_id,
            **(fields | changes),
        )

    def prompt(self, text: str) -> Prompt:
        """What is read of the words of a user."""
        return Prompt(self.prompt_tokens(text))

    def prompt_of_example(self, instruction: str = "", prompt: str | None = None) -> Prompt:
        """What is read of an example of training or evaluation, cut off as in training.

        Args:
          prompt: with {} for the instruction; by default that of the run.
        """
        return Prompt(inputs.prompt_ids(self.task.config, self.encoder, instruction, prompt))

    def prompt_tokens(self, text: str) -> list[int]:
        """What the language model reads of a prompt: with BOS, or for an encoder an end token."""
        if inputs.has_encoder(self.task.config):
            # The task's `max_input_tokens` is about training; words of the user's are not cut off.
            return [*self.encoder.prompt_ids(text), self.encoder.stop_id]
        return self.encoder.prompt_ids(text)

    def candidate_tokens(self, prompt: str, candidate: str) -> list[int]:
        """What is scored of a text behind a prompt: its tokens there, and the stop token."""
        start = len(self.encoder.prompt_ids(""))
        before = []
        if not inputs.has_encoder(self.task.config) and prompt.strip():
            # Tokenized with the prompt: the first word of a text begins with a space behind one.
            before = self.encoder.prompt_ids(prompt)[start:]
            tokens = self.encoder.prompt_ids(f"{prompt.rstrip()} {candidate}")[start:]
        else:
            tokens = self.encoder.prompt_ids(candidate)[start:]
        if tokens[: len(before)] != before:
            before, tokens = [], self.encoder.prompt_ids(candidate)[start:]
        return [*tokens[len(before) :], self.encoder.stop_id]

    def generate(
        self,
        params: Any,
        images: Images,
        prompts: Sequence[Prompt],
        config: DecodingConfig,
        *,
        rows: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[str]:
        """A text for each row, without its prompt.

        Args:
          params: of the whole model.
          prompts: of each row (`prompt`); lengths may differ.
          rows: the image of each row; by default row i is about image i.
          seed: of sampling. The draws of a row depend on its place among the rows, and on nothing
            of the others.

        Raises:
          UserError: what `decoding.generate` raises.
        """
        batches = self.generate_batches(params, images, prompts, config, rows=rows, seed=seed)
        return [text for texts in batches for text in texts]

    def generate_batches(
        self,
        params: Any,
        images: Images,
        prompts: Sequence[Prompt],
        config: DecodingConfig,
        *,
        rows: Sequence[int] | None = None,
        seed: int = 0,
        start: int = 0,
    ) -> Iterator[list[str]]:
        """As `generate`, the texts of each batch when they are made.

        Args:
          start: rows that are there already: whole batches, which are left out.
        """
        length = self._prompt_length(prompts, config.max_new_tokens)
        room = dict(max_new_tokens=config.max_new_tokens, num_beams=config.num_beams)
        for batch in self._batches(images, rows):
            if batch.start < start:
                continue
            arrays = self._row_arrays(params, batch, prompts, length)
            read = self._prefill(params, *arrays, **room)
            seeds = np.uint32([seed, batch.start])
            ids, _ = self._decode(params, *read, seeds, config=config)
            yield [self._text(row).strip() for row in np.asarray(ids)[: batch.count].tolist()]

    def stream(
        self, params: Any, images: Images, prompt: Prompt, config: DecodingConfig, seed: int = 0
    ) -> Iterator[str]:
        """The text about one image, piece by piece; joined, they are what `generate` gives.

        Args:
          images: one.

        Raises:
          UserError: as `generate`, and for beam search.
        """
        (batch,) = self._batches(images, [0])
        length = self._prompt_length([prompt], config.max_new_tokens)
        arrays = self._row_arrays(params, batch, [prompt], length)
        seeds = np.uint32([seed, 0])
        first = self._begin(params, *arrays, seeds, config=config)

        def tokens(last, stream):
            for index in range(config.max_new_tokens):
                if index:
                    last, stream = self._advance(params, stream, seeds, config=config)
                token = int(np.asarray(last)[0])
                if token == self.encoder.stop_id:
                    return
                yield token

        cleans_up = getattr(self.tokenizer, "clean_up_tokenization_spaces", False)
        return text_pieces(tokens(*first), self._text, by_word=cleans_up)

    def rank(
        self,
        params: Any,
        images: Images,
        prompts: Sequence[Prompt],
        candidates: Sequence[Sequence[Tokens]],
        *,
        rows: Sequence[int] | None = None,
    ) -> Float[np.ndarray, "rows candidates"]:
        """Log-likelihood of each candidate behind each row's image and prompt.

        Args:
          params, prompts, rows: as in `generate`.
          candidates: those of each row (`candidate_tokens`), as many of each.

        Raises:
          UserError: image, prompt and candidate exceed the language model's positions.
        """
        count = len(candidates[0])
        longest = max(len(tokens) for row in candidates for tokens in row)
        self._check_positions(max(len(prompt.tokens) for prompt in prompts), longest)
        prompt_length = self._prompt_length(prompts, 0)
        length = power_of_two(longest, SHORTEST_CANDIDATE)
        result = np.empty((len(prompts), count), np.float32)
        for batch in self._batches(images, rows):
            arrays = self._row_arrays(params, batch, prompts, prompt_length)
            prefix = self._read(params, *arrays)
            at_a_time = max(1, RANKED_TOKENS // (len(batch.index) * length))
            at_a_time = min(power_of_two(at_a_time + 1) // 2, power_of_two(count))
            chosen = candidates[batch.start : batch.start + batch.count]
            for first in range(0, count, at_a_time):
                which = np.resize(np.arange(first, min(first + at_a_time, count)), at_a_time)
                flat = [row[place] for row in chosen for place in which]
                ids, valid = (
                    array.reshape(batch.count, at_a_time, length)
                    for array in self._padded(flat, length)
                )
                filled = np.resize(np.arange(batch.count), len(batch.index))
                scores = self._score(
                    params, prefix, self._place(ids[filled]), self._place(valid[filled])
                )
                into = result[batch.start : batch.start + batch.count, first : first + at_a_time]
                into[:] = np.asarray(scores)[: batch.count, : into.shape[1]]
        return result

    @property
    def _language_model(self) -> nn.Module:
        return self.task.language_model

    # What is compiled.

    def _visual_tokens(self, params, images):
        return self.task.apply(params, self.task.normalize_images(images), method="visual_tokens")

    def _input(self, params, visual, index, prompt_ids, prompt_valid) -> dict[str, Array]:
        """What the language model reads of each row: `embeddings`, and which are `valid`.

        The padding of prompts stands behind them: where an encoder's positions are distances, it
        must not come between the visual tokens and the prompt.
        """
        words = self._language_model.apply(
            {"params": params["language_model"]}, prompt_ids, method="embed"
        )
        visual = visual[index].astype(words.dtype)
        valid = jnp.concatenate([jnp.ones(visual.shape[:2], bool), prompt_valid], axis=1)
        return {"embeddings": jnp.concatenate([visual, words], axis=1), "valid": valid}

    def _said(self, prompt_ids, prompt_valid) -> Array | None:
        """What a repetition penalty counts as said: a decoder's prompt, as in transformers."""
        if self._language_model.config.is_encoder_decoder:
            return None
        return jnp.where(prompt_valid, prompt_ids, -1)

    def _prefilled(self, params, visual, index, prompt_ids, prompt_valid, **room):
        """Scores, state and said ids, from which `_decoded` goes on."""
        read = self._input(params, visual, index, prompt_ids, prompt_valid)
        logits, state = prefill(self._language_model, params["language_model"], **read, **room)
        return logits, state, self._said(prompt_ids, prompt_valid)

    def _decoded(self, params, logits, state, said, seeds, *, config):
        own, rng = params["language_model"], random_key(seeds)
        return decode(self._language_model, own, logits, state, config, rng, said)

    def _begun(self, params, visual, index, prompt_ids, prompt_valid, seeds, *, config):
        read = self._input(params, visual, index, prompt_ids, prompt_valid)
        said, own = self._said(prompt_ids, prompt_valid), params["language_model"]
        settings = dict(config=config, rng=random_key(seeds), said_ids=said)
        stream = begin_stream(self._language_model, own, **read, **settings)
        return stream.last_ids(), stream

    def _advanced(self, params, stream, seeds, *, config):
        own = params["language_model"]
        stream = advance_stream(self._language_model, own, stream, config, random_key(seeds))
        return stream.last_ids(), stream

    def _read_rows(self, params, visual, index, prompt_ids, prompt_valid):
        read = self._input(params, visual, index, prompt_ids, prompt_valid)
        return read_input(self._language_model, params["language_model"], **read)

    def _scored(self, params, prefix, ids, valid):
        own = params["language_model"]
        return candidate_log_likelihoods(self._language_model, own, prefix, ids, valid)

    # Shapes.

    def _batches(self, images: Images, rows: Sequence[int] | None) -> list[Batch]:
        rows = np.arange(len(images)) if rows is None else np.asarray(rows)
        largest, mesh = self.task.config.eval.batch_size, self.mesh
        size = batch_bucket(len(rows), largest, mesh)
        starts = range(0, len(rows), size)
        parts = [np.unique(rows[i : i + size], return_inverse=True) for i in starts]
        # One number of images for all batches, although the last one may have fewer.
        num_images = batch_bucket(max(len(used) for used, _ in parts), largest, mesh)
        return [
            Batch(
                number * size,
                len(index),
                images[np.resize(used, num_images)],
                np.resize(index, size).astype(np.int32),
            )
            for number, (used, index) in enumerate(parts)
        ]

    def _prompt_length(self, prompts: Sequence[Prompt], max_new_tokens: int) -> int:
        """Tokens that all prompts are padded to."""
        longest = max(len(prompt.tokens) for prompt in prompts)
        if longest < 2:  # no prompt: the most frequent case is without padding
            return longest
        length = power_of_two(longest, SHORTEST_PROMPT)
        if (room := self._positions()) is not None:
            length = min(length, room - max_new_tokens)
        return max(length, longest)

    def _positions(self) -> int | None:
        """Positions that the visual tokens leave to the text; None for no limit."""
        config = self._language_model.config
        if config.is_encoder_decoder:
            return None
        return config.max_positions - self.task.model.num_visual_tokens

    def _check_positions(self, prompt: int, candidate: int) -> None:
        room = self._positions()
        if room is not None and prompt + candidate - 1 > room:
            raise UserError(
                f"A prompt of {prompt} tokens and a candidate of {candidate} are too long "
                f"together: behind an image the language model has {room} positions; shorten one."
            )

    def _row_arrays(
        self, params: Any, batch: Batch, prompts: Sequence[Prompt], length: int
    ) -> tuple[jax.Array, ...]:
        """What is seen, its place for each row, the row's prompt and the prompt's validity."""
        chosen = prompts[batch.start : batch.start + batch.count]
        seen = self._seen(params, batch, chosen)
        return *seen, *self._row_tokens(batch, [prompt.tokens for prompt in chosen], length)

    def _seen(
        self, params: Any, batch: Batch, prompts: Sequence[Prompt]
    ) -> tuple[jax.Array, jax.Array]:
        """The visual tokens of a batch, and which of them each row reads."""
        return self._encode(params, self._place(batch.images)), self._place(batch.index)

    def _row_tokens(
        self, batch: Batch, tokens: Sequence[Tokens], length: int, pad_id: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Ids of each row and which of them count, on the devices."""
        filled = np.resize(np.arange(batch.count), len(batch.index))
        ids, valid = self._padded(tokens, length, pad_id)
        return self._place(ids[filled]), self._place(valid[filled])

    def _padded(
        self, rows: Sequence[Tokens], length: int, pad_id: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        pad_id = self.encoder.pad_id if pad_id is None else pad_id
        ids = np.full((len(rows), length), pad_id, np.int32)
        valid = np.arange(length) < np.array([len(tokens) for tokens in rows])[:, None]
        ids[valid] = [token for tokens in rows for token in tokens]
        return ids, valid

    def _place(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(
            array.shape, sharding.batch_sharding(self.mesh), lambda index: array[index]
        )

    def _text(self, ids: list[int]) -> str:
        """The text before the stop token."""
        if self.encoder.stop_id in ids:
            ids = ids[: ids.index(self.encoder.stop_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def batch_bucket(count: int, largest: int, mesh: Mesh) -> int:
    """Rows of a batch for `count` rows: a power of two a device group, and no more than `largest`.

    `largest` is rounded up to what the mesh divides.
    """
    shards = sharding.batch_shards(mesh)
    return shards * min(power_of_two(-(-count // shards)), -(-largest // shards))


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number`, and at least `least`, which is one."""
    return max(least, 1 << max(number - 1, 0).bit_length())


def random_key(seeds: Int[Array, "2"]) -> jax.Array:
    """Of the draws of a batch, from the seed and the batch's first row."""
    return jax.random.fold_in(jax.random.key(seeds[0]), seeds[1])
