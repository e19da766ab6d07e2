"""Stage 1 of BLIP-2 in PyTorch: transformers' modules, the three losses and the optimizer.

transformers has the image encoder, the Q-Former and the heads of ITC and ITM; the head of ITG is
BERT's. Masks, losses, negatives, weight decay and learning rate are written here, after BLIP-2
§3.2 and its appendix and after LAVIS: each loss by a pass of its own, nothing shared between them.
"""

from __future__ import annotations

import copy
import math

import jax
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from reference import Weights, eva_vit_params, qformer_params, randomized
from tiny_tasks import DEC, HEADS, QUERIES, TEXT, VISION_MLP, VISION_WIDTH, VOCAB, WIDTH

SMOOTHING = 0.1
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
EPSILON = 1e-6  # of the norm of the image features, in transformers

Batch = dict[str, np.ndarray]


class Stage1Reference(torch.nn.Module):
    """The model and the losses, of the sizes of `tiny_tasks`, with every parameter random.

    In float64, so that what differs from it is the other side's rounding.
    """

    def __init__(self):
        super().__init__()
        config = transformers.Blip2Config(
            vision_config=dict(
                hidden_size=VISION_WIDTH, intermediate_size=VISION_MLP, num_hidden_layers=2,
                num_attention_heads=HEADS, image_size=8, patch_size=4, layer_norm_eps=EPSILON,
            ),
            qformer_config=dict(
                hidden_size=WIDTH, encoder_hidden_size=VISION_WIDTH, intermediate_size=32,
                num_hidden_layers=4, num_attention_heads=HEADS, vocab_size=VOCAB,
                max_position_embeddings=16, use_qformer_text_input=True, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, pad_token_id=None,
            ),
            num_query_tokens=QUERIES,
            image_text_hidden_size=8,
        )  # fmt: skip
        self.blip2 = randomized(transformers.Blip2ForImageTextRetrieval(config))
        for layer in self.blip2.vision_model.encoder.layers:  # EVA-CLIP has no key bias
            layer.self_attn.qkv.bias.data[VISION_WIDTH : 2 * VISION_WIDTH] = 0
        head = BertLMPredictionHead(
            transformers.BertConfig(hidden_size=WIDTH, vocab_size=VOCAB, hidden_act="gelu")
        )
        self.itg_head = randomized(head, seed=1)
        self.itg_head.decoder.weight = self.blip2.embeddings.word_embeddings.weight
        self.itg_head.decoder.bias = self.itg_head.bias
        self.temperature = torch.nn.Parameter(torch.tensor(0.1))
        self.blip2.vision_model.embeddings.requires_grad_(False)
        self.blip2.vision_model.encoder.requires_grad_(False)
        self.double()

    def losses(self, batch: Batch, noise: tuple[np.ndarray, np.ndarray]) -> dict[str, torch.Tensor]:
        """ITC, ITM and ITG of a batch.

        Args:
          noise: of Gumbel's distribution, `[rows, rows]` for each image's texts and for each text's
            images: the largest sum of logit and noise is a draw from the softmax of the logits.
        """
        features = self.image_features(batch["image"])
        ids, valid = torch.tensor(batch["text_ids"]).long(), torch.tensor(batch["text_mask"])
        image_id = torch.tensor(batch["image_id"])
        same = image_id[:, None] == image_id[None, :]
        itc, of_image, of_text = self.contrast(features, ids, valid, same)
        texts, images = (
            draw_negatives(logits, same, draw)
            for logits, draw in zip((of_image, of_text), noise, strict=True)
        )
        return {
            "itc": itc,
            "itm": self.match(features, ids, valid, texts, images),
            "itg": self.generate(features, ids, valid),
        }

    def image_features(self, images: np.ndarray) -> torch.Tensor:
        mean, std = torch.tensor(PIXEL_MEAN).double(), torch.tensor(PIXEL_STD).double()
        pixels = (torch.tensor(images).double() / 255 - mean) / std
        return self.blip2.vision_model(pixels.permute(0, 3, 1, 2)).last_hidden_state

    def hidden(self, features, ids, mask) -> torch.Tensor:
        """[queries, text]; `mask[row, i, j]`: whether position i sees position j."""
        queries = self.blip2.query_tokens.expand(len(features), -1, -1)
        embedded = self.blip2.embeddings(input_ids=ids, query_embeds=queries)
        return self.blip2.qformer(
            embedded, QUERIES, mask[:, None], encoder_hidden_states=features
        ).last_hidden_state

    def contrast(self, features, ids, valid, same):
        """ITC, and the logits of each image's texts and of each text's images."""
        mask = allowed(valid)
        mask[:, :QUERIES, QUERIES:] = mask[:, QUERIES:, :QUERIES] = False
        hidden = self.hidden(features, ids, mask)
        image = F.normalize(self.blip2.vision_projection(hidden[:, :QUERIES]), dim=-1)
        text = F.normalize(self.blip2.text_projection(hidden[:, QUERIES]), dim=-1)

        def similarity(image, text):
            """Of image i (row) and text j (column), the largest over the queries."""
            return torch.einsum("iqe,je->ijq", image, text).amax(dim=2) / self.temperature

        # What the reference gathers from all devices carries no gradient.
        of_image, of_text = similarity(image, text.detach()), similarity(image.detach(), text).T
        positives = same / same.sum(dim=1, keepdim=True)
        targets = (1 - SMOOTHING) * positives + SMOOTHING / len(same)
        loss = sum(
            -(targets * F.log_softmax(x, dim=1)).sum(dim=1).mean() for x in (of_image, of_text)
        )
        return loss / 2, of_image, of_text

    def match(self, features, ids, valid, texts, images):
        """ITM over the pairs as they are, (drawn image, text), and (image, drawn text)."""
        losses = []
        for pair, label in [
            ((features, ids, valid), 1),
            ((features[images], ids, valid), 0),
            ((features, ids[texts], valid[texts]), 0),
        ]:
            hidden = self.hidden(*pair[:2], allowed(pair[2]))
            logits = self.blip2.itm_head(hidden[:, :QUERIES]).mean(dim=1)
            losses.append(F.cross_entropy(logits, torch.full((len(logits),), label)))
        return sum(losses) / 3

    def generate(self, features, ids, valid):
        """ITG: `[DEC]` in place of the first token, each token from those before it."""
        mask = allowed(valid)
        mask[:, :QUERIES, QUERIES:] = False
        mask[:, QUERIES:, QUERIES:] &= torch.ones(TEXT, TEXT).tril().bool()
        ids = torch.cat([torch.full_like(ids[:, :1], DEC), ids[:, 1:]], dim=1)
        scores = self.itg_head(self.hidden(features, ids, mask)[:, QUERIES:])
        labels = ids.masked_fill(~valid, -100)
        return F.cross_entropy(
            scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=SMOOTHING
        )

    def params(self) -> dict:
        """The parameters of `Blip2Stage1`, float32, as they are now."""
        module = copy.deepcopy(self).float()
        w, head = Weights(module.blip2), Weights(module.itg_head)
        params = {
            "vision": eva_vit_params(module.blip2.vision_model),
            "vision_norm": w.norm("vision_model.post_layernorm"),
            "qformer": qformer_params(module.blip2),
            "image_projection": w.linear("vision_projection"),
            "text_projection": w.linear("text_projection"),
            "itm_head": w.linear("itm_head"),
            "itg_head": {
                "dense": head.linear("transform.dense"),
                "norm": head.norm("transform.LayerNorm"),
                "bias": head["bias"],
            },
            "temperature": module.temperature.detach().numpy(),
        }
        return jax.tree.map(np.array, params)


