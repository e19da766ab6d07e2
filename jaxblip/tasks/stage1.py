"""The `stage1` task: Q-Former against a frozen image encoder, by ITC, ITM and ITG."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxblip.losses.contrastive import contrastive_loss
from jaxblip.losses.language_modeling import token_cross_entropy
from jaxblip.losses.matching import matching_loss, sample_hard_negatives
from jaxblip.models.blip2 import Blip2Stage1
from jaxblip.tasks.base import LossOutput, Task
from jaxblip.tasks.parts import qformer_config, vision_config


class Stage1Task(Task):
    """The three losses of BLIP-2 §3.2 in one function, over the global batch."""

    fields = ("image", "text_ids", "text_mask", "image_id")
    frozen = ("vision",)

    def build_model(self) -> Blip2Stage1:
        config = self.config
        return Blip2Stage1(
            vision_config(config),
            qformer_config(config, has_text=True),
            dec_token_id=config.model.dec_token_id,
            embed_dim=config.model.embed_dim,
            vision_norm_epsilon=config.model.vision_norm_epsilon,
            dtype=self.dtype,
        )

    def loss(self, params, batch, rng) -> LossOutput:
        config = self.config.loss
        packed_rng, match_rng, negative_rng = (
            (None, None, jax.random.key(0)) if rng is None else jax.random.split(rng, 3)
        )
        images, text_ids, text_mask = self.model_inputs(batch)
        image_id = batch["image_id"] if config.use_image_id else None

        features = self.apply(params, images, method="image_features")
        image = self.apply(params, features, method="read_image")
        image_embeds, text_embeds, word_logits = self.apply(
            params, image, text_ids, text_mask, method="contrast_and_caption", rng=packed_rng
        )
        itc = contrastive_loss(
            image_embeds,
            text_embeds,
            1.0 / params["temperature"],
            image_id=image_id,
            label_smoothing=config.itc_label_smoothing,
            gradient_to_all=config.gradient_to_all,
        )
        itm, itm_accuracy = self._matching(
            params, image, text_ids, text_mask, itc, image_id, match_rng, negative_rng
        )
        itg = token_cross_entropy(
            word_logits[:, :-1],
            text_ids[:, 1:],
            text_mask[:, 1:],
            label_smoothing=config.itg_label_smoothing,
        )
        loss = (
            config.itc_weight * itc.loss + config.itm_weight * itm + config.itg_weight * itg.loss
        )
        metrics = {
            "itc": itc.loss,
            "itm": itm,
            "itg": itg.loss,
            "itm_accuracy": itm_accuracy,
            "itg_accuracy": itg.accuracy,
            "temperature": params["temperature"],
        }
        return LossOutput(loss, jnp.float32(text_ids.shape[0]), metrics)

    def _matching(
        self, params, image, text_ids, text_mask, itc, image_id, dropout_rng, negative_rng
    ):
        """ITM over the matched pairs, each text with a hard image, each image with a hard text."""
        image_rng, text_rng = jax.random.split(negative_rng)
        text_of_image, has_text = sample_hard_negatives(text_rng, itc.image_to_text, image_id)
        image_of_text, has_image = sample_hard_negatives(image_rng, itc.text_to_image, image_id)

        # The image's keys and values are computed already: negatives are gathered, not recomputed.
        images = jax.tree.map(
            lambda x: jnp.concatenate([x, x[:, image_of_text], x], axis=1), image
        )
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
        """uint8 images to what the Q-Former reads, `[batch, tokens, vision_width]`."""
        return self.apply(params, self.normalize_images(images), method="image_features")

    def embed_images(self, params, features):
        """Image features to L2-normalised embeddings `[batch, queries, embed]`."""
        image = self.apply(params, features, method="read_image")
        return self.apply(params, image, method="embed_images")

    def embed_texts(self, params, text_ids, text_mask):
        """Texts to L2-normalised embeddings `[batch, embed]`."""
        return self.apply(params, text_ids, text_mask, method="embed_texts")

    def match(self, params, features, text_ids, text_mask):
        """ITM logit of "match" for pairs of image features and texts: `[batch]`."""
        image = self.apply(params, features, method="read_image")
        return self.apply(params, image, text_ids, text_mask, method="match")[:, 1]
