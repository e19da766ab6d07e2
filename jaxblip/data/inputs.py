"""From a run's config to its tokenizer and its batches."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxblip.data.captions import EachCaption
from jaxblip.data.eval_set import EvalSet, iterate_eval_images
from jaxblip.data.mixture import (
    WEIGHT,
    TrainSource,
    configs_of_sources,
    section_of,
    shares,
)
from jaxblip.data.packing import PackedSource, PackTexts
from jaxblip.data.pipeline import Part, TrainBatches
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
# Examples that a tokenizer is trained on, the first ones of each source: more change little.
_TOKENIZER_EXAMPLES = 100_000
CAPTIONS = ("sample", "all")  # values of config.data.captions


def open_train_sources(config: ConfigDict) -> list[TrainSource]:
    """The sources of a run, checked against batch, blocks and instructions.

    Without config.data.mixture that is the one that config.data.train names.
    """
    configs = configs_of_sources(config)
    opened = {name: _open_train_source(each) for name, each in configs.items()}
    sizes = [len(source) for source in opened.values()]
    weights = [config.data.mixture.get(name, {}).get(WEIGHT, 1.0) for name in configs]
    if sum(sizes) < config.batch_size:
        names = ", ".join(each.data.train for each in configs.values())
        raise UserError(
            f"{names} has {sum(sizes)} examples, fewer than batch_size={config.batch_size}, so "
            f"that a batch would repeat some: set --config.batch_size to {sum(sizes)} or less, or "
            "give it more examples."
        )
    for name, source in opened.items():
        _check_block(configs[name], name, len(source))
    parts = shares(weights, sizes, config.data.mixture_exponent)
    return [
        TrainSource(name, configs[name], opened[name], share)
        for name, share in zip(configs, parts, strict=True)
    ]


def _open_train_source(config: ConfigDict) -> Source:
    if not config.data.train:
        raise UserError(
            "config.data.train is empty: set --config.data.train to shapes:train or to the path of "
            "your data, such as a .jsonl file."
        )
    data, prompts = config.data, _train_prompts(config)
    if data.captions not in CAPTIONS:
        raise UserError(
            f"data.captions={data.captions!r} is none of {', '.join(CAPTIONS)}: choose one."
        )
    source = _open(config, data.train, data)
    _check_instructions(config, source, data.train, prompts)
    return EachCaption(source) if _why_all(data) else source


def _why_all(data: ConfigDict) -> str:
    """The setting that makes every caption an example; "" where each image is one."""
    if data.captions == "all":
        return "data.captions='all'"
    return "data.packing=True" if data.get("packing") else ""


def _check_block(config: ConfigDict, name: str, size: int) -> None:
    block, why_all = config.data.shuffle_block, _why_all(config.data)
    if why_all and block != 1:
        raise UserError(
            f"data.shuffle_block={block} would keep captions of one image together, which are no "
            f"negatives of each other, where {why_all}: set "
            f"--config.{section_of(name)}.shuffle_block=1."
        )
    if block < 1 or size % block:
        raise UserError(
            f"data.shuffle_block={block} does not divide the {size} examples of "
            f"{config.data.train}: --config.{section_of(name)}.shuffle_block=1 shuffles them one "
            "by one."
        )


def _open(config: ConfigDict, spec: str, section: ConfigDict) -> Source:
    """A source with the field map and the image folder of `section`, or else of config.data."""
    named = any(section.fields.values())
    return open_source(
        spec,
        image_size_px=config.data.image_size_px,
        fields=(section if named else config.data).fields.to_dict(),
        image_folder=section.image_folder or config.data.image_folder,
    )


def reads_instructions(config: ConfigDict, prompts: Sequence[str] = ()) -> bool:
    """Whether every example must have an instruction.

    So it is where a prompt has a place for it, and where a task reads the instruction by itself.

    Args:
      prompts: by default the one of evaluation and generation.
    """
    by_itself = "max_instruction_tokens" in config.data
    return any(
        INSTRUCTION in prompt or (not prompt and by_itself)
        for prompt in prompts or (config.data.prompt,)
    )


def _train_prompts(config: ConfigDict) -> tuple[str, ...]:
    """Of which one stands before each caption in training."""
    return config.data.get("templates") or (config.data.prompt,)


def _check_instructions(
    config: ConfigDict, source: Source, name: str, prompts: Sequence[str]
) -> None:
    reading = [prompt for prompt in prompts if reads_instructions(config, [prompt])]
    if not reading or getattr(source, "has_instructions", False):
        return
    prompt, field = reading[0], "prompt" if reading[0] == config.data.prompt else "templates"
    reader = f"data.{field}={prompt!r}" if prompt else config.task
    raise UserError(
        f"Examples of {name} have no instruction, which {reader} reads: give each line a "
        '"question" and an "answer", or an "instruction" and an "output".'
    )


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
    if "qformer_tokenizer" not in config.data:
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
                f"vocab_size={model.vocab_size}: leave data.tokenizer empty for that of the weights "
                "that the run starts from, or, without any, set vocab_size to 0."
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
    """Instructions to ids; of one that is too long the first words are left out.

    Of BLIP's questions the last ones, as in its code.
    """
    side = "right" if config.task == "blip_vqa" else "left"
    return TextEncoder(tokenizer, config.data.max_instruction_tokens, "qformer", truncation=side)


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
    sources: Sequence[TrainSource],
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

    Raises:
      UserError: the run goes on, and a source has not as many examples as it had.
    """
    # The sources were opened before the tokenizer was known, which gives the config more values.
    of_sources = configs_of_sources(config)
    parts = [
        Part(
            each.source,
            _preprocess(of_sources[each.name], fields, tokenizer, qformer_tokenizer),
            name=each.name,
            share=each.share,
            shuffle_block=each.config.data.shuffle_block,
        )
        for each in sources
    ]
    process_index, process_count = process
    if config.data.get("packing"):
        parts = _packed(parts, config, report=process_index == 0)
    if position:
        _check_same_sizes(parts, position["sizes"])
    return TrainBatches(
        parts,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=process_index,
        process_count=process_count,
        start_example=position["examples_seen"] if position else 0,
        num_workers=config.data.num_workers,
        max_bad_share=config.data.max_bad_share,
        counters=position,
    )


