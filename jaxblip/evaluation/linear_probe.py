"""Linear probe: a linear classifier over what a model makes of images, itself left as it is."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from jaxblip.data import run_sources
from jaxblip.errors import UserError
from jaxblip.evaluation.base import Metrics, Parts
from jaxblip.evaluation.kept import Kept
from jaxblip.evaluation.matching import ClassificationEvaluation
from jaxblip.evaluation.retrieval import check_finite
from jaxblip.training.state import Params

_MAX_ITERATIONS = 1000  # of L-BFGS, as CLIP's


class LinearProbeEvaluation(ClassificationEvaluation):
    """Accuracy at 1 and 5 (0 to 1) of a classifier that is fitted to `config.eval.probe_source`.

    It is logistic regression (CLIP, arXiv 2103.00020, appendix A.3) on the embeddings of images, of
    a Q-Former those of all queries. Each of their values has mean 0 and variance 1 over the images
    that it is fitted to, and `config.eval.probe_l2` weighs the penalty. Classes as of zero-shot.
    """

    def _check(self) -> None:
        super()._check()
        if not self.config.eval.probe_source:
            raise UserError(
                "config.eval.probe_source is empty: a linear probe is fitted to images with the "
                f"same classes as those of {self.source}, such as its training split."
            )

    def _prepare(self, parts: Parts) -> None:
        super()._prepare(parts)
        config = self.config.copy_and_resolve_references()
        config.eval.source = config.eval.probe_source
        self._fitted_to = run_sources.read_eval_set(config)
        true = self._classes_of(self._fitted_to, config.eval.source)
        self._targets = true / true.sum(axis=1, keepdims=True)

    def run(self, params: Params, frozen: Params, kept: Kept | None = None) -> Metrics:
        def embedded(images: np.ndarray) -> np.ndarray:
            _, embeds = self._map(self._side, params, frozen, images)
            check_finite(embeds, "values of the embeddings of images")
            return embeds.reshape(len(embeds), -1)

        features, seen = embedded(self._fitted_to.images), embedded(self.set.images)
        mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
        weights = fit((features - mean) / deviation, self._targets, self.config.eval.probe_l2)
        self.notes = [f"The classifier was fitted to {len(features)} images of "
                      f"{self.config.eval.probe_source}."]  # fmt: skip
        return self._accuracies((seen - mean) / deviation @ weights[:-1] + weights[-1])


def fit(
    features: Float[np.ndarray, "images width"],
    targets: Float[np.ndarray, "images classes"],
    l2: float,
) -> Float[np.ndarray, "width_and_1 classes"]:
    """The weights, with the bias below them, of least mean cross-entropy + `l2` / 2 weights^2."""
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)  # of float64
    shape = features.shape[1], targets.shape[1]

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = features @ weights
        logits -= logits.max(axis=1, keepdims=True)
        log_shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        gradient = features.T @ (np.exp(log_shares) - targets) / len(features)
        gradient[:-1] += l2 * weights[:-1]
        loss = -(targets * log_shares).sum() / len(features) + l2 / 2 * (weights[:-1] ** 2).sum()
        return loss, gradient.ravel()

    found = minimize(
        loss_and_gradient, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B",
        options={"maxiter": _MAX_ITERATIONS},
    )  # fmt: skip
    return found.x.reshape(shape)
