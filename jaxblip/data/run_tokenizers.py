"""From a run's config to its tokenizers, and what they decide of the config."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxblip.data.mixture import TrainSource
from jaxblip.data.run_sources import reads_instructions, train_prompts
from jaxblip.data.samples import BadSample, Source
from jaxblip.data.text import clean_caption, clean_question, fill_prompt, join_prompt
from jaxblip.data.tokenizers import (
    DEC_TOKEN,
    ENC_TOKEN,
    add_blip_tokens,
    add_dec_token,
    load_tokenizer,
    save_tokenizer,
    train_wordpiece,
)
from jaxblip.errors import UserError

TOKENIZER_FOLDER = "tokenizer"
QFORMER_TOKENIZER_FOLDER = "qformer_tokenizer"  # where the Q-Former has another one
# Examples that a tokenizer is trained on, the first ones of each source: more change little.
_TOKENIZER_EXAMPLES = 100_000


def run_tokenizer(
    config: ConfigDict,
    workdir: str | os.PathLike,
    sources: Sequence[TrainSource],
    of_weights: Callable[[], Any] | None = None,
) -> Any:
    """The tokenizer of a run: the one saved in its work directory, or else the config's.

    Where the config names none, it is that of the weights, or of the run, which the language model
    or the Q-Former starts from, and otherwise a WordPiece trained on the texts of `sources`.

    Args:
      of_weights: makes the tokenizer of published weights, where the run starts from such.
    """
    saved = Path(workdir) / TOKENIZER_FOLDER
    if saved.is_dir():
        return load_tokenizer(str(saved))
    tokenizer = _new_tokenizer(config, "tokenizer", sources, of_weights, _tokenizer_of_init(config))
    if "qformer" in config.model and config.task == "stage1":
        add_dec_token(tokenizer)
    if config.task.startswith("blip_"):
        add_blip_tokens(tokenizer)
    return tokenizer


def run_qformer_tokenizer(
    config: ConfigDict,
    workdir: str | os.PathLike,
    sources: Sequence[TrainSource],
    of_weights: Callable[[], Any] | None = None,
) -> Any:
    """The tokenizer of a Q-Former beside a language model that has another one; else None.

    Found as `run_tokenizer` does. Has [DEC] where the vocabulary has room for it, as in stage 1,
    whose text side this is.
    """
    if "qformer_tokenizer" not in config.data or config.model.connector != "qformer":
        return None
    saved = Path(workdir) / QFORMER_TOKENIZER_FOLDER
    if saved.is_dir():
        return load_tokenizer(str(saved))
    of_init = _qformer_tokenizer_of_init(config)
    tokenizer = _new_tokenizer(config, "qformer_tokenizer", sources, of_weights, of_init)
    if (config.model.qformer.vocab_size or math.inf) > len(tokenizer):
        add_dec_token(tokenizer)
    return tokenizer


def _new_tokenizer(
    config: ConfigDict,
    field: str,
    sources: Sequence[TrainSource],
    of_weights: Callable[[], Any] | None,
    of_init: str,
) -> Any:
    """Of a field of `config.data`: what it names, or what the run starts from has, or a new one."""
    if name := config.data[field]:
        return load_tokenizer(name, f"data.{field}")
    if of_weights is not None:
        return of_weights()
    if of_init:
        return load_tokenizer(of_init)
    return train_wordpiece(_texts(sources), config.data.vocab_size)


def save_tokenizers(tokenizer: Any, qformer_tokenizer: Any, workdir: str | os.PathLike) -> None:
    """Writes those of a run, the second one if it is not None."""
    save_tokenizer(tokenizer, Path(workdir) / TOKENIZER_FOLDER)
    if qformer_tokenizer is not None:
        save_tokenizer(qformer_tokenizer, Path(workdir) / QFORMER_TOKENIZER_FOLDER)


def with_vocabulary(
    config: ConfigDict, tokenizer: Any, qformer_tokenizer: Any = None
) -> ConfigDict:
    """A copy of the config in which the fields that the tokenizers decide have their values.

    Args:
      qformer_tokenizer: of the Q-Former, where it has another one.

    Raises:
      UserError: the tokenizer has more entries than the model's vocabulary.
    """
    config = config.copy_and_resolve_references()
    for section in ("text", "qformer", "language_model"):
        model = config.model.get(section, {})
        if "vocab_size" not in model:
            continue
        is_other = section == "qformer" and qformer_tokenizer is not None
        size = len(qformer_tokenizer if is_other else tokenizer)
        model.vocab_size = model.vocab_size or size
        if model.vocab_size < size:
            raise UserError(
                f"The tokenizer has {size} entries, but config.model.{section}."
                f"vocab_size={model.vocab_size}: leave data.tokenizer empty for that of the "
                "weights that the run starts from, or, without any, set vocab_size to 0."
            )
    for field, token in ("dec_token_id", DEC_TOKEN), ("enc_token_id", ENC_TOKEN):
        if config.model.get(field) == -1:
            config.model[field] = tokenizer.convert_tokens_to_ids(token)
    language_model = config.model.get("language_model", {})
    if language_model.get("start_token_id") == -1:
        language_model.start_token_id = tokenizer.pad_token_id
    return config


def with_some_vocabulary(config: ConfigDict) -> ConfigDict:
    """A copy of the config with which shapes can be checked before there is a tokenizer."""
    config = config.copy_and_resolve_references()
    for section in config.model.values():
        if isinstance(section, ConfigDict) and section.get("vocab_size") == 0:
            section.vocab_size = 1  # any other fits the rest of the model as well
    return config


def _qformer_tokenizer_of_init(config: ConfigDict) -> str:
    """That of a run of `instruct`, or the only one of a run of stage 1, whose text side this is."""
    for run in filter(None, (config.init.qformer, config.init.all)):
        for folder in (Path(run) / name for name in (QFORMER_TOKENIZER_FOLDER, TOKENIZER_FOLDER)):
            if folder.is_dir() and (folder.name != TOKENIZER_FOLDER or _task_of(run) == "stage1"):
                return str(folder)
    return ""


def _task_of(run: str) -> str:
    saved = Path(run) / "config.json"
    return json.loads(saved.read_text(encoding="utf-8"))["task"] if saved.is_file() else ""


def _tokenizer_of_init(config: ConfigDict) -> str:
    # The tokenizer of a Q-Former that reads is not the language model's.
    parts = ("language_model", "qformer", "all")
    for part in parts if "qformer_tokenizer" not in config.data else ("language_model", "all"):
        folder = Path(config.init.get(part, "")) / TOKENIZER_FOLDER
        if config.init.get(part, "") and folder.is_dir():
            return str(folder)
    return ""


def _texts(sources: Sequence[TrainSource]) -> Iterator[str]:
    """What a tokenizer is trained on: of each source as many examples."""
    for each in sources:
        yield from _texts_of(each.source, each.config, _TOKENIZER_EXAMPLES // len(sources))


def _texts_of(source: Source, config: ConfigDict, examples: int) -> Iterator[str]:
    source = getattr(source, "examples", source)  # with all captions of an image at once
    if hasattr(source, "without_images"):
        source = source.without_images()
    # Each prompt before as many captions, also that of evaluation and generation.
    templates = train_prompts(config)
    prompts = itertools.cycle(dict.fromkeys((*templates, config.data.prompt)))
    instructed = reads_instructions(config, templates)
    for index in range(min(examples, len(source))):
        try:
            example = source[index]
        except BadSample:
            continue
        max_words = config.data.max_words
        instruction = clean_question(example.get("instruction", ""), max_words)
        if instructed:  # also where it does not stand before the captions
            yield fill_prompt(config.data.prompt, instruction) or instruction
        for caption in example["captions"]:
            prompt = fill_prompt(next(prompts), instruction)
            yield join_prompt(prompt, clean_caption(caption, max_words))
