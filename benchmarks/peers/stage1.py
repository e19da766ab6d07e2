"""Stage 1 in PyTorch, as a user of transformers would write it: each loss by a pass of its own.

The modules are transformers' (image encoder, Q-Former, heads; BERT's for ITG); masks, negatives and
losses follow BLIP-2 §3.2 and LAVIS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from transformers.models.bert.modeling_bert import BertLMPredictionHead

SMOOTHING = 0.1


class Stage1(torch.nn.Module):
    """Losses of a batch; its image encoder is frozen."""

    def __init__(self, vision: dict, qformer: dict, num_queries: int, vocab_size: int):
        super().__init__()
        config = transformers.Blip2Config(
            vision_config=vision,
            qformer_config=qformer | {"vocab_size": vocab_size, "use_qformer_text_input": True},
            num_query_tokens=num_queries,
            image_text_hidden_size=256,
        )
        self.num_queries, self.dec_token_id = num_queries, vocab_size - 1
        self.blip2 = transformers.Blip2ForImageTextRetrieval(config)
        self.itg_head = BertLMPredictionHead(
            transformers.BertConfig(
                hidden_size=qformer["hidden_size"], vocab_size=vocab_size, hidden_act="gelu"
            )
        )
        self.itg_head.decoder.weight = self.blip2.embeddings.word_embeddings.weight
        self.temperature = torch.nn.Parameter(torch.tensor(0.07))
        self.blip2.vision_model.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        self.blip2.vision_model.eval()
        return self

    def forward(self, pixels, ids, valid):
        with torch.no_grad():
            features = self.blip2.vision_model(pixels).last_hidden_state
        itc, of_image, of_text = self._contrast(features, ids, valid)
        return itc + self._match(features, ids, valid, of_image, of_text) + self._generate(
            features, ids, valid
        )

    def _hidden(self, features, ids, mask):
        queries = self.blip2.query_tokens.expand(len(features), -1, -1)
        embedded = self.blip2.embeddings(input_ids=ids, query_embeds=queries)
        return self.blip2.qformer(
            embedded, self.num_queries, mask[:, None], encoder_hidden_states=features
        ).last_hidden_state

    def _allowed(self, valid):
        """Queries and valid text all see each other: `[rows, length, length]`."""
        queries = torch.ones(len(valid), self.num_queries, dtype=bool, device=valid.device)
        seen = torch.cat([queries, valid], dim=1)
        return seen[:, None, :].repeat(1, seen.shape[1], 1)

    def _contrast(self, features, ids, valid):
        n, mask = self.num_queries, self._allowed(valid)
        mask[:, :n, n:] = mask[:, n:, :n] = False
        hidden = self._hidden(features, ids, mask)
        image = F.normalize(self.blip2.vision_projection(hidden[:, :n]), dim=-1)
        text = F.normalize(self.blip2.text_projection(hidden[:, n]), dim=-1)
        scores = torch.einsum("iqe,je->ijq", image, text).amax(dim=2) / self.temperature
        labels = torch.arange(len(ids), device=ids.device)
        both = (scores, scores.T)
        loss = sum(F.cross_entropy(x, labels, label_smoothing=SMOOTHING) for x in both)
        return loss / 2, scores.detach(), scores.detach().T

    def _match(self, features, ids, valid, of_image, of_text):
        """One pass over the pairs as they are, and over those with a hard negative of each side."""
        own = torch.eye(len(ids), dtype=bool, device=ids.device)
        texts, images = (
            torch.multinomial(F.softmax(s.masked_fill(own, -10_000.0), dim=1), 1)[:, 0]
            for s in (of_image, of_text)
        )
        features = torch.cat([features, features[images], features])
        ids, valid = (torch.cat([x, x, x[texts]]) for x in (ids, valid))
        hidden = self._hidden(features, ids, self._allowed(valid))
        logits = self.blip2.itm_head(hidden[:, : self.num_queries]).mean(dim=1)
        labels = torch.zeros(len(logits), dtype=int, device=ids.device)
        labels[: len(logits) // 3] = 1
        return F.cross_entropy(logits, labels)

    def _generate(self, features, ids, valid):
        n, length, mask = self.num_queries, ids.shape[1], self._allowed(valid)
        mask[:, :n, n:] = False
        mask[:, n:, n:] &= torch.ones(length, length, device=ids.device).tril().bool()
        ids = torch.cat([torch.full_like(ids[:, :1], self.dec_token_id), ids[:, 1:]], dim=1)
        scores = self.itg_head(self._hidden(features, ids, mask)[:, n:])
        labels = ids.masked_fill(~valid, -100)
        return F.cross_entropy(
            scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=SMOOTHING
        )
