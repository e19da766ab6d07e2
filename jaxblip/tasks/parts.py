"""Model configs from the experiment config."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from jaxblip.models.opt import OptConfig
from jaxblip.models.qformer import QFormerConfig
from jaxblip.models.vit import VitConfig


def vision_config(config: ConfigDict) -> VitConfig:
    """The image encoder at the resolution of the data."""
    return VitConfig(image_size_px=config.data.image_size_px, **config.model.vision)


def qformer_config(config: ConfigDict, *, has_text: bool) -> QFormerConfig:
    """The Q-Former; stage 1 has its text side, stage 2 has not."""
    return QFormerConfig(has_text=has_text, **config.model.qformer)


def language_model_config(config: ConfigDict) -> OptConfig:
    """The decoder language model."""
    return OptConfig(**config.model.language_model)


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
