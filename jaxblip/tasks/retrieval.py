"""Contrast and matching over one batch: what the tasks `stage1` and `blip_retrieval` share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxblip.losses.contrastive import contrastive_loss
from jaxblip.losses.matching import matching_loss, sample_hard_negatives
from jaxblip.sharding import batch_is_split, take_rows
from jaxblip.tasks.base import Task


class RetrievalTask(Task):
    """Its model has a `temperature`, `image_tokens`, `image_features`, `read_image`, `embed_texts`
    and `match`."""

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

    def _matching(self, params, tokens, image, batch, negatives, rng):
        """ITM over the matched pairs, each text with a hard image, each image with a hard text.

        Args:
          tokens, image: of all images, what the encoder made of them, and `read_tokens` of that.
        """
        text_ids, text_mask = batch["text_ids"], batch["text_mask"]
        text_of_image, image_of_text, has_negatives = negatives

        # On one device an image's keys and values are copied, not computed again. Between devices
        # the encoder's tokens are sent: of ViT-g they are 0.7 MB an image, and its keys and values
        # for BERT-base 4.7 MB, which take 3 % of a step's operations to compute from them. Nor
        # does any gradient go back where the encoder is frozen.
        if batch_is_split():
            hard = self.read_tokens(params, take_rows(tokens, image_of_text))
        else:
            hard = jax.tree.map(lambda x: x[:, image_of_text], image)

        def pairs(matched, of_text, of_image, axis=0):
            # Those of one row stand together, so that they stay on its device.
            stacked = jnp.stack([matched, of_text, of_image], axis=axis + 1)
            return stacked.reshape(*matched.shape[:axis], -1, *matched.shape[axis + 1 :])

        images = jax.tree.map(lambda x, hard: pairs(x, hard, x, axis=1), image, hard)
        texts = (pairs(x, x, x[text_of_image]) for x in (text_ids, text_mask))
        logits = self.apply(params, images, *texts, method="match", rng=rng)
        matched = jnp.ones(len(text_ids), bool)
        return matching_loss(
            logits,
            is_match=pairs(matched, ~matched, ~matched),
            valid=pairs(matched, matched & has_negatives, matched & has_negatives),
        )

    def read_tokens(self, params, tokens):
        """The encoder's tokens to what matching reads of the images."""
        features = self.apply(params, tokens, method="image_features")
        return self.apply(params, features, method="read_image")

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
