"""Model configs from the experiment config."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxblip.errors import UserError
from jaxblip.models.connectors import (
    CONNECTORS,
    QFORMER,
    Connector,
    EveryToken,
    MlpConnector,
    PerceiverConfig,
    PerceiverResampler,
)
from jaxblip.models.language_models import LanguageModelConfig, config_class
from jaxblip.models.lora import LoraConfig
from jaxblip.models.med import MedConfig
from jaxblip.models.qformer import QFormerConfig
from jaxblip.models.vit import VitConfig


def vision_config(config: ConfigDict) -> VitConfig:
    """The image encoder at the resolution of the data."""
    size = config.data.image_size_px
    return VitConfig(image_size_px=size, attention=config.attention, **config.model.vision)


def qformer_config(config: ConfigDict, *, has_text: bool) -> QFormerConfig:
    """The Q-Former; stage 1 has its text side, stage 2 has not."""
    attention = config.attention
    return QFormerConfig(has_text=has_text, attention=attention, **config.model.qformer)


def med_config(config: ConfigDict) -> MedConfig:
    """BLIP's text stack, be it encoder or decoder."""
    return MedConfig(attention=config.attention, **config.model.text)


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
    expected = {field.name for field in dataclasses.fields(kind)}.difference(NOT_IN_CONFIG)
    if fields.keys() != expected:
        raise UserError(
            f"config.model.language_model.architecture={architecture!r} does not fit the other "
            "fields of its section, which are those of another architecture: in the config file, "
            f"begin with default_config({config.task!r}, language_model={architecture!r})."
        )
    if is_frozen and "dropout" in fields:
        fields["dropout"] = 0.0
    return kind(attention=config.attention, **fields)


def has_qformer(config: ConfigDict) -> bool:
    """Whether a Q-Former makes the visual tokens, and not another connector."""
    return config.model.get("connector", QFORMER) == QFORMER


def network_sections(config: ConfigDict) -> dict[str, ConfigDict]:
    """The sections of `config.model` whose networks there are: of the connectors, the chosen one's.

    A perceiver has the width of the image encoder, and no field for it.
    """
    unused = {QFORMER, "perceiver"} - {config.model.get("connector", QFORMER)}
    sections = ((name, section) for name, section in config.model.items() if name not in unused)
    return {name: section for name, section in sections if isinstance(section, ConfigDict)}


def make_connector(config: ConfigDict, dtype: jnp.dtype) -> Connector | None:
    """What stands in place of the Q-Former; None where that is there.

    Raises:
      UserError: there is none of that name, it does not fit the encoder, or a Q-Former is named
        that there is not.
    """
    name, width = config.model.connector, config.model.vision.width
    if name not in CONNECTORS:
        raise UserError(
            f"model.connector={name!r} is none of {', '.join(CONNECTORS)}: choose one."
        )
    if name == QFORMER:
        return None
    if config.init.qformer:
        raise UserError(
            f"config.init.qformer={config.init.qformer!r} names a Q-Former, and "
            f"model.connector={name!r} stands in its place: leave one of them out."
        )
    if name == "linear":
        return EveryToken()
    if name == "mlp":
        return MlpConnector(config.model.language_model.width, dtype)
    perceiver = PerceiverConfig(**config.model.perceiver)
    if width % perceiver.num_heads:
        raise UserError(
            f"config.model.perceiver.num_heads={perceiver.num_heads} does not divide the "
            f"width={width} of the image encoder, which the perceiver has, too: set one to fit."
        )
    return PerceiverResampler(perceiver, dtype)


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


# The data section, the task and `config.attention` decide these.
NOT_IN_CONFIG = ("image_size_px", "has_text", "attention")