def allowed(valid: torch.Tensor) -> torch.Tensor:
    """Queries and valid text all see each other: ITM's mask, `[rows, length, length]`."""
    seen = torch.cat([torch.ones(len(valid), QUERIES, dtype=bool), valid], dim=1)
    return seen[:, None, :].repeat(1, QUERIES + TEXT, 1)


def draw_negatives(logits: torch.Tensor, same: torch.Tensor, noise: np.ndarray) -> torch.Tensor:
    """One candidate a row from the softmax of the logits, never one of the same image."""
    masked = logits.detach().masked_fill(same, -10000.0)
    return (masked + torch.tensor(noise)).argmax(dim=1)


def make_adamw(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW of BLIP-2's appendix; vectors, scalars and biases are not decayed."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim >= 2 and "bias" not in name].append(parameter)
    return torch.optim.AdamW(
        [dict(params=groups[True]), dict(params=groups[False], weight_decay=0.0)],
        betas=(0.9, 0.98), eps=1e-8, weight_decay=weight_decay,
    )  # fmt: skip


def rate_at(step: int, *, steps: int, warmup: int, first: float, peak: float, last: float) -> float:
    """Linear from `first` to `peak` in `warmup` steps, then a cosine to `last` at `steps`."""
    if step < warmup:
        return first + (peak - first) * step / warmup
    return last + (peak - last) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
