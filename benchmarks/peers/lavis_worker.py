"""Training steps of salesforce-lavis 1.0.2, run by the Python of an environment that has it.

    python lavis_worker.py SIZES.json BATCH.npz

`peers.lavis_step` writes both files and starts it. For each line of standard input it does one
step, and answers with a line. What LAVIS would download (tokenizers, weights) is built here with
random values, of the sizes that are asked for.
"""

import importlib.util
import json
import os
import sys
import tempfile
from functools import partial
from unittest import mock

import numpy as np

# Of LAVIS's dependencies, those that it imports for other models and for data.
UNUSED = ("spacy", "decord", "webdataset", "opendatasets", "streamlit", "plotly", "IPython", "cv2")
for name in UNUSED:
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = mock.MagicMock()

import torch  # noqa: E402
import transformers  # noqa: E402
from lavis.models.blip2_models import blip2_opt, blip2_qformer  # noqa: E402
from lavis.models.blip2_models.blip2 import LayerNorm  # noqa: E402
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel  # noqa: E402
from lavis.models.eva_vit import VisionTransformer  # noqa: E402

PAD, BERT_VOCAB = 0, 30_523


class GivenTokens:
    """In place of a tokenizer: whatever the texts, the tokens of the batch."""

    pad_token_id, bos_token_id = PAD, BERT_VOCAB - 1

    def __init__(self, ids, valid):
        self._ids, self._valid = ids.masked_fill(~valid, PAD), valid.long()

    def __len__(self):
        return BERT_VOCAB

    def __call__(self, texts, **settings):
        if isinstance(texts, str):  # the end of a text, or the prompt, which is empty
            tokens = torch.ones(1, 1, dtype=torch.long)
            return transformers.BatchEncoding({"input_ids": tokens, "attention_mask": tokens})
        return transformers.BatchEncoding({"input_ids": self._ids, "attention_mask": self._valid})


def make_model(sizes, tokenizer):
    """LAVIS's model of the task, with its parts of the given sizes."""
    vision, qformer = sizes["vision"], sizes["qformer"]
    stage1 = sizes["task"] == "stage1"
    base = blip2_qformer.Blip2Qformer if stage1 else blip2_opt.Blip2OPT

    class Model(base):
        @classmethod
        def init_tokenizer(cls):
            return tokenizer

        @classmethod
        def init_vision_encoder(cls, *settings):
            encoder = VisionTransformer(
                img_size=sizes["image_size"],
                patch_size=vision["patch_size"],
                embed_dim=vision["hidden_size"],
                depth=vision["num_hidden_layers"],
                num_heads=vision["num_attention_heads"],
                mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
                qkv_bias=True,
                use_mean_pooling=False,
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            )
            return encoder, LayerNorm(vision["hidden_size"])

        @classmethod
        def init_Qformer(cls, num_queries, vision_width, cross_attention_freq=2):
            config = BertConfig(vocab_size=BERT_VOCAB, **qformer)
            config.encoder_width = vision_width
            config.add_cross_attention = True
            config.cross_attention_freq = cross_attention_freq
            config.query_length = num_queries
            queries = torch.empty(1, num_queries, qformer["hidden_size"]).normal_(std=0.02)
            return BertLMHeadModel(config), torch.nn.Parameter(queries)

    settings = dict(vit_precision="fp32", num_query_token=sizes["num_queries"])
    if stage1:
        return Model(**settings)
    build, opt = blip2_opt.OPTForCausalLM, blip2_opt.OPTConfig(**sizes["language_model"])
    blip2_opt.AutoTokenizer = mock.Mock(from_pretrained=lambda *_, **__: tokenizer)
    blip2_opt.OPTForCausalLM = mock.Mock(from_pretrained=lambda *_, **__: build(opt))
    return Model(**settings)


def main():
    sizes_file, batch_file = sys.argv[1:]
    with open(sizes_file) as file:
        sizes = json.load(file)
    batch = np.load(batch_file)
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # LAVIS prints
    with tempfile.NamedTemporaryFile() as file:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{file.name}", rank=0, world_size=1
        )
        ids, valid = torch.tensor(batch["text_ids"]).long(), torch.tensor(batch["text_mask"])
        model = make_model(sizes, GivenTokens(ids, valid)).train()
        pixels = torch.tensor(batch["image"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        samples = {"image": pixels, "text_input": ["a text"] * len(ids)}
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            **sizes["optimizer"],
        )
        for _ in sys.stdin:
            optimizer.zero_grad(set_to_none=True)
            output = model(samples)
            loss = output["loss"]
            loss.backward()
            optimizer.step()
            print(float(loss), file=answers, flush=True)


if __name__ == "__main__":
    main()
