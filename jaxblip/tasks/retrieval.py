"""Contrast and matching over one batch: what the tasks `stage1` and `blip_retrieval` share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxblip.losses.contrastive import contrastive_loss
from jaxblip.losses.matching import matching_loss, sample_hard_negatives
from jaxblip.tasks.base import Task


class RetrievalTask(Task):
    """Its model has a `temperature`, `image_features`, `read_image`, `embed_texts` and `match`."""

    fields = ("image", "text_ids", "text_mask", "image_id")

    def _image_id(self, batch):
        return batch["image_id"] if self.config.loss.use_image_id else None

    def _contrast(self, params, batch, image_embeds, text_embeds, rng):
        """ITC over the global batch, and hard negatives drawn from its scores."""
        config, image_id = self.config.loss, self._image_id(batch)
        scored = image_embeds, text_embeds, 1.0 / params["temperature"]
        loss = contrastive_loss(
            *scored,
            image_id=image_id,
            label_smoothing=config.itc_label_smoothing,
            gradient_to_all=config.gradient_to_all,
            block_size=config.itc_block_size,
        )
        return loss, sample_hard_negatives(
            rng, *scored, image_id, block_size=config.itc_block_size
        )

    def _matching(self, params, image, batch, negatives, rng):
        """ITM over the matched pairs, each text with a hard image, each image with a hard text."""
        text_ids, text_mask = batch["text_ids"], batch["text_mask"]
        text_of_image, image_of_text, has_negatives = negatives

        # The image's keys and values are computed already: negatives are gathered, not recomputed.
        images = jax.tree.map(lambda x: jnp.concatenate([x, x[:, image_of_text], x], axis=1), image)
        texts = jnp.concatenate([text_ids, text_ids, text_ids[text_of_image]])
        masks = jnp.concatenate([text_mask, text_mask, text_mask[text_of_image]])
        logits = self.apply(params, images, texts, masks, method="match", rng=rng)
        matched = jnp.ones(len(text_ids), bool)
        return matching_loss(
            logits,
            is_match=jnp.concatenate([matched, ~matched, ~matched]),
            valid=jnp.concatenate([matched, matched & has_negatives, matched & has_negatives]),
        )

    def image_features(self, params, images):
        """uint8 images to what matching and embedding read, `[batch, tokens, vision_width]`."""
        return self.apply(params, self.normalize_images(images), method="image_features")

    def embed_texts(self, params, text_ids, text_mask):
        """Texts to L2-normalised embeddings `[batch, embed]`."""
        return self.apply(params, text_ids, text_mask, method="embed_texts")

    def match(self, params, image, text_ids, text_mask, image_rows, text_rows):
        """ITM logit of "match" for pairs of images and texts: `[pairs]`.

        Args:
          image: of any number of images, from the model's `read_image`.
          text_ids, text_mask: of any number of texts.
          image_rows, text_rows: both of each pair, in these.
        """
        image = jax.tree.map(lambda x: x[:, image_rows], image)
        texts = text_ids[text_rows], text_mask[text_rows]
        return self.apply(params, image, *texts, method="match")[:, 1]
