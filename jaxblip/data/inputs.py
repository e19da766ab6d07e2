"""From a run's config to its tokenizer and its batches."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxblip.data.eval_set import EvalSet, iterate_eval_images
from jaxblip.data.pipeline import TrainBatches
from jaxblip.data.preprocess import Preprocess, input_tokens
from jaxblip.data.samples import BadSample, Source
from jaxblip.data.sources import open_source
from jaxblip.data.text import (
    INSTRUCTION,
    clean_caption,
    clean_question,
    fill_prompt,
    join_prompt,
)
from jaxblip.data.tokenizers import (
    DEC_TOKEN,
    ENC_TOKEN,
    TextEncoder,
    add_blip_tokens,
    add_dec_token,
    load_tokenizer,
    save_tokenizer,
    train_wordpiece,
)
from jaxblip.errors import UserError

TOKENIZER_FOLDER = "tokenizer"
QFORMER_TOKENIZER_FOLDER = "qformer_tokenizer"  # where the Q-Former has another one
# Examples that a tokenizer is trained on, the first ones of the source: more change little.
_TOKENIZER_EXAMPLES = 100_000


def open_train_source(config: ConfigDict) -> Source:
    """The source that `config.data.train` names, checked against batch, blocks and instructions."""
    if not config.data.train:
        raise UserError(
            "config.data.train is empty: set --config.data.train to shapes:train or to the path of "
            "your data, such as a .jsonl file."
        )
    source = _open(config, config.data.train)
    if len(source) < config.batch_size:
        raise UserError(
            f"{config.data.train} has {len(source)} examples, fewer than batch_size="
            f"{config.batch_size}, so that a batch would repeat some: set --config.batch_size to "
            f"{len(source)} or less, or give it more examples."
        )
    block = config.data.shuffle_block
    if block < 1 or len(source) % block:
        raise UserError(
            f"data.shuffle_block={block} does not divide the {len(source)} examples of "
            f"{config.data.train}: --config.data.shuffle_block=1 shuffles them one by one."
        )
    _check_instructions(config, source, config.data.train)
    return source


def _open(config: ConfigDict, spec: str) -> Source:
    data = config.data
    return open_source(
        spec,
        image_size_px=data.image_size_px,
        fields=data.fields.to_dict(),
        image_folder=data.image_folder,
    )


def reads_instructions(config: ConfigDict) -> bool:
    """Whether every example must have an instruction.

    So it is where the prompt has a place for it, and where a task reads the instruction by itself.
    """
    prompt = config.data.prompt
    return INSTRUCTION in prompt or (not prompt and "max_instruction_tokens" in config.data)


def _check_instructions(config: ConfigDict, source: Source, name: str) -> None:
    if not reads_instructions(config) or getattr(source, "has_instructions", False):
        return
    reader = f"data.prompt={config.data.prompt!r}" if config.data.prompt else config.task
    raise UserError(
        f"Examples of {name} have no instruction, which {reader} reads: give each line a "
        '"question" and an "answer", or an "instruction" and an "output".'
    )


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
    tokenizer = _new_tokenizer(config, "tokenizer", source, of_weights, _tokenizer_of_init(config))
    if "qformer" in config.model and config.task == "stage1":
        add_dec_token(tokenizer)
    if config.task.startswith("blip_"):
        add_blip_tokens(tokenizer)
    return tokenizer


def run_qformer_tokenizer(
    config: ConfigDict,
    workdir: str | os.PathLike,
    source: Source | None,
    of_weights: Callable[[], Any] | None = None,
) -> Any:
    """The tokenizer of a Q-Former beside a language model that has another one; else None.

    Found as `run_tokenizer` does. Has [DEC] where the vocabulary has room for it, as in stage 1,
    whose text side this is.
    """
    if "qformer_tokenizer" not in config.data:
        return None
    saved = Path(workdir) / QFORMER_TOKENIZER_FOLDER
    if saved.is_dir():
        return load_tokenizer(str(saved))
    of_init = _qformer_tokenizer_of_init(config)
    tokenizer = _new_tokenizer(config, "qformer_tokenizer", source, of_weights, of_init)
    if (config.model.qformer.vocab_size or math.inf) > len(tokenizer):
        add_dec_token(tokenizer)
    return tokenizer


def _new_tokenizer(
    config: ConfigDict,
    field: str,
    source: Source | None,
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
    return train_wordpiece(_captions(source, config), config.data.vocab_size)


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
                f"vocab_size={model.vocab_size}: set it to 0 for the tokenizer's number."
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


def text_encoder(config: ConfigDict, tokenizer: Any) -> TextEncoder:
    """Texts to ids, in the form that the task reads."""
    if "language_model" in config.model:
        stop_token = config.data.stop_token or None
        encoder = TextEncoder(tokenizer, config.data.max_text_tokens, "language_model", stop_token)
        if has_encoder(config):
            encoder.start_id = None  # the decoder has a start token of its own (`shift_right`)
        return encoder
    return TextEncoder(tokenizer, config.data.max_text_tokens, "qformer")


def has_encoder(config: ConfigDict) -> bool:
    """Whether the language model has an encoder, which reads the prompt."""
    return "max_input_tokens" in config.data


def instruction_encoder(config: ConfigDict, tokenizer: Any) -> TextEncoder:
    """Instructions to ids; of one that is too long the first words are left out."""
    length = config.data.max_instruction_tokens
    return TextEncoder(tokenizer, length, "qformer", truncation="left")


def prompt_ids(config: ConfigDict, encoder: TextEncoder, instruction: str = "") -> list[int]:
    """What a language model reads before it generates: the prompt, behind BOS where there is one.

    An encoder reads it with an end token behind it, as in training.
    """
    prompt = fill_prompt(config.data.prompt, instruction)
    if has_encoder(config):
        return input_tokens(encoder, [prompt], config.data.max_input_tokens)
    ids = encoder.prompt_ids(prompt)
    cut = max(0, len(ids) - config.data.get("max_instruction_tokens", len(ids)))
    start = len(encoder.prompt_ids(""))
    return ids[:start] + ids[start + cut :]


def train_batches(
    config: ConfigDict,
    fields: tuple[str, ...],
    source: Source,
    tokenizer: Any,
    process: tuple[int, int],
    position: dict[str, Any] | None,
    qformer_tokenizer: Any = None,
) -> TrainBatches:
    """The batches of a run.

    Args:
      fields: what the task reads.
      qformer_tokenizer: for instructions; by default `tokenizer`.
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
        instruction_encoder=(
            instruction_encoder(config, qformer_tokenizer or tokenizer)
            if "max_instruction_tokens" in data
            else None
        ),
        max_instruction_tokens=data.get("max_instruction_tokens", 0),
        captions_per_text=data.get("captions_per_text", 1),
        crop_scale=tuple(data.crop_scale),
        crop_aspect=tuple(data.crop_aspect),
        interpolation=data.interpolation,
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
    source = _open(config, config.eval.source)
    _check_instructions(config, source, config.eval.source)
    return iterate_eval_images(
        source,
        data.image_size_px,
        data.max_image_pixels,
        data.max_words,
        config.eval.max_images,
        reads_instructions(config),
        data.resize,
        data.interpolation,
    )


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


def _captions(source: Source, config: ConfigDict) -> Iterator[str]:
    if hasattr(source, "without_images"):
        source = source.without_images()
    for index in itertools.islice(range(len(source)), _TOKENIZER_EXAMPLES):
        try:
            example = source[index]
        except BadSample:
            continue
        max_words = config.data.max_words
        instruction = clean_question(example.get("instruction", ""), max_words)
        prompt = fill_prompt(config.data.prompt, instruction)
        if reads_instructions(config):
            yield prompt or instruction  # also where it does not stand before the captions
        for caption in example["captions"]:
            yield join_prompt(prompt, clean_caption(caption, max_words))
