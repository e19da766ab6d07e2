"""The files of BLIP's authors (salesforce/BLIP), which have no config: models by names and shapes.

Fine-tuned ones are of one task; the pretrained ones have the heads of retrieval and a decoder.
"""

from __future__ import annotations

from jaxblip.interop.entries import Layout, linear, norm, plain
from jaxblip.interop.families.blip import med_decoder_entries, med_entries
from jaxblip.interop.families.lavis import VISION, lavis_vit_config
from jaxblip.interop.families.sizes import heads_of, num_layers, shape_of
from jaxblip.interop.families.vision import POSITION_IDS, lavis_vit_entries
from jaxblip.interop.files import Weights
from jaxblip.models.blip import BlipCaptioner, BlipQuestionAnswering, BlipRetrieval
from jaxblip.models.med import MedConfig

ENCODER, DECODER = "text_encoder", "text_decoder"
HEADS = {"vision_proj", "text_proj", "itm_head"}
# Momentum encoders and queues: state of their training of ITC, which the one here does without.
MOMENTUM = (r"\w+_m\..*", r"(image|text|idx)_queue", r"queue_ptr|ptr_queue")

OriginalBlip = BlipRetrieval | BlipCaptioner | BlipQuestionAnswering


def is_original_blip(weights: Weights) -> bool:
    """Whether these are the names of a BLIP of its authors."""
    has_text = not {ENCODER, DECODER}.isdisjoint(_parts(weights))
    return has_text and f"{VISION}patch_embed.proj.weight" in weights.tensors


def original_blip(weights: Weights) -> tuple[OriginalBlip, Layout]:
    """The model of a file, and how the file holds its parameters.

    A pretrained one is a model of retrieval, with the decoder beside it. `[DEC]` and `[ENC]` are
    the last words, and a text that is read with its image begins with `[ENC]`, as in their code.

    Raises:
      UserError: a tensor that decides a size is not there.
    """
    parts = _parts(weights)
    vision = lavis_vit_config(weights)
    text = _med_config(weights, f"{ENCODER}." if ENCODER in parts else f"{DECODER}.bert.")
    dec, enc = text.vocab_size - 2, text.vocab_size - 1
    entries = [*lavis_vit_entries(vision, VISION), *norm(f"{VISION}norm", "vision_norm")]
    if ENCODER in parts:
        entries += med_entries(text, f"{ENCODER}.", "text/")
    if DECODER in parts:
        entries += med_decoder_entries(text, f"{DECODER}.", "decoder/")
    if ENCODER not in parts:
        model = BlipCaptioner(vision, text, dec_token_id=dec)
    elif DECODER in parts and HEADS.isdisjoint(parts):
        model = BlipQuestionAnswering(vision, text, dec_token_id=dec, enc_token_id=enc)
    else:
        embed_dim, _ = shape_of(weights, "vision_proj.weight", 2)
        model = BlipRetrieval(vision, text, embed_dim=embed_dim, enc_token_id=enc)
        entries += [
            *linear("vision_proj", "image_projection"),
            *linear("text_proj", "text_projection"),
            *linear("itm_head", "itm_head"),
            *plain("temp", "temperature"),
        ]
    return model, Layout(tuple(entries), ignored=(POSITION_IDS, *MOMENTUM))


def _parts(weights: Weights) -> set[str]:
    return {name.split(".")[0] for name in weights.tensors}


def _med_config(weights: Weights, theirs: str) -> MedConfig:
    """The text stack whose names begin with `theirs`; heads are 64 wide, as in BERT."""
    vocab_size, width = shape_of(weights, f"{theirs}embeddings.word_embeddings.weight", 2)
    positions, _ = shape_of(weights, f"{theirs}embeddings.position_embeddings.weight", 2)
    layers = f"{theirs}encoder.layer."
    mlp_width, _ = shape_of(weights, f"{layers}0.intermediate.dense.weight", 2)
    return MedConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers(weights, layers),
        num_heads=heads_of(weights, width, 64),
        mlp_width=mlp_width,
        max_positions=positions,
    )
