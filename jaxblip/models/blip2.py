"""BLIP-2: stage 1 (vision-language representation) and stage 2 (generation by a language model).

BLIP-2 paper §3.2 and §3.3; reference: LAVIS `blip2_qformer.py`, `blip2_opt.py` and
`blip2_t5.py`. The modules are networks only; `tasks` joins them to their losses.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.models.attention import (
    bidirectional_mask,
    padding_mask,
    stage1_mask,
)
from jaxblip.models.bert import PredictionHead
from jaxblip.models.connectors import Connector
from jaxblip.models.language_models import (
    LanguageModelConfig,
    answer_hidden,
    continued_hidden,
    make_language_model,
)
from jaxblip.models.layers import KeyValues, Linear, l2_normalize, layer_norm
from jaxblip.models.qformer import QFormer, QFormerConfig
from jaxblip.models.vit import VisionTransformer, VitConfig

Images = Float[Array, "batch height width 3"]
Videos = Float[Array, "batch frames height width 3"]
# What the image encoder makes of them. A model that is given these does without the encoder.
Tokens = Float[Array, "batch tokens vision_width"]
FrameTokens = Float[Array, "batch frames tokens vision_width"]
TextIds = Int[Array, "batch text"]
TextValid = Bool[Array, "batch text"]


class Blip2Stage1(nn.Module):
    """Image encoder, Q-Former with text side, and the heads of the three losses.

    Attributes:
      embed_dim: width of the contrastive space.
      dec_token_id: stands in place of the first text token where text is generated (`[DEC]`).
      vision_norm_epsilon: LAVIS has 1e-5, the Hugging Face port 1e-6.
    """

    vision_config: VitConfig
    qformer_config: QFormerConfig
    dec_token_id: int
    embed_dim: int = 256
    initial_temperature: float = 0.07
    vision_norm_epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        q = self.qformer_config
        self.vision = VisionTransformer(self.vision_config, self.dtype)
        self.vision_norm = layer_norm(self.vision_norm_epsilon, self.dtype)
        self.qformer = QFormer(q, self.dtype)
        # Scores are compared across the whole batch: the heads compute in float32.
        self.image_projection = nn.Dense(self.embed_dim)
        self.text_projection = nn.Dense(self.embed_dim)
        self.itm_head = nn.Dense(2)
        self.itg_head = PredictionHead(
            q.vocab_size, q.width, q.layer_norm_epsilon, q.kernel_init, self.dtype
        )
        self.temperature = self.param(
            "temperature", nn.initializers.constant(self.initial_temperature), ()
        )

    def image_tokens(self, images: Images | Tokens) -> Tokens:
        """What the image encoder makes of them."""
        return self.vision(images) if images.ndim == 4 else images

    def image_features(self, images: Images | Tokens) -> Tokens:
        """The tokens of the image encoder, normed."""
        return self.vision_norm(self.image_tokens(images))

    def read_image(self, features: Tokens) -> KeyValues:
        """What the Q-Former needs of the images, computed once for all passes."""
        return self.qformer.read_image(features)

    def contrast_and_caption(
        self, image: KeyValues, text_ids: TextIds, text_valid: TextValid
    ) -> tuple[
        Float[Array, "batch queries embed"],
        Float[Array, "batch embed"],
        Float[Array, "batch text-1 width"],
    ]:
        """The uni-modal and the multimodal causal pass, packed into one.

        Returns:
          Image embeddings (one a query) and text embeddings, both L2-normalised, and what
          `word_logits` reads for ITG: position t scores the text token t + 1.
        """
        num_queries, length = self.qformer_config.num_query_tokens, text_ids.shape[1]
        decoder_ids = text_ids.at[:, 0].set(self.dec_token_id)
        positions = jnp.arange(length)
        hidden = self.qformer(
            image,
            jnp.concatenate([text_ids, decoder_ids], axis=1),
            stage1_mask(num_queries, text_valid),
            jnp.concatenate([positions, positions]),
        )
        queries, text, decoded = jnp.split(hidden, [num_queries, num_queries + length], axis=1)
        decoded = decoded[:, :-1]  # nothing follows the last token
        return self._embed_queries(queries), self._embed_text(text), decoded

    def word_logits(
        self, hidden: Float[Array, "batch text width"]
    ) -> Float[Array, "batch text vocab"]:
        """Scores of the next token, by the word embeddings."""
        hidden = self.itg_head.transform(hidden)
        return self.qformer.text_embeddings.attend(hidden) + self.itg_head.bias

    def embed_images(self, image: KeyValues) -> Float[Array, "batch queries embed"]:
        """L2-normalised image embeddings, one a query."""
        return self._embed_queries(self.qformer(image))

    def embed_texts(self, text_ids: TextIds, text_valid: TextValid) -> Float[Array, "batch embed"]:
        """L2-normalised text embeddings, without an image."""
        return self._embed_text(self.qformer(None, text_ids, padding_mask(text_valid)))

    def match(
        self, image: KeyValues, text_ids: TextIds, text_valid: TextValid
    ) -> Float[Array, "batch 2"]:
        """ITM logits [no match, match] of each image with its text, averaged over the queries."""
        num_queries = self.qformer_config.num_query_tokens
        hidden = self.qformer(image, text_ids, bidirectional_mask(num_queries, text_valid))
        return self.itm_head(hidden[:, :num_queries]).mean(axis=1)

    def __call__(self, images: Images | Tokens, text_ids: TextIds, text_valid: TextValid):
        """Runs every part once; for initialisation."""
        image = self.read_image(self.image_features(images))
        image_embeds, text_embeds, hidden = self.contrast_and_caption(image, text_ids, text_valid)
        matched = self.match(image, text_ids, text_valid)
        return image_embeds, text_embeds, self.word_logits(hidden), matched

    def _embed_queries(self, queries):
        return l2_normalize(self.image_projection(queries.astype(jnp.float32)))

    def _embed_text(self, text):
        return l2_normalize(self.text_projection(text[:, 0].astype(jnp.float32)))


class Blip2Stage2(nn.Module):
    """Image encoder, Q-Former, projection, and a language model that reads what comes out.

    A `connector` (`models.connectors`) stands in place of the Q-Former, where there is one.

    With `num_frames` an example has several images, such as the frames of a video (four in
    InstructBLIP): each is encoded and read by itself, with the same instruction, and their visual
    tokens follow one another.

    The Q-Former has no text side, except in InstructBLIP (arXiv 2305.06500 §2.3): with
    `qformer_config.has_text` it may be given the instruction, so that the visual tokens are about
    what is asked. Initialise such a model with an instruction.
    """

    vision_config: VitConfig
    qformer_config: QFormerConfig
    language_model_config: LanguageModelConfig
    vision_norm_epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    connector: Connector | None = None
    num_frames: int = 1

    @property
    def num_visual_tokens(self) -> int:
        """How many soft tokens stand for the images of an example."""
        if self.connector is None:
            return self.num_frames * self.qformer_config.num_query_tokens
        return self.num_frames * self.connector.num_tokens(self.vision_config.num_tokens)

    def setup(self):
        self.vision = VisionTransformer(self.vision_config, self.dtype)
        self.vision_norm = layer_norm(self.vision_norm_epsilon, self.dtype)
        if self.connector is None:
            self.qformer = QFormer(self.qformer_config, self.dtype)
        self.projection = Linear(self.language_model_config.width, dtype=self.dtype)
        self.language_model = make_language_model(self.language_model_config, self.dtype)

    def visual_tokens(
        self,
        images: Images | Videos | Tokens,
        instruction_ids: Int[Array, "batch instruction"] | None = None,
        instruction_valid: Bool[Array, "batch instruction"] | None = None,
    ) -> Float[Array, "batch queries lm_width"]:
        """The soft tokens that stand before the text.

        Args:
          instruction_ids: of the Q-Former's vocabulary; queries and instruction see each other.
          instruction_valid: False at padding; by default there is none.
        """
        return self.query(self.image_features(images), instruction_ids, instruction_valid)

    def image_features(self, images: Images | Videos | Tokens) -> Tokens | FrameTokens:
        """The tokens of the image encoder, normed."""
        if images.ndim == 5:
            rows, frames = images.shape[:2]
            features = self.image_features(images.reshape(rows * frames, *images.shape[2:]))
            return features.reshape(rows, frames, *features.shape[1:])
        return self.vision_norm(self.vision(images) if images.ndim == 4 else images)

    def query(
        self,
        features: Tokens | FrameTokens,
        instruction_ids: Int[Array, "batch instruction"] | None = None,
        instruction_valid: Bool[Array, "batch instruction"] | None = None,
    ) -> Float[Array, "batch queries lm_width"]:
        """The soft tokens about images whose features are there; arguments as `visual_tokens`."""
        if features.ndim == 4:
            rows, frames = features.shape[:2]
            texts = (instruction_ids, instruction_valid)
            texts = (None if text is None else jnp.repeat(text, frames, axis=0) for text in texts)
            visual = self.query(features.reshape(rows * frames, *features.shape[2:]), *texts)
            return visual.reshape(rows, -1, visual.shape[-1])
        if self.connector is not None:
            return self.projection(self.connector(features))
        image = self.qformer.read_image(features)
        num_queries = self.qformer_config.num_query_tokens
        mask = None
        if instruction_valid is not None:
            mask = bidirectional_mask(num_queries, instruction_valid)
        hidden = self.qformer(image, instruction_ids, mask)
        return self.projection(hidden[:, :num_queries])

    def __call__(self, *inputs: Array, **others: Array) -> Float[Array, "batch text vocab"]:
        """Position t scores the text token t; arguments as `hidden`."""
        return self.logits(self.hidden(*inputs, **others))

    def logits(self, hidden: Float[Array, "batch text lm_width"]):
        """Scores of the words `[batch, text, vocab]`, by the head of the language model."""
        return self.language_model.logits(hidden)

    def hidden(
        self,
        images: Images | Videos | Tokens,
        text_ids: TextIds,
        text_valid: TextValid,
        input_ids: Int[Array, "batch input"] | None = None,
        input_valid: Bool[Array, "batch input"] | None = None,
        instruction_ids: Int[Array, "batch instruction"] | None = None,
        instruction_valid: Bool[Array, "batch instruction"] | None = None,
    ) -> Float[Array, "batch text lm_width"]:
        """What `logits` reads: position t scores the text token t.

        A decoder-only model reads [visual tokens, text], and the last visual token predicts the
        first text token. Of an encoder-decoder model the encoder reads [visual tokens, input], and
        the decoder says the text: its start token predicts the first one.

        Args:
          input_ids, input_valid: for an encoder-decoder model, which needs both.
          instruction_ids, instruction_valid: as in `visual_tokens`.
        """
        visual = self.visual_tokens(images, instruction_ids, instruction_valid)
        is_encoder_decoder = self.language_model_config.is_encoder_decoder
        ids, valid = (input_ids, input_valid) if is_encoder_decoder else (text_ids, text_valid)
        words = self.language_model.embed(ids)
        embeddings = jnp.concatenate([visual.astype(words.dtype), words], axis=1)
        valid = jnp.concatenate([jnp.ones(visual.shape[:2], bool), valid], axis=1)
        if is_encoder_decoder:
            return answer_hidden(self.language_model, embeddings, valid, text_ids)
        hidden = continued_hidden(self.language_model, embeddings, valid)
        return hidden[:, visual.shape[1] - 1 : -1]
