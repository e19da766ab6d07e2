"""The `stage1` task: Q-Former against a frozen image encoder, by ITC, ITM and ITG."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxblip.errors import UserError
from jaxblip.losses.language_modeling import chunked_token_cross_entropy
from jaxblip.models.blip2 import Blip2Stage1
from jaxblip.tasks.base import LossOutput
from jaxblip.tasks.parts import has_qformer, qformer_config, vision_config
from jaxblip.tasks.retrieval import RetrievalTask


class Stage1Task(RetrievalTask):
    """The three losses of BLIP-2 §3.2 in one function, over the global batch."""

    frozen = ("vision",)

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.image_field, *super().fields[1:])

    def _check(self) -> None:
        super()._check()
        if not has_qformer(self.config):
            raise UserError(
                f"model.connector={self.config.model.connector!r} reads no text, and stage 1 "
                "compares and matches texts with what its Q-Former makes of an image: train the "
                "connector in stage 2, or set --config.model.connector=qformer."
            )

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
        vision_rng = None if rng is None else jax.random.fold_in(rng, 3)
        images, text_ids, text_mask = self.model_inputs(batch)
        tokens = self.apply(params, images, method="image_tokens", rng=vision_rng)
        image = self.read_tokens(params, tokens)
        image_embeds, text_embeds, hidden = self.apply(
            params, image, text_ids, text_mask, method="contrast_and_caption", rng=packed_rng
        )
        itc, negatives = self._contrast(params, batch, image_embeds, text_embeds, negative_rng)
        itm, itm_accuracy = self._matching(params, tokens, image, batch, negatives, match_rng)
        itg = chunked_token_cross_entropy(
            partial(self.apply, params, method="word_logits"),
            hidden,
            text_ids[:, 1:],
            text_mask[:, 1:],
            label_smoothing=config.itg_label_smoothing,
            chunk=config.vocab_chunk,
        )
        loss = (
            config.itc_weight * itc + config.itm_weight * itm + config.itg_weight * itg.loss
        )
        metrics = {
            "itc": itc,
            "itm": itm,
            "itg": itg.loss,
            "itm_accuracy": itm_accuracy,
            "itg_accuracy": itg.accuracy,
            "temperature": params["temperature"],
        }
        return LossOutput(loss, jnp.float32(text_ids.shape[0]), metrics)

    def embed_images(self, params, features):
        """Image features to L2-normalised embeddings `[batch, queries, embed]`."""
        image = self.apply(params, features, method="read_image")
        return self.apply(params, image, method="embed_images")
