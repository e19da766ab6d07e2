"""Model configs from the experiment config."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from jaxblip.errors import UserError
from jaxblip.models.language_models import LanguageModelConfig, config_class
from jaxblip.models.lora import LoraConfig
from jaxblip.models.med import MedConfig
from jaxblip.models.qformer import QFormerConfig
from jaxblip.models.vit import VitConfig


def vision_config(config: ConfigDict) -> VitConfig:
    """The image encoder at the resolution of the data."""
    return VitConfig(image_size_px=config.data.image_size_px, **config.model.vision)


def qformer_config(config: ConfigDict, *, has_text: bool) -> QFormerConfig:
    """The Q-Former; stage 1 has its text side, stage 2 has not."""
    return QFormerConfig(has_text=has_text, **config.model.qformer)


def med_config(config: ConfigDict) -> MedConfig:
    """BLIP's text stack, be it encoder or decoder."""
    return MedConfig(**config.model.text)


def language_model_config(config: ConfigDict, *, is_frozen: bool = False) -> LanguageModelConfig:
    """The language model, of the architecture that its section names.

    Args:
      is_frozen: then it has no dropout.

    Raises:
      UserError: an unknown architecture, or one whose fields the section has not.
    """
    fields = dict(config.model.language_model)
    architecture = fields.pop("architecture")
    kind = config_class(architecture)
    if fields.keys() != {field.name for field in dataclasses.fields(kind)}:
        raise UserError(
            f"config.model.language_model.architecture={architecture!r} does not fit the other "
            "fields of its section, which are those of another architecture: in the config file, "
            f"begin with default_config({config.task!r}, language_model={architecture!r})."
        )
    if is_frozen and "dropout" in fields:
        fields["dropout"] = 0.0
    return kind(**fields)


def lora_config(config: ConfigDict) -> LoraConfig:
    """The low-rank factors of a run.

    Raises:
      UserError: a part that is to have some trains itself.
    """
    lora = LoraConfig(**config.lora)
    for part in lora.parts if lora.rank else ():
        if not any(f"{part}/".startswith(f"{prefix}/") for prefix in config.frozen):
            raise UserError(
                f"lora.parts has {part!r}, which trains itself: add it to config.frozen, or take "
                "it out of lora.parts."
            )
    return lora


def trains(config: ConfigDict, part: str) -> bool:
    """Whether anything in a part of the parameter tree trains, be it only low-rank factors."""
    exceptions = [path for path in config.trainable if path.split("/")[0] == part]
    return part not in config.frozen or bool(exceptions) or LoraConfig(**config.lora).has(part)


def language_model_section(architecture: str, **values) -> ConfigDict:
    """`config.model.language_model`, with the defaults of an architecture but for `values`."""
    section = ConfigDict({"architecture": architecture})
    section.update(model_fields(config_class(architecture), **values))
    return section


def model_fields(config_class: type, **values) -> ConfigDict:
    """The fields of a model config as a section of an experiment config.

    Args:
      config_class: one of the dataclasses of `jaxblip.models`.
      values: fields that differ from the class's defaults. Those that are set elsewhere in the
        experiment config (`NOT_IN_CONFIG`) are left out.
    """
    fields = dataclasses.asdict(config_class(**values))
    return ConfigDict({k: v for k, v in fields.items() if k not in NOT_IN_CONFIG})


# The data section and the task decide these.
NOT_IN_CONFIG = ("image_size_px", "has_text")
