"""Captions by what a user would take instead: `generate` of transformers' BLIP-2, in PyTorch."""

from __future__ import annotations

import os

import numpy as np
import torch
from ml_collections import ConfigDict

from peers.torch_step import stage2_model


class TorchCaptions:
    """Texts of so many tokens about images; the same work as `generation.OurCaptions`.

    Attention is PyTorch's own (sdpa). On a GPU in bfloat16, with the static cache for which
    transformers compiles each step; on a CPU eager, with as many threads as there are cores.
    """

    def __init__(
        self,
        config: ConfigDict,
        images: np.ndarray,
        prompt_ids: np.ndarray,
        new_tokens: int,
        *,
        bfloat16: bool = False,
    ):
        on_gpu = torch.cuda.is_available()
        torch.set_num_threads(os.cpu_count())
        torch.manual_seed(0)
        self._device = "cuda" if on_gpu else "cpu"
        dtype = torch.bfloat16 if on_gpu or bfloat16 else torch.float32
        self._model = stage2_model(config).to(self._device, dtype).eval()
        pixels = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        self._pixels = pixels.to(self._device, dtype)
        queries = config.model.qformer.num_query_tokens
        image_id = config.model.language_model.vocab_size - 1
        ids = np.pad(prompt_ids, ((0, 0), (queries, 0)), constant_values=image_id)
        self._ids = torch.tensor(ids).long().to(self._device)
        self._new_tokens = new_tokens
        self._settings = dict(cache_implementation="static") if on_gpu else {}

    @torch.no_grad()
    def read(self, rows: int, num_beams: int) -> None:
        """Image and prompt, and the first token."""
        self._generate(rows, num_beams, 1)

    @torch.no_grad()
    def caption(self, rows: int, num_beams: int) -> None:
        """All of it."""
        self._generate(rows, num_beams, self._new_tokens)

    def _generate(self, rows: int, num_beams: int, new_tokens: int) -> None:
        ids = self._ids[:rows]
        # No text ends before its last token, so that both sides make as many.
        self._model.generate(
            pixel_values=self._pixels[:rows],
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            num_beams=num_beams,
            early_stopping=False,
            do_sample=False,
            **self._settings,
        )
        if self._device == "cuda":
            torch.cuda.synchronize()
