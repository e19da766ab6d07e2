"""A trained run as an object: captions, answers, rankings, embeddings of any images.

    import jaxblip

    model = jaxblip.load("runs/demo/stage2")
    model.caption("cat.png")                                         # ["a cat on a mat"]
    model.answer("cat.png", "What is on the mat?")                   # ["a cat"]
    model.rank("cat.png", ["a cat", "a dog"])                        # [[-1.2, -7.9]]
    for piece in model.stream("cat.png"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxblip.data import inputs, run_sources
from jaxblip.data.images import is_video, of_frames, resize_square
from jaxblip.data.text import (
    ANSWER_DECODING,
    INSTRUCTION,
    QUESTION,
    QUESTION_FOR_ENCODER,
    clean_caption,
    clean_question,
    fill_prompt,
)
from jaxblip.data.user_images import ImageLike, list_images, read_image
from jaxblip.decoding.image_to_text import batch_bucket
from jaxblip.decoding.make import make_image_to_text
from jaxblip.decoding.search import DecodingConfig
from jaxblip.errors import UnreadableImages, UserError
from jaxblip.evaluation.batching import RowMap
from jaxblip.training.restore import Run, load_run
from jaxblip.training.state import Params, merge_params

ABILITIES = {
    "stage2": ("caption", "answer", "rank", "stream"),
    "instruct": ("caption", "answer", "rank", "stream"),
    "blip_caption": ("caption", "rank"),
    "blip_vqa": ("answer", "rank"),
    "stage1": ("embed_images", "embed_texts", "match"),
    "blip_retrieval": ("embed_images", "embed_texts", "match"),
    "clip": ("embed_images", "embed_texts"),
    "language_model": (),
}

# What InstructBLIP is asked for captions (arXiv 2305.06500, appendix).
CAPTION_INSTRUCTION = "A short image description."


def load(
    workdir: str | os.PathLike, *, step: int | None = None, overrides: Sequence[str] = ()
) -> Model:
    """The model of a run.

    Args:
      workdir: `--workdir` of a training.
      step: which checkpoint, by default the latest.
      overrides: of its config, such as `("config.mesh.tensor=2", "config.eval.batch_size=8")`.

    Raises:
      UserError: no complete run is there, or a frozen part is not the one it was trained with.
    """
    workdir = os.fspath(workdir)
    return Model(load_run(workdir, overrides, step), workdir)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How text is generated, as users say it; None is the default of the run, or of sampling.

    The attributes are described in `Model.caption`.
    """

    num_captions: int = 1
    num_beams: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.num_captions < 1:
            raise UserError(f"num_captions={self.num_captions} must be at least 1.")
        if self.num_captions > 1 and self.sample is False:
            raise UserError(
                f"num_captions={self.num_captions} are drawn by sampling: set sample to True, or "
                "num_captions to 1."
            )
        if self.samples and (self.num_beams or 1) > 1:
            what = "sample=True" if self.sample else f"num_captions={self.num_captions}"
            raise UserError(
                f"{what} and num_beams={self.num_beams} exclude each other, since captions are "
                "either drawn or searched for: leave out one of them."
            )
        for name in ("temperature", "top_p", "top_k"):
            if not self.samples and getattr(self, name) is not None:
                raise UserError(
                    f"{name}={getattr(self, name)} is about sampling: set sample to True, too, or "
                    f"leave {name} out."
                )
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed={self.seed} must be between 0 and {(1 << 32) - 1}.")

    @property
    def samples(self) -> bool:
        """Whether captions are drawn; several always are."""
        return bool(self.sample) or self.num_captions > 1

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in vars(self).items() if value != fields[name]}

    def check_stream(self) -> None:
        """Raises UserError unless there is one caption, chosen token by token."""
        for name in ("num_captions", "num_beams"):
            if (value := getattr(self, name) or 1) > 1:
                raise UserError(
                    f"{name}={value} cannot be streamed, since a stream is one caption from its "
                    f"first word on: leave out {name}."
                )

    def changes(self) -> dict[str, Any]:
        """The fields of `DecodingConfig` that were set."""
        fields = {field.name for field in dataclasses.fields(DecodingConfig)}
        changes = {name: value for name, value in self.changed().items() if name in fields}
        return changes | ({"sample": True, "num_beams": 1} if self.samples else {})


