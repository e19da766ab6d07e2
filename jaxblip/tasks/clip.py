"""The `clip` task: an image tower and a text tower trained by contrast alone."""

from __future__ import annotations

import jax.numpy as jnp

from jaxblip.losses.contrastive import contrastive_loss
from jaxblip.models.clip import MAX_LOG_SCALE, Clip, ClipTextConfig
from jaxblip.tasks.base import LossOutput, Task
from jaxblip.tasks.parts import vision_config


class ClipTask(Task):
    """Symmetric contrastive loss over the global batch (CLIP §2.3)."""

    fields = ("image", "text_ids", "text_mask", "image_id")

    def build_model(self) -> Clip:
        config = self.config
        return Clip(
            vision_config(config),
            ClipTextConfig(attention=config.attention, **config.model.text),
            embed_dim=config.model.embed_dim,
            dtype=self.dtype,
        )

    def loss(self, params, batch, rng) -> LossOutput:
        image, text = self.apply(params, *self.model_inputs(batch), rng=rng)
        loss = contrastive_loss(
            image,
            text,
            jnp.exp(params["logit_scale"]),
            image_id=batch["image_id"],
            label_smoothing=self.config.loss.label_smoothing,
            gradient_to_all=self.config.loss.gradient_to_all,
            block_size=self.config.loss.itc_block_size,
        )
        metrics = {"itc": loss, "logit_scale": jnp.exp(params["logit_scale"])}
        return LossOutput(loss, jnp.float32(text.shape[0]), metrics)

    def constrain(self, params):
        # Clamped after each update, as open_clip does, so that the scale can come down again.
        if "logit_scale" not in params:
            return params
        return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, MAX_LOG_SCALE)}

    def embed_images(self, params, images):
        """uint8 images to L2-normalised embeddings `[batch, embed]`."""
        return self.apply(params, self.normalize_images(images), method="embed_images")

    def embed_texts(self, params, text_ids, text_mask):
        """Texts to L2-normalised embeddings `[batch, embed]`."""
        return self.apply(params, text_ids, text_mask, method="embed_texts")
