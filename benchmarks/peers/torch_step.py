"""A training step of what a user would take instead: PyTorch, transformers' modules, AdamW."""

from __future__ import annotations

import os

import torch
import transformers
from ml_collections import ConfigDict

from peers.stage1 import Stage1


class TorchStep:
    """The same work as `workloads.OurStep`: forward, backward, update.

    On a GPU by `torch.compile`; on a CPU eager, with as many threads as there are cores.

    Args:
      bfloat16: under autocast, with frozen parameters in bfloat16; else all in float32.
    """

    def __init__(self, config: ConfigDict, batch: dict, bfloat16: bool):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._autocast = torch.autocast(self._device, torch.bfloat16, enabled=bfloat16)
        torch.set_num_threads(os.cpu_count())
        torch.manual_seed(0)
        self._model = _model(config).to(self._device).train()
        if bfloat16:
            for parameter in self._model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        if self._device == "cuda":
            self._model = torch.compile(self._model)
        optimizer = config.optimizer
        self._optimizer = torch.optim.AdamW(
            [parameter for parameter in self._model.parameters() if parameter.requires_grad],
            lr=optimizer.peak_lr,
            betas=(optimizer.b1, optimizer.b2),
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self._inputs = {name: x.to(self._device) for name, x in _inputs(config, batch).items()}
        if config.task == "clip":
            self._inputs["return_loss"] = True

    def __call__(self) -> None:
        """One step, finished."""
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast:
            output = self._model(**self._inputs)
            loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        self._optimizer.step()
        if self._device == "cuda":
            torch.cuda.synchronize()


def _model(config: ConfigDict) -> torch.nn.Module:
    if config.task == "stage1":
        q = config.model.qformer
        return Stage1(_vision(config), _qformer(config), q.num_query_tokens, q.vocab_size)
    if config.task == "stage2":
        return stage2_model(config)
    return _clip(config)


def _vision(config: ConfigDict) -> dict:
    v = config.model.vision
    return dict(
        hidden_size=v.width, intermediate_size=v.mlp_width, num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_heads, image_size=config.data.image_size_px,
        patch_size=v.patch_size_px,
    )  # fmt: skip


def _qformer(config: ConfigDict) -> dict:
    q = config.model.qformer
    return dict(
        hidden_size=q.width, encoder_hidden_size=config.model.vision.width,
        intermediate_size=q.mlp_width, num_hidden_layers=q.num_layers,
        num_attention_heads=q.num_heads, hidden_dropout_prob=q.hidden_dropout,
        attention_probs_dropout_prob=q.attention_dropout,
    )  # fmt: skip


def stage2_model(config: ConfigDict) -> torch.nn.Module:
    lm = config.model.language_model
    if lm.architecture == "t5":
        text = dict(
            model_type="t5", d_model=lm.width, d_ff=lm.mlp_width, num_layers=lm.num_layers,
            num_decoder_layers=lm.num_decoder_layers, num_heads=lm.num_heads, d_kv=lm.head_width,
            vocab_size=lm.vocab_size, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            dropout_rate=0.0, decoder_start_token_id=0,
        )  # fmt: skip
    else:
        text = dict(
            model_type="opt", hidden_size=lm.width, ffn_dim=lm.mlp_width, dropout=0.0,
            word_embed_proj_dim=lm.width, num_hidden_layers=lm.num_layers,
            num_attention_heads=lm.num_heads, vocab_size=lm.vocab_size,
        )  # fmt: skip
    blip2 = transformers.Blip2Config(
        vision_config=_vision(config), qformer_config=_qformer(config), text_config=text,
        num_query_tokens=config.model.qformer.num_query_tokens,
        image_token_index=lm.vocab_size - 1,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration(blip2)
    model.vision_model.requires_grad_(False)
    model.vision_model.post_layernorm.requires_grad_(True)  # the vision norm of BLIP-2
    model.language_model.requires_grad_(False)
    return model


def _clip(config: ConfigDict) -> torch.nn.Module:
    text = config.model.text
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=_vision(config),
            text_config=dict(
                hidden_size=text.width, intermediate_size=text.mlp_width,
                num_hidden_layers=text.num_layers, num_attention_heads=text.num_heads,
                vocab_size=text.vocab_size, max_position_embeddings=text.max_positions,
            ),
            projection_dim=config.model.embed_dim,
        )
    )  # fmt: skip


def _inputs(config: ConfigDict, batch: dict) -> dict[str, torch.Tensor]:
    """The batch in the form that each model wants; images as floats, as its processor gives."""
    pixels = torch.tensor(batch["image"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    ids, valid = torch.tensor(batch["text_ids"]).long(), torch.tensor(batch["text_mask"])
    if config.task == "stage1":
        return dict(pixels=pixels, ids=ids, valid=valid)
    if config.task == "clip":
        return dict(pixel_values=pixels, input_ids=ids, attention_mask=valid)
    lm, queries = config.model.language_model, config.model.qformer.num_query_tokens
    image = torch.full((len(ids), queries), lm.vocab_size - 1)
    labels = ids.masked_fill(~valid, -100)
    if lm.architecture == "t5":
        prompt = torch.tensor(batch["input_ids"]).long()
        read = torch.cat([image, prompt], dim=1)
        return dict(
            pixel_values=pixels, input_ids=read, attention_mask=torch.ones_like(read), labels=labels
        )
    seen = torch.ones(len(ids), queries, dtype=bool)
    return dict(
        pixel_values=pixels,
        input_ids=torch.cat([image, ids], dim=1),
        attention_mask=torch.cat([seen, valid], dim=1),
        labels=torch.cat([torch.full_like(image, -100), labels], dim=1),
    )