class Model:
    """A run's model; what it can do depends on the task that it was trained for.

    | task | methods |
    |---|---|
    | `stage2`, `instruct` | `caption`, `answer`, `rank`, `stream` |
    | `blip_caption` | `caption`, `rank` |
    | `blip_vqa` | `answer`, `rank` |
    | `stage1`, `blip_retrieval` | `embed_images`, `embed_texts`, `match` |
    | `clip` | `embed_images`, `embed_texts` |

    Images are files, encoded bytes, Pillow images or uint8 arrays, one or a list of them; of any
    size and colour space. In the place of an image may stand a video, the list of its frames, of
    which `config.data.frames` are read: `model.caption([["1.png", "2.png"]])`. The first call
    compiles, which takes seconds to minutes. Later ones do not, as long as there are not many more
    images, nor much longer texts.

    Attributes:
      workdir, step: the run, and which of its checkpoints.
      task: its task, with the config (`task.config`).
    """

    def __init__(self, run: Run, workdir: str):
        self.workdir, self.step, self.task = workdir, run.step, run.task
        self._run = run
        self._maps: dict[int, RowMap] = {}
        self._encode = inputs.text_encoder(run.task.config, run.tokenizer)
        if "rank" in ABILITIES[self.name]:
            self._params = merge_params(run.params, run.frozen)
            self._text = make_image_to_text(
                run.task, run.tokenizer, run.mesh, run.qformer_tokenizer
            )

    @property
    def name(self) -> str:
        """The task's name, such as stage2 (`ABILITIES`)."""
        return self.task.config.task

    def __repr__(self) -> str:
        return f"<jaxblip model of task {self.name!r}, step {self.step} of {self.workdir!r}>"

    # Stage 2: text from images.

    def caption(
        self,
        images: ImageLike | Sequence[ImageLike],
        prompt: str | Sequence[str] | None = None,
        *,
        num_captions: int = 1,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        length_penalty: float | None = None,
        seed: int = 0,
    ) -> list[str] | list[list[str]]:
        """What the language model says to each image and prompt, without the prompt.

        Args:
          images: one or several.
          prompt: words that the caption goes on from, such as "a photo of"; one for all images or
            one for each. By default the one that the run was trained with, often none; where it
            was trained with instructions, "A short image description." takes their place.
          num_captions: of each image, drawn by sampling when they are more than 1.
          num_beams: of beam search; 1 takes the most probable token each time. By default the run's
            `config.eval.num_beams`; 1 where captions are sampled.
          max_new_tokens, min_new_tokens: length of a caption in tokens of text, the stop token
            included. Neither the image's tokens nor the prompt's count. By default the run's.
          sample: draw each token by its probability, instead of searching for the best caption.
          temperature: of sampling; below 1 probable words become more probable. By default 1.
          top_p: sample among the most probable tokens that together have this probability.
          top_k: sample among so many most probable tokens.
          repetition_penalty: above 1 makes words that were said improbable. By default 1.
          length_penalty: above 0 favours long captions of a beam search, below 0 short ones.
          seed: the same seed draws the same captions.

        Returns:
          One caption an image; for num_captions above 1 a list of them for each image.

        Raises:
          UserError: the run is not of stage 2, images cannot be read (`errors.UnreadableImages`
            says which), or settings exclude each other.
        """
        self._check_ability("caption")
        decoding = Decoding(
            num_captions=num_captions,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sample=sample,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            seed=seed,
        )
        return self._generate(images, self._own_prompt(prompt), decoding, {})

    def answer(
        self,
        images: ImageLike | Sequence[ImageLike],
        questions: str | Sequence[str],
        context: str | Sequence[str] = "",
        prompt: str | None = None,
        **decoding: Any,
    ) -> list[str] | list[list[str]]:
        """Answers to questions about images.

        Args:
          images: one, or one for each question.
          questions: one, or one for each image. Several about one image are allowed.
          context: what to know before the question; one, or one for each.
          prompt: in which {} stands for the question (`question_prompt`).
          decoding: as in `caption`. By default up to 10 new tokens and a length penalty of -1, for
            short answers, as in BLIP-2; for `blip_vqa` what `config.eval` of the run says.

        Returns, Raises: as `caption`.
        """
        self._check_ability("answer")
        prompts = self.question_prompt(questions, context, prompt)
        defaults = {} if self.name == "blip_vqa" else ANSWER_DECODING
        return self._generate(images, prompts, Decoding(**decoding), defaults)

    def question_prompt(
        self,
        questions: str | Sequence[str],
        context: str | Sequence[str] = "",
        prompt: str | None = None,
    ) -> str | list[str]:
        """What the language model reads of a question: "Context: … Question: … Answer:".

        Args:
          prompt: in which {} stands for the question; by default that of the run (`data.prompt`)
            where it has a {}, and the question alone for `blip_vqa`. For all others BLIP-2's,
            "Question: {} Answer:", or "Question: {} Short answer:" for an encoder-decoder language
            model.
        """
        config, max_words = self.task.config, 0
        if prompt is None and run_sources.reads_instructions(config):
            prompt, max_words = config.data.prompt or INSTRUCTION, config.data.max_words
        elif prompt is None:
            prompt = QUESTION_FOR_ENCODER if inputs.has_encoder(self.task.config) else QUESTION
        if prompt.count("{}") != 1:
            raise UserError(
                f"The prompt of a question has {{}} once, where the question is to stand: "
                f"{prompt!r} has it {prompt.count('{}')} times."
            )

        def filled(question, context):
            # No `format`: questions and prompts may hold other braces.
            before, after = prompt.split("{}")
            question = clean_question(question, max_words)  # as for training
            background = f"Context: {context.strip()} " if context.strip() else ""
            return f"{background}{before}{question}{after}"

        if isinstance(questions, str) and isinstance(context, str):
            return filled(questions, context)
        return [filled(*pair) for pair in zip(*_matched(questions=questions, context=context))]

    def rank(
        self,
        images: ImageLike | Sequence[ImageLike],
        candidates: Sequence[str],
        prompt: str | Sequence[str] | None = None,
        *,
        mean: bool = False,
    ) -> Float[np.ndarray, "images candidates"]:
        """Log-likelihood (nats) of each candidate as the text about each image.

        An image and its prompt are read once for all candidates. The softmax of a row is the
        probability of each candidate, if it is one of them.

        Args:
          images: one or several.
          candidates: texts, the same for all images.
          prompt: as in `caption`; `question_prompt(question)` makes candidates answers.
          mean: divide by the number of tokens, so that long candidates are not at a disadvantage.
            Otherwise the sum, over the candidate's tokens and the stop token.

        Raises:
          UserError: as `caption`, and for an empty candidate.
        """
        self._check_ability("rank")
        if isinstance(candidates, str) or not candidates:
            raise UserError(f"candidates={candidates!r} must be a list of texts.")
        if empty := [place for place, text in enumerate(candidates) if not text.strip()]:
            raise UserError(f"Candidate number {empty[0]} of {len(candidates)} is empty: drop it.")
        pixels, rows, prompts = self._rows(images, self._own_prompt(prompt))
        of_prompt = {
            prompt: [self._text.candidate_tokens(prompt, text) for text in candidates]
            for prompt in set(prompts)
        }
        tokens = [of_prompt[prompt] for prompt in prompts]
        before = list(map(self._text.prompt, prompts))
        scores = self._text.rank(self._params, pixels, before, tokens, rows=rows)
        lengths = np.array([[len(candidate) for candidate in row] for row in tokens], np.float32)
        return scores / lengths if mean else scores

    def stream(
        self, image: ImageLike, prompt: str | None = None, **decoding: Any
    ) -> Iterator[str]:
        """The caption of one image piece by piece, as it is generated.

        The pieces joined are `caption(image, prompt, num_beams=1, ...)`.

        Args:
          prompt: as in `caption`, or from `question_prompt`.
          decoding: as in `caption`, but one caption without beams.

        Raises:
          UserError: as `caption`, before the first piece.
        """
        self._check_ability("stream")
        decoding = Decoding(**decoding)
        decoding.check_stream()
        if (count := len(list_images(image))) > 1:
            raise UserError(f"{count} images cannot be streamed: give one at a time.")
        config = self._text.decoding_config(**(decoding.changes() | {"num_beams": 1}))

        def pieces() -> Iterator[str]:
            pixels, _, (words,) = self._rows(image, self._own_prompt(prompt))
            yield from self._text.stream(
                self._params, pixels, self._text.prompt(words), config, decoding.seed
            )

        return pieces()

    # Stage 1 and CLIP: embeddings and matches.

    def embed_images(
        self, images: ImageLike | Sequence[ImageLike]
    ) -> Float[np.ndarray, "images *queries embed"]:
        """L2-normalised embeddings of images, float32.

        One a query token in stage 1, where the similarity to a text is the largest of theirs; one
        an image in CLIP and BLIP. `embed_images(x) @ embed_texts(y).T` are cosines.
        """
        self._check_ability("embed_images")
        pixels = self._pixels(images)
        if "match" in ABILITIES[self.name]:
            return self._map(self.task.embed_images, self._map(self.task.image_features, pixels))
        return self._map(self.task.embed_images, pixels)

    def embed_texts(self, texts: str | Sequence[str]) -> Float[np.ndarray, "texts embed"]:
        """L2-normalised embeddings of texts, float32; cleaned as captions are for training."""
        self._check_ability("embed_texts")
        return self._map(self.task.embed_texts, *self._clean(texts))

    def match(
        self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]
    ) -> Float[np.ndarray, "images texts"]:
        """Probability (0-1) by the ITM head that a text is about an image, of all pairs.

        Every pair is computed by itself: for many images and texts, compare embeddings first.
        """
        self._check_ability("match")
        features = self._map(self.task.image_features, self._pixels(images))
        ids, mask = self._clean(texts)
        of_image, of_text = np.indices((len(features), len(ids))).reshape(2, -1)
        pairs = (of_image, of_text, of_text)
        return self._map(self._match, features, ids, mask, rows=pairs).reshape(-1, len(ids))

    def _match(self, params: Params, features: Array, ids: Array, mask: Array) -> Array:
        image = self.task.apply(params, features, method="read_image")
        logits = self.task.apply(params, image, ids, mask, method="match")
        return jax.nn.softmax(logits.astype("float32"))[:, 1]

    def _map(self, function: Callable[..., Array], *arrays: np.ndarray, rows=None) -> np.ndarray:
        """`function` over rows, in batches of few sizes."""
        count = len(arrays[0]) if rows is None else len(rows[0])
        size = batch_bucket(count, self.task.config.eval.batch_size, self._run.mesh)
        if size not in self._maps:
            self._maps[size] = RowMap(self._run.mesh, size)
        run = self._run
        return self._maps[size](function, run.params, run.frozen, *arrays, rows=rows)

    def _clean(self, texts: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        texts = [texts] if isinstance(texts, str) else texts
        return self._encode([clean_caption(t, self.task.config.data.max_words) for t in texts])

    # What users give, as arrays.

    def _check_ability(self, ability: str) -> None:
        able = [task for task, abilities in ABILITIES.items() if ability in abilities]
        if self.name not in able:
            raise UserError(
                f"{self.workdir!r} is a run of the task {self.name!r}, which has no `{ability}`: "
                f"name a run of {' or '.join(able)}."
            )

    def _own_prompt(self, prompt: str | Sequence[str] | None) -> str | Sequence[str]:
        if prompt is not None:
            return prompt
        return fill_prompt(self.task.config.data.prompt, CAPTION_INSTRUCTION)

    def _generate(self, images, prompts, decoding: Decoding, defaults: dict[str, Any]):
        config = self._text.decoding_config(**(defaults | decoding.changes()))
        pixels, rows, prompts = self._rows(images, prompts)
        count = decoding.num_captions
        texts = self._text.generate(
            self._params,
            pixels,
            [prompt for prompt in map(self._text.prompt, prompts) for _ in range(count)],
            config,
            rows=np.repeat(rows, count),
            seed=decoding.seed,
        )
        if count == 1:
            return texts
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    def _rows(self, images, texts) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Pixels, and for each row of the result its image and its text."""
        pixels = self._pixels(images)
        rows, texts = _matched(images=list(range(len(pixels))), texts=texts)
        return pixels, np.array(rows), texts

    def _pixels(self, images) -> UInt8[np.ndarray, "images *frames size size 3"]:
        data = self.task.config.data
        frames = data.get("frames", 1)
        images = list_images(images)
        if not images:
            raise UserError("The list of images is empty: give one at least.")
        how = data.image_size_px, data.resize, data.interpolation
        if frames == 1 and any(map(is_video, images)):
            raise UserError(
                "The model reads one image at a time, and not the frames of a video: give them one "
                "by one, or set config.data.frames, of a run over a language model, to 4 or so."
            )

        def square(image):
            return resize_square(read_image(image, data.max_image_pixels), *how)

        squares, reasons = [], {}
        for place, image in enumerate(images):
            try:
                squares.append(of_frames(square, image, frames))
            except UserError as error:
                reasons[place] = str(error)
        if reasons:
            raise UnreadableImages(reasons)
        return np.stack(squares)


def _matched(**lists: Any) -> list[list[Any]]:
    """Lists of one length: a single value, or a list of one, stands for as many as the others."""
    listed = {name: [x] if isinstance(x, str) else list(x) for name, x in lists.items()}
    count = max(map(len, listed.values()))
    if wrong := [name for name, values in listed.items() if len(values) not in (1, count)]:
        sizes = " and ".join(f"{len(values)} {name}" for name, values in listed.items())
        raise UserError(
            f"{sizes} do not fit together: give as many of each, or one of the {wrong[0]}."
        )
    return [values * count if len(values) == 1 else values for values in listed.values()]
