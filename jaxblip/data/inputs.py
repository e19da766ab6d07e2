"""From a run's config to its tokenizer and its batches."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxblip.data.pipeline import (
    EvalSet,
    Preprocess,
    TrainBatches,
    input_tokens,
    iterate_eval_images,
)
from jaxblip.data.samples import BadSample, Source
from jaxblip.data.sources import open_source
from jaxblip.data.text import clean_caption
from jaxblip.data.tokenizers import (
    DEC_TOKEN,
    TextEncoder,
    add_dec_token,
    load_tokenizer,
    train_wordpiece,
)
from jaxblip.errors import UserError

TOKENIZER_FOLDER = "tokenizer"
# Examples that a tokenizer is trained on, the first ones of the source: more change little.
_TOKENIZER_EXAMPLES = 100_000


def open_train_source(config: ConfigDict) -> Source:
    """The source that `config.data.train` names, of a size that `data.shuffle_block` divides."""
    if not config.data.train:
        raise UserError(
            "config.data.train is empty: set --config.data.train to shapes:train or to the path of "
            "a .jsonl file."
        )
    source = open_source(config.data.train, image_size_px=config.data.image_size_px)
    block = config.data.shuffle_block
    if block < 1 or len(source) % block:
        raise UserError(
            f"data.shuffle_block={block} does not divide the {len(source)} examples of "
            f"{config.data.train}: 1 shuffles them one by one."
        )
    return source


def run_tokenizer(
    config: ConfigDict,
    workdir: str | os.PathLike,
    source: Source | None,
    of_weights: Callable[[], Any] | None = None,
) -> Any:
    """The tokenizer of a run: the one saved in its work directory, or else the config's.

    Where the config names none, it is that of the weights, or of the run, which the language model
    or the Q-Former starts from, and otherwise a WordPiece trained on the captions of `source`.

    Args:
      of_weights: makes the tokenizer of published weights, where the run starts from such.
    """
    saved = Path(workdir) / TOKENIZER_FOLDER
    if saved.is_dir():
        return load_tokenizer(str(saved))
    if config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer)
    elif of_weights is not None:
        tokenizer = of_weights()
    elif folder := _tokenizer_of_init(config):
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = train_wordpiece(_captions(source, config), config.data.vocab_size)
    if "qformer" in config.model and config.task == "stage1":
        add_dec_token(tokenizer)
    return tokenizer


def with_vocabulary(config: ConfigDict, tokenizer: Any) -> ConfigDict:
    """A copy of the config in which the fields that the tokenizer decides have their values.

    Raises:
      UserError: the tokenizer has more entries than the model's vocabulary.
    """
    config = config.copy_and_resolve_references()
    for section in ("text", "qformer", "language_model"):
        model = config.model.get(section, {})
        if "vocab_size" not in model:
            continue
        model.vocab_size = model.vocab_size or len(tokenizer)
        if model.vocab_size < len(tokenizer):
            raise UserError(
                f"The tokenizer has {len(tokenizer)} entries, but config.model.{section}."
                f"vocab_size={model.vocab_size}: set it to 0 for the tokenizer's number."
            )
    if config.model.get("dec_token_id") == -1:
        config.model.dec_token_id = tokenizer.convert_tokens_to_ids(DEC_TOKEN)
    language_model = config.model.get("language_model", {})
    if language_model.get("start_token_id") == -1:
        language_model.start_token_id = tokenizer.pad_token_id
    return config


def text_encoder(config: ConfigDict, tokenizer: Any) -> TextEncoder:
    """Texts to ids, in the form that the task reads."""
    if config.task in ("language_model", "stage2"):
        stop_token = config.data.stop_token or None
        encoder = TextEncoder(tokenizer, config.data.max_text_tokens, "language_model", stop_token)
        if has_encoder(config):
            encoder.start_id = None  # the decoder has a start token of its own (`shift_right`)
        return encoder
    return TextEncoder(tokenizer, config.data.max_text_tokens, "qformer")


def has_encoder(config: ConfigDict) -> bool:
    """Whether the language model has an encoder, which reads the prompt."""
    return "max_input_tokens" in config.data


def prompt_ids(config: ConfigDict, encoder: TextEncoder) -> list[int]:
    """What a language model reads before it generates: the prompt, behind BOS where there is one.

    An encoder reads it with an end token behind it, as in training.
    """
    if has_encoder(config):
        return input_tokens(encoder, [config.data.prompt], config.data.max_input_tokens)
    return encoder.prompt_ids(config.data.prompt)


def train_batches(
    config: ConfigDict,
    fields: tuple[str, ...],
    source: Source,
    tokenizer: Any,
    process: tuple[int, int],
    position: dict[str, Any] | None,
) -> TrainBatches:
    """The batches of a run.

    Args:
      fields: what the task reads.
      process: this process's part of each global batch, and the number of parts.
      position: `TrainBatches.state()` of the run that goes on; None begins.
    """
    data = config.data
    preprocess = Preprocess(
        fields=fields,
        image_size_px=data.image_size_px,
        encoder=text_encoder(config, tokenizer),
        prompt=data.prompt,
        max_words=data.max_words,
        max_input_tokens=data.get("max_input_tokens", 0),
        prefix_lm=config.loss.get("prefix_lm", False),
        captions_per_text=data.get("captions_per_text", 1),
        crop_scale=tuple(data.crop_scale),
        crop_aspect=tuple(data.crop_aspect),
        flip_probability=data.flip_probability,
        randaugment=data.randaugment,
        max_image_pixels=data.max_image_pixels,
    )
    process_index, process_count = process
    return TrainBatches(
        source,
        preprocess,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=process_index,
        process_count=process_count,
        start_example=position["examples_seen"] if position else 0,
        num_workers=data.num_workers,
        shuffle_block=data.shuffle_block,
        max_bad_share=data.max_bad_share,
        counters=position,
    )


def read_eval_set(config: ConfigDict) -> EvalSet:
    """The evaluation images with all their captions, in memory."""
    data = config.data
    source = open_source(config.eval.source, image_size_px=data.image_size_px)
    return iterate_eval_images(
        source, data.image_size_px, data.max_image_pixels, data.max_words, config.eval.max_images
    )


def _tokenizer_of_init(config: ConfigDict) -> str:
    for part in ("language_model", "qformer", "all"):
        folder = Path(config.init.get(part, "")) / TOKENIZER_FOLDER
        if config.init.get(part, "") and folder.is_dir():
            return str(folder)
    return ""


def _captions(source: Source, config: ConfigDict) -> Iterator[str]:
    if hasattr(source, "without_images"):
        source = source.without_images()
    for index in itertools.islice(range(len(source)), _TOKENIZER_EXAMPLES):
        try:
            captions = source[index]["captions"]
        except BadSample:
            continue
        for caption in captions:
            yield config.data.prompt + clean_caption(caption, config.data.max_words)
