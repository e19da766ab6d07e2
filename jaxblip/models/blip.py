"""BLIP: image-text retrieval, captioning and visual question answering.

BLIP paper §3.1 and Fig. 5; reference: transformers' `modeling_blip.py`, class by class. The modules
are networks only; the losses are `losses.contrastive`, `losses.matching` and, with BLIP's label
smoothing of 0.1, `losses.language_modeling`.

The image encoder's final norm, `vision_norm`, is over all its tokens, and its class token is used
as it is then. (The `pooler_output` of transformers' vision model is that token normed once more,
which none of these models reads.)
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.models.attention import causal_mask, padding_mask
from jaxblip.models.layers import KeyValues, l2_normalize, layer_norm
from jaxblip.models.med import Med, MedConfig, MedDecoder
from jaxblip.models.vit import VisionTransformer, VitConfig

Images = Float[Array, "batch height width 3"]
Features = Float[Array, "batch tokens vision_width"]
TextIds = Int[Array, "rows text"]
TextValid = Bool[Array, "rows text"]


class _WithImages(nn.Module):
    """The image encoder with its final norm."""

    vision_config: VitConfig
    text_config: MedConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.vision = VisionTransformer(self.vision_config, self.dtype)
        self.vision_norm = layer_norm(self.vision_config.layer_norm_epsilon, self.dtype)

    def image_tokens(self, images: Images | Features) -> Features:
        """What the image encoder makes of them; that itself stays as it is."""
        return self.vision(images) if images.ndim == 4 else images

    def image_features(self, images: Images | Features) -> Features:
        """The tokens of the image encoder, normed."""
        return self.vision_norm(self.image_tokens(images))


class BlipRetrieval(_WithImages):
    """Image and text embeddings (ITC), and matching of pairs (ITM): `BlipForImageTextRetrieval`.

    Attributes:
      embed_dim: width of the contrastive space.
      enc_token_id: stands in place of the first text token where a text is read with an image
        (`[ENC]`, as in the paper); None leaves the text as it is, as transformers does.
    """

    embed_dim: int = 256
    initial_temperature: float = 0.07
    enc_token_id: int | None = None

    def setup(self):
        super().setup()
        self.text = Med(self.text_config, self.dtype)
        # Scores are compared across the whole batch: the heads compute in float32.
        self.image_projection = nn.Dense(self.embed_dim)
        self.text_projection = nn.Dense(self.embed_dim)
        self.itm_head = nn.Dense(2)
        self.temperature = self.param(
            "temperature", nn.initializers.constant(self.initial_temperature), ()
        )

    def read_image(self, features: Features) -> KeyValues:
        """What matching needs of the images, computed once for all texts."""
        return self.text.read_source(features)

    def embed_images(self, features: Features) -> Float[Array, "batch embed"]:
        """L2-normalised image embeddings, from the class token of `image_features`."""
        return l2_normalize(self.image_projection(features[:, 0].astype(jnp.float32)))

    def embed_texts(self, text_ids: TextIds, text_valid: TextValid) -> Float[Array, "rows embed"]:
        """L2-normalised text embeddings, without an image."""
        hidden, _ = self.text(text_ids, padding_mask(text_valid))
        return l2_normalize(self.text_projection(hidden[:, 0].astype(jnp.float32)))

    def match(
        self, image: KeyValues, text_ids: TextIds, text_valid: TextValid
    ) -> Float[Array, "rows 2"]:
        """ITM logits [no match, match] of each image with its text, or its adjacent texts.

        Args:
          image: from `read_image`, of as many images as there are texts, or a divisor of that.
        """
        text_ids = _with_first(text_ids, self.enc_token_id)
        hidden, _ = self.text(text_ids, padding_mask(text_valid), image)
        return self.itm_head(hidden[:, 0].astype(jnp.float32))

    def __call__(self, images: Images, text_ids: TextIds, text_valid: TextValid):
        """ITM logits of the pairs, and the embeddings of both sides."""
        features = self.image_features(images)
        return (
            self.match(self.read_image(features), text_ids, text_valid),
            self.embed_images(features),
            self.embed_texts(text_ids, text_valid),
        )


class BlipCaptioner(_WithImages):
    """A decoder that looks at the image: `BlipForConditionalGeneration`.

    Attributes:
      dec_token_id: stands in place of the first text token (`[DEC]`).
    """

    dec_token_id: int = 30522

    def setup(self):
        super().setup()
        self.decoder = MedDecoder(self.text_config, self.dtype)

    def __call__(
        self, images: Images, text_ids: TextIds, text_valid: TextValid
    ) -> Float[Array, "rows text vocab"]:
        """Position t scores the text token t + 1, so the last one scores nothing of the text."""
        source = self.decoder.read_source(self.image_features(images))
        text_ids = _with_first(text_ids, self.dec_token_id)
        hidden, _ = self.decoder(text_ids, causal_mask(text_valid), source)
        return self.decoder.logits(hidden)


class BlipQuestionAnswering(_WithImages):
    """An encoder reads the question with the image, a decoder answers: `BlipForQuestionAnswering`.

    Attributes:
      dec_token_id: stands in place of the first token of an answer (`[DEC]`).
      enc_token_id: stands in place of the first token of a question (`[ENC]`, as in the paper);
        None leaves the question as it is, as transformers does.
    """

    dec_token_id: int = 30522
    enc_token_id: int | None = None

    def setup(self):
        super().setup()
        self.text = Med(self.text_config, self.dtype)
        self.decoder = MedDecoder(self.text_config, self.dtype)

    def read_question(
        self, features: Features, question_ids: TextIds, question_valid: TextValid
    ) -> Float[Array, "rows text width"]:
        """The states of each question on its image; an image may have several adjacent questions.

        Args:
          features: from `image_features`.
        """
        question_ids = _with_first(question_ids, self.enc_token_id)
        hidden, _ = self.text(
            question_ids, padding_mask(question_valid), self.text.read_source(features)
        )
        return hidden

    def answer_logits(
        self,
        question: Float[Array, "questions text width"],
        question_valid: Bool[Array, "questions text"] | None,
        answer_ids: TextIds,
        answer_valid: TextValid,
    ) -> Float[Array, "rows text vocab"]:
        """Position t scores the answer's token t + 1; a question may have several adjacent answers.

        Args:
          question: from `read_question`.
          question_valid: False at padding; None lets the decoder look at that, too, as does
            transformers 5, which ignores its mask.
        """
        source = self.decoder.read_source(question)
        answer_ids = _with_first(answer_ids, self.dec_token_id)
        hidden, _ = self.decoder(answer_ids, causal_mask(answer_valid), source, question_valid)
        return self.decoder.logits(hidden)

    def __call__(
        self,
        images: Images,
        question_ids: TextIds,
        question_valid: TextValid,
        answer_ids: TextIds,
        answer_valid: TextValid,
    ) -> Float[Array, "rows text vocab"]:
        """The logits of the answers, from images and questions."""
        question = self.read_question(self.image_features(images), question_ids, question_valid)
        return self.answer_logits(question, question_valid, answer_ids, answer_valid)


def _with_first(ids: TextIds, token_id: int | None) -> TextIds:
    return ids if token_id is None else jnp.asarray(ids).at[:, 0].set(token_id)
