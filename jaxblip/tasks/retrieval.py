"""Contrast and matching over one batch: what the tasks `stage1` and `blip_retrieval` share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxblip.losses.contrastive import ContrastiveOutput, contrastive_loss
from jaxblip.losses.matching import matching_loss, sample_hard_negatives
from jaxblip.tasks.base import Task


class RetrievalTask(Task):
    """Its model has a `temperature`, `image_features`, `read_image`, `embed_texts` and `match`."""

    fields = ("image", "text_ids", "text_mask", "image_id")

    def _image_id(self, batch):
        return batch["image_id"] if self.config.loss.use_image_id else None

    def _contrast(self, params, batch, image_embeds, text_embeds) -> ContrastiveOutput:
        """ITC over the global batch."""
        return contrastive_loss(
            image_embeds,
            text_embeds,
            1.0 / params["temperature"],
            image_id=self._image_id(batch),
            label_smoothing=self.config.loss.itc_label_smoothing,
            gradient_to_all=self.config.loss.gradient_to_all,
        )

    def _matching(self, params, image, batch, itc, dropout_rng, negative_rng):
        """ITM over the matched pairs, each text with a hard image, each image with a hard text."""
        text_ids, text_mask, image_id = batch["text_ids"], batch["text_mask"], self._image_id(batch)
        image_rng, text_rng = jax.random.split(negative_rng)
        text_of_image, has_text = sample_hard_negatives(text_rng, itc.image_to_text, image_id)
        image_of_text, has_image = sample_hard_negatives(image_rng, itc.text_to_image, image_id)

        # The image's keys and values are computed already: negatives are gathered, not recomputed.
        images = jax.tree.map(lambda x: jnp.concatenate([x, x[:, image_of_text], x], axis=1), image)
        texts = jnp.concatenate([text_ids, text_ids, text_ids[text_of_image]])
        masks = jnp.concatenate([text_mask, text_mask, text_mask[text_of_image]])
        logits = self.apply(params, images, texts, masks, method="match", rng=dropout_rng)
        matched = jnp.ones(len(text_ids), bool)
        return matching_loss(
            logits,
            is_match=jnp.concatenate([matched, ~matched, ~matched]),
            valid=jnp.concatenate([matched, has_image, has_text]),
        )

    def image_features(self, params, images):
        """uint8 images to what matching and embedding read, `[batch, tokens, vision_width]`."""
        return self.apply(params, self.normalize_images(images), method="image_features")

    def embed_texts(self, params, text_ids, text_mask):
        """Texts to L2-normalised embeddings `[batch, embed]`."""
        return self.apply(params, text_ids, text_mask, method="embed_texts")

    def match(self, params, features, text_ids, text_mask):
        """ITM logit of "match" for pairs of image features and texts: `[batch]`."""
        image = self.apply(params, features, method="read_image")
        return self.apply(params, image, text_ids, text_mask, method="match")[:, 1]
