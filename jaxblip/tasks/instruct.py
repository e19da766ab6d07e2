"""The `instruct` task: stage 2 with a Q-Former that reads the instruction, too (InstructBLIP)."""

from __future__ import annotations

from jaxblip.errors import UserError
from jaxblip.tasks.parts import has_qformer
from jaxblip.tasks.stage2 import Stage2Task


class InstructTask(Stage2Task):
    """Language-modelling loss on the output that an instruction asks for (arXiv 2305.06500 §2.3).

    The Q-Former reads the instruction in its own vocabulary (`instruction_ids`), so that the visual
    tokens are about what is asked, and the language model reads it once more, in front of the
    output: of a decoder-only model it is the prompt in `text_ids`, and of an encoder-decoder model
    the input of the encoder.
    """

    qformer_has_text = True

    @property
    def fields(self) -> tuple[str, ...]:
        if not has_qformer(self.config):  # the instruction is read by the language model alone
            return super().fields
        return (*super().fields, "instruction_ids", "instruction_mask")

    def _check(self) -> None:
        super()._check()
        data = self.config.data
        if "max_input_tokens" in data or data.max_instruction_tokens < data.max_text_tokens:
            return
        raise UserError(
            f"config.data.max_instruction_tokens={data.max_instruction_tokens} leaves no room for "
            f"an output in the data.max_text_tokens={data.max_text_tokens} of both: lower the "
            "first or raise the second."
        )

    def model_inputs(self, batch):
        # All by position, since a decoder-only model has no input before the instruction.
        names = ("text", "input", "instruction")
        texts = (batch.get(f"{name}_{part}") for name in names for part in ("ids", "mask"))
        return (*self.image_inputs(batch), *texts)