def _check_same_sizes(parts: Sequence[Part], before: Mapping[str, int]) -> None:
    for part in parts:
        if len(part.source) != before[part.name]:
            raise UserError(
                f"The source of config.{section_of(part.name)}.train had {before[part.name]} "
                f"examples when the run began, and has {len(part.source)} now: give it the data "
                "that it had, or start anew in another --workdir."
            )


def _packed(parts: Sequence[Part], config: ConfigDict, report: bool) -> list[Part]:
    """Parts whose examples are rows of several texts; a part's texts keep their share.

    Args:
      report: whether to print how full the rows are.
    """
    packed = []
    for part in parts:
        source = PackedSource(part.source, part.preprocess, config.seed, config.data.max_bad_share)
        if report:
            print(part.prefix + source.describe())
        packed.append(
            dataclasses.replace(
                part,
                source=source,
                preprocess=PackTexts(part.preprocess),
                share=part.share * len(source) / len(part.source),
            )
        )
    rows = sum(len(part.source) for part in packed)
    if rows < config.batch_size:
        raise UserError(
            f"The texts fill {rows} rows of data.max_text_tokens={config.data.max_text_tokens}, "
            f"fewer than batch_size={config.batch_size}, so that a batch would repeat some: set "
            f"--config.batch_size to {rows} or less, or give it more texts."
        )
    return packed


def _preprocess(
    config: ConfigDict, fields: tuple[str, ...], tokenizer: Any, qformer_tokenizer: Any
) -> Preprocess:
    """What is made of the examples of a source, by its config."""
    data = config.data
    return Preprocess(
        fields=fields,
        image_size_px=data.image_size_px,
        encoder=text_encoder(config, tokenizer),
        prompt=data.prompt,
        templates=data.get("templates", ()),
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


def read_eval_set(config: ConfigDict) -> EvalSet:
    """The evaluation images with all their captions, in memory."""
    data = config.data
    source = _open(config, config.eval.source, config.eval)
    _check_instructions(config, source, config.eval.source, [data.prompt])
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


def _texts(sources: Sequence[TrainSource]) -> Iterator[str]:
    """What a tokenizer is trained on: of each source as many examples."""
    for each in sources:
        yield from _texts_of(each.source, each.config, _TOKENIZER_EXAMPLES // len(sources))


def _texts_of(source: Source, config: ConfigDict, examples: int) -> Iterator[str]:
    source = getattr(source, "examples", source)  # with all captions of an image at once
    if hasattr(source, "without_images"):
        source = source.without_images()
    # Each prompt before as many captions, also that of evaluation and generation.
    prompts = itertools.cycle((*config.data.get("templates", ()), config.data.prompt))
    instructed = reads_instructions(config, _train_prompts(config))
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
