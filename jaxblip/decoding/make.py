"""What makes texts of images, by task."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from jaxblip.decoding.blip_to_text import BlipToAnswer, BlipToText
from jaxblip.decoding.image_to_text import ImageToText
from jaxblip.decoding.instruct_to_text import InstructToText
from jaxblip.tasks import Task
from jaxblip.tasks.parts import has_qformer


def make_image_to_text(
    task: Task, tokenizer: Any, mesh: Mesh, qformer_tokenizer: Any = None
) -> ImageToText:
    """What makes texts of images for a task that can.

    Args:
      qformer_tokenizer: of the Q-Former, for the task `instruct`.
    """
    if task.config.task == "instruct" and has_qformer(task.config):
        return InstructToText(task, tokenizer, mesh, qformer_tokenizer)
    kinds = {"blip_caption": BlipToText, "blip_vqa": BlipToAnswer}
    return kinds.get(task.config.task, ImageToText)(task, tokenizer, mesh)
