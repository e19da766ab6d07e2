"""Several evaluations of one run: what each has of its own."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ml_collections import ConfigDict

from jaxblip.data.heldout import heldout_count
from jaxblip.data.text import ANSWER_DECODING, INSTRUCTION, QUESTION, QUESTION_FOR_ENCODER
from jaxblip.errors import UserError

# What is measured, and by which tasks; the first of a task's kinds is its default.
_OF_TEXTS = ("captions", "vqa", "okvqa", "gqa", "loss")
_OF_BOTH = ("retrieval", "classification", "linear_probe", "loss")
KINDS = {
    "blip_caption": ("captions", "loss"),
    "blip_retrieval": _OF_BOTH,
    "blip_vqa": ("vqa", "okvqa", "gqa", "captions", "loss"),
    "clip": _OF_BOTH,
    "instruct": _OF_TEXTS,
    "language_model": ("loss",),
    "stage1": _OF_BOTH,
    "stage2": _OF_TEXTS,
}
QUESTION_KINDS = ("vqa", "okvqa", "gqa")
# Fields of config.data that an evaluation may have of its own, beside those of config.eval.
OF_DATA = (
    "prompt",
    "max_words",
    "max_text_tokens",
    "max_input_tokens",
    "max_instruction_tokens",
    "frames",
)
_OF_THE_RUN = ("set", "every_steps", "heldout_examples")  # fields of config.eval that are about all


def configs_of_evaluations(config: ConfigDict) -> dict[str, ConfigDict]:
    """The config of each evaluation by its name: the run's, with the section's values in it.

    Without sections in config.eval.set it is the one of config.eval, and its name is "". Where
    questions are asked of a BLIP-2 whose prompt has no place for them, BLIP-2's own is the prompt,
    and answers are decoded as in its paper where the section says nothing else.

    Raises:
      UserError: a section names no source, or a kind that the task has not.
    """
    if not config.eval.set and not config.eval.source:
        return _of_heldout(config) if heldout_count(config) else {}
    if not config.eval.set:
        return {"": _completed(config, "", {})}
    found = {}
    for name, section in config.eval.set.items():
        of_evaluation = config.copy_and_resolve_references()
        for field, value in section.items():
            check_field(config, name, field)
            owner = of_evaluation.eval if field in config.eval else of_evaluation.data
            if isinstance(value, ConfigDict):
                owner[field].update(value)
            else:
                owner[field] = value
        if not of_evaluation.eval.source:
            raise UserError(
                f"config.eval.set.{name} names no source: set --config.eval.set.{name}.source to a "
                "file or a folder."
            )
        found[name] = _completed(of_evaluation, name, section)
    return found


def _of_heldout(config: ConfigDict) -> dict[str, ConfigDict]:
    """Of the examples that are kept from training; of stage 1 also what its log says of a batch."""
    found = {"": _completed(config, "", {})}
    if found[""].eval.kind == "retrieval":
        in_batch = config.copy_and_resolve_references()
        in_batch.eval.kind = "loss"
        found["in_batch"] = _completed(in_batch, "in_batch", {})
    return found


def section_of(name: str) -> str:
    """Where the fields of an evaluation are in the config."""
    return f"eval.set.{name}" if name else "eval"


def fields_of_section(config: ConfigDict) -> list[str]:
    """What a section of config.eval.set may have."""
    return [
        *(field for field in config.eval if field not in _OF_THE_RUN),
        *(field for field in OF_DATA if field in config.data),
    ]


def check_field(config: ConfigDict, name: str, field: str) -> None:
    """Raises UserError where a section of config.eval.set has a field that it may not have."""
    known = fields_of_section(config)
    if field not in known:
        near = difflib.get_close_matches(field, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(known)}."
        raise UserError(
            f"config.eval.set.{name}.{field} is no field that an evaluation of {config.task} has "
            f"of its own: {hint}"
        )


def _completed(config: ConfigDict, name: str, section: Sequence[str]) -> ConfigDict:
    """A copy in which the kind is named and, for questions, the prompt."""
    kinds = KINDS[config.task]
    kind = config.eval.kind or kinds[0]
    if kind not in kinds:
        every = {kind for kinds in KINDS.values() for kind in kinds}
        what = f"config.{section_of(name)}.kind={kind!r}"
        if kind not in every:
            near = difflib.get_close_matches(kind, every, 1)
            hint = f"did you mean {near[0]}?" if near else f"it may be {', '.join(kinds)}."
            raise UserError(f"{what} is nothing that is measured: {hint}")
        able = [task for task, theirs in KINDS.items() if kind in theirs]
        raise UserError(
            f"{what} cannot be measured of a checkpoint of {config.task}: name one of "
            f"{', '.join(able)}, or measure {' or '.join(kinds)}."
        )
    config = config.copy_and_resolve_references()
    config.eval.kind = kind
    asks = kind in QUESTION_KINDS and config.task == "stage2"
    if asks and INSTRUCTION not in config.data.prompt:
        has_encoder = "max_input_tokens" in config.data
        config.data.prompt = QUESTION_FOR_ENCODER if has_encoder else QUESTION
    if asks and name:
        config.eval.update({key: x for key, x in ANSWER_DECODING.items() if key not in section})
    return config
