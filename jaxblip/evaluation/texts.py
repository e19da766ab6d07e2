"""Generated captions and answers, and how they are scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxblip.data import run_sources
from jaxblip.data.text import fill_prompt
from jaxblip.decoding.make import make_image_to_text
from jaxblip.evaluation import captions, vqa
from jaxblip.evaluation.base import Evaluation, Metrics, Parts
from jaxblip.evaluation.kept import Kept
from jaxblip.evaluation.lists import read_lines
from jaxblip.training.state import Params, merge_params


class CaptionEvaluation(Evaluation):
    """Captions by COCO's metrics; in all, and by domain where the set has domains (NoCaps).

    `run` gives `caption_exact` (share of captions that are one of the true ones) and what
    `captions.caption_metrics` gives.
    """

    metric_names = ("caption_exact", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider")
    handed_in = "image_id", "caption"

    def _prepare(self, parts: Parts) -> None:
        self._model = make_image_to_text(*parts)
        self._prompts = run_sources.prompts_of_entries(self.config, len(self.set.rows))

    def run(self, params: Params, frozen: Params, kept: Kept | None = None) -> Metrics:
        self.predictions = self._generate(params, frozen, kept or Kept())
        return self.score(self.predictions)

    def score(self, predictions: Sequence[str]) -> Metrics:
        """Metrics of a prediction for each entry; leaves `details` and `notes`."""
        java = self.java and captions.has_java()
        self.notes = [f"Captions are divided into words by {captions.tokenizer_name(java)}."]
        if self.java:
            self.notes += captions.missing_metrics()
        exact = captions.exact_share(predictions, self.set.captions)
        metrics = captions.caption_metrics(predictions, self.set.texts, java)
        self.details = {}
        domains = [fact.get("domain", "") for fact in self.set.facts]
        for domain in sorted(filter(None, set(domains))):
            rows = [row for row, its in enumerate(domains) if its == domain]
            # A domain is a set of its own: CIDEr counts in how many of its images a word occurs.
            chosen = ([texts[row] for row in rows] for texts in (predictions, self.set.texts))
            by_domain = self.details.setdefault("by domain", {})
            by_domain[domain] = captions.caption_metrics(*chosen, java)
        return {"caption_exact": exact, **metrics}

    def _generate(self, params: Params, frozen: Params, kept: Kept) -> list[str]:
        model, data = self._model, self.set
        everything = merge_params(params, frozen)
        prompts = list(map(model.prompt_of_example, data.instructions, self._prompts))

        def batches(start: int):
            return model.generate_batches(
                everything, data.images, prompts, model.decoding_config(), rows=data.rows,
                start=start,
            )  # fmt: skip

        return kept.collect("texts", batches)


class AnswerEvaluation(CaptionEvaluation):
    """Answers to questions: VQA v2, OK-VQA and GQA, by `config.eval.kind`.

    `run` gives `vqa_accuracy`, `okvqa_accuracy` or `gqa_accuracy` (0 to 1), and `caption_exact`,
    the share of answers that are written as a true one; in `details` the accuracy by type. With
    `config.eval.answers` the most probable answer of a list is the prediction.
    """

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (f"{self.kind}_accuracy", "caption_exact")

    @property
    def handed_in(self) -> tuple[str, str]:
        return ("questionId", "prediction") if self.kind == "gqa" else ("question_id", "answer")

    def _check(self) -> None:
        answers = self.config.eval.answers
        self._answers = read_lines(answers, "config.eval.answers") if answers else []
        self._lemma = vqa.english_lemma() if self.kind == "okvqa" else None

    def run(self, params: Params, frozen: Params, kept: Kept | None = None) -> Metrics:
        asked = run_sources.eval_prompts(self.config)
        how = f"in {len(asked)} ways, such as" if asked[1:] else "as"
        self.notes = [f"Questions are asked {how} {asked[0]!r}."] if any(asked) else []
        return super().run(params, frozen, kept)

    def score(self, predictions: Sequence[str]) -> Metrics:
        scores = self._scores = list(map(self._score, predictions, self.set.texts))
        facts = self.set.facts
        types = {
            "by answer type": [
                fact.get("answer_type") or answer_type(texts)
                for fact, texts in zip(facts, self.set.texts, strict=True)
            ],
            "by question type": [fact.get("question_type", "") for fact in facts],
        }
        tables = {what: vqa.means_by(scores, groups) for what, groups in types.items()}
        self.details = {what: table for what, table in tables.items() if table}
        return {
            f"{self.kind}_accuracy": sum(scores) / len(scores),
            "caption_exact": captions.exact_share(predictions, self.set.captions),
        }

    def gallery(self) -> list[dict[str, Any]]:
        """As of captions; right is what has more than half of the accuracy."""
        items = zip(super().gallery(), self._scores, strict=True)
        return [item | {"right": score > 0.5} for item, score in items]

    def _score(self, prediction: str, answers: Sequence[str]) -> float:
        if self.kind == "gqa":
            return float(vqa.is_exact_answer(prediction, answers))
        return vqa.vqa_accuracy(prediction, answers, self._lemma)

    def references(self) -> list[list[str]]:
        """The different answers of each question, the most frequent first."""
        return [[text for text, _ in Counter(texts).most_common()] for texts in self.set.texts]

    def _generate(self, params: Params, frozen: Params, kept: Kept) -> list[str]:
        if not self._answers:
            return super()._generate(params, frozen, kept)
        model, data, answers = self._model, self.set, self._answers
        everything, size = merge_params(params, frozen), self.config.eval.batch_size
        of_prompt = {}

        def candidates(text: str):
            if text not in of_prompt:
                of_prompt[text] = [model.candidate_tokens(text, answer) for answer in answers]
            return of_prompt[text]

        def batches(start: int):
            for first in range(start, len(data.rows), size):
                asked = data.instructions[first : first + size]
                prompts = self._prompts[first : first + size]
                scores = model.rank(
                    everything,
                    data.images,
                    list(map(model.prompt_of_example, asked, prompts)),
                    # An answer's first word is tokenized in the light of what stands before it.
                    list(map(candidates, map(fill_prompt, prompts, asked))),
                    rows=data.rows[first : first + size],
                )
                yield [answers[best] for best in scores.argmax(axis=1)]

        return kept.collect("texts", batches)


def answer_type(answers: Sequence[str]) -> str:
    """"yes/no", "number" or "other", by the most frequent answer, as VQA v2 divides questions."""
    most = vqa.normalize_answer(Counter(answers).most_common(1)[0][0])
    if most in ("yes", "no"):
        return "yes/no"
    return "number" if most.replace(".", "", 1).isdigit() else "other"
