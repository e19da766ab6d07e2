"""The tasks of BLIP (arXiv 2201.12086): `blip_retrieval`, `blip_caption` and `blip_vqa`.

All parameters train, as in BLIP's fine-tuning (paper §4.1 to §4.3, Table 14).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxblip.errors import UserError
from jaxblip.losses.language_modeling import token_cross_entropy
from jaxblip.models.blip import BlipCaptioner, BlipQuestionAnswering, BlipRetrieval
from jaxblip.tasks.base import LossOutput, Task
from jaxblip.tasks.parts import med_config, vision_config
from jaxblip.tasks.retrieval import RetrievalTask

TEMPERATURES = (0.001, 0.5)  # to which BLIP's code clamps the temperature


class BlipRetrievalTask(RetrievalTask):
    """ITC and ITM over the global batch (`BlipForImageTextRetrieval`).

    ITC compares the images and the texts of the batch with each other. BLIP's own fine-tuning
    compares them with the features of a momentum encoder, of which it keeps a queue, and softens
    its targets by them; there is no momentum encoder here.
    """

    def build_model(self) -> BlipRetrieval:
        config = self.config
        return BlipRetrieval(
            vision_config(config),
            med_config(config),
            embed_dim=config.model.embed_dim,
            enc_token_id=config.model.enc_token_id or None,
            dtype=self.dtype,
        )

    def loss(self, params, batch, rng) -> LossOutput:
        config = self.config.loss
        text_rng, match_rng, negative_rng = (
            (None, None, jax.random.key(0)) if rng is None else jax.random.split(rng, 3)
        )
        vision_rng = None if rng is None else jax.random.fold_in(rng, 3)
        images, *texts = self.model_inputs(batch)
        tokens = self.apply(params, images, method="image_tokens", rng=vision_rng)
        features = self.apply(params, tokens, method="image_features")
        image_embeds = self.embed_images(params, features)
        text_embeds = self.apply(params, *texts, method="embed_texts", rng=text_rng)
        itc, negatives = self._contrast(params, batch, image_embeds, text_embeds, negative_rng)
        image = self.apply(params, features, method="read_image")
        itm, itm_accuracy = self._matching(params, tokens, image, batch, negatives, match_rng)
        metrics = {
            "itc": itc,
            "itm": itm,
            "itm_accuracy": itm_accuracy,
            "temperature": params["temperature"],
        }
        loss = config.itc_weight * itc + config.itm_weight * itm
        return LossOutput(loss, jnp.float32(len(images)), metrics)

    def constrain(self, params):
        if "temperature" not in params:
            return params
        return {**params, "temperature": jnp.clip(params["temperature"], *TEMPERATURES)}

    def embed_images(self, params, features):
        """Image features to L2-normalised embeddings `[batch, embed]`."""
        return self.apply(params, features, method="embed_images")


class BlipCaptionTask(Task):
    """Language-modelling loss on the caption (`BlipForConditionalGeneration`).

    The decoder reads `[DEC] prompt caption [SEP]`; the tokens of the prompt carry no loss.
    """

    fields = ("image", "text_ids", "text_mask", "prompt_length")

    def build_model(self) -> BlipCaptioner:
        config = self.config
        return BlipCaptioner(
            vision_config(config),
            med_config(config),
            dec_token_id=config.model.dec_token_id,
            dtype=self.dtype,
        )

    def loss(self, params, batch, rng) -> LossOutput:
        logits = self.apply(params, *self.model_inputs(batch), rng=rng)
        text_ids = batch["text_ids"]
        behind_prompt = jnp.arange(text_ids.shape[1]) >= batch["prompt_length"][:, None]
        counts = batch["text_mask"] & behind_prompt
        return _word_loss(logits, text_ids, counts, self.config.loss.label_smoothing)


class BlipVqaTask(Task):
    """Language-modelling loss on the answer to a question (`BlipForQuestionAnswering`).

    An encoder reads the question (`instruction_ids`) with the image, and the decoder the states of
    the question and `[DEC] answer [SEP]`. The loss is a mean over the tokens of the answers: BLIP's
    code has their sum over each answer, which is the same but for a factor.
    """

    fields = ("image", "instruction_ids", "instruction_mask", "text_ids", "text_mask")

    def _check(self) -> None:
        super()._check()
        data, limit = self.config.data, self.config.model.text.max_positions
        if data.prompt:
            raise UserError(
                f"data.prompt={data.prompt!r} would stand before the answers, but blip_vqa reads "
                "the question by itself: leave data.prompt empty."
            )
        length = data.max_instruction_tokens
        if length > limit:
            raise UserError(
                f"data.max_instruction_tokens={length} is more than config.model.text."
                f"max_positions={limit}: lower the first or raise the second."
            )

    def build_model(self) -> BlipQuestionAnswering:
        config = self.config
        return BlipQuestionAnswering(
            vision_config(config),
            med_config(config),
            dec_token_id=config.model.dec_token_id,
            enc_token_id=config.model.enc_token_id or None,
            dtype=self.dtype,
        )

    def model_inputs(self, batch):
        return (self.normalize_images(batch["image"]), *(batch[field] for field in self.fields[1:]))

    def loss(self, params, batch, rng) -> LossOutput:
        logits = self.apply(params, *self.model_inputs(batch), rng=rng)
        counts, smoothing = batch["text_mask"], self.config.loss.label_smoothing
        return _word_loss(logits, batch["text_ids"], counts, smoothing)


def _word_loss(logits, text_ids, counts, label_smoothing: float) -> LossOutput:
    """Position t scores the token t + 1; the first token is no target, since it is given."""
    tokens = token_cross_entropy(
        logits[:, :-1], text_ids[:, 1:], counts[:, 1:], label_smoothing=label_smoothing
    )
    metrics = {"lm": tokens.loss, "token_accuracy": tokens.accuracy}
    return LossOutput(tokens.loss, tokens.num_tokens, metrics)
