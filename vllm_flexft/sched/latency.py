"""How long a step will take: a linear model of its work, learnt while serving.

    seconds = theta . x,    x = amount of each feature x its prior cost

Recursive least squares in its Kalman form (Ljung, System Identification, section 11.2): theta
drifts as a random walk, which is how old steps are forgotten, so its covariance P says at all
times how much each cost may be off. Theta is relative to a prior from the model's shape; P lets
all costs move together more readily than each alone, since a machine that is slower than thought,
or was throttled, is slower at everything. One step of any kind then corrects the costs of all.

Robust: an innovation counts up to `CLIP` of its standard deviations (Huber); a run of them to the
same side is no outlier but a change, and P is widened for it. The noise is scaled by the median of
the residuals, which the stalls of a shared machine do not move. Upper bounds are conformal: the
number of standard deviations that held for `COVERAGE` of recent steps (Gibbs & Candes 2021,
https://arxiv.org/abs/2106.00170).

No clock, no I/O, no vLLM: time comes in as a number. `predict` and `observe` take some ten
microseconds each.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


class Feature(IntEnum):
    """What a step may hold; the unit of each."""

    STEP = 0  # 1 if the model runs at all
    DECODE = 1  # rows of one token
    PREFILL = 2  # tokens of inference prompts
    CONTEXT = 3  # keys that inference attends, summed over its tokens
    CHUNK = 4  # finetune tokens through the forward
    CHUNK_CONTEXT = 5  # keys that they attend
    LOSS = 6  # rows through the LM head, forward and backward
    LAYER = 7  # tokens x layers through the backward
    LAYER_CONTEXT = 8  # keys attended in it
    UPDATE = 9  # adapter parameters in an optimizer update
    SAVE = 10  # adapter parameters in a snapshot


NUM_FEATURES = len(Feature)

COMMON_SD = 2.0  # of the machine's speed against the prior, before anything was seen
# Of one cost against the others; what an update or a snapshot costs is a cruder guess.
FEATURE_SD = np.array([0.5] * (NUM_FEATURES - 2) + [2.0, 2.0])
SCALING_STEPS = 8  # that say how fast the machine is
COMMON_DRIFT = 0.005  # a step; the machine's speed
FEATURE_DRIFT = 0.02  # a step that this feature fills; about 50 steps are remembered
UNSEEN_DRIFT, UNSEEN_SD = 0.003, 0.5  # a step without this feature, and at most
OPTIMISM = 0.25  # of a cost, at least
CLIP = 3.0  # standard deviations
CHANGE_RUN = 4  # clipped steps in a row to the same side: a change
CHANGE_SD = 0.7  # of the costs after a change
# Of steps that stay below their bound. Requests are held to a mean over tokens, and are given back
# what a step was over: a wider bound would leave most of the room unused for the sake of stalls.
COVERAGE = 0.9
MEDIAN_SCORE = 0.6745  # half of a normal variable's values are within so many deviations
COVERAGE_RATE = 0.05  # of the conformal bound
NOISE_RATE = 0.05  # of the noise estimate: 20 steps
NOISE_RANGE = (0.01, 0.5)  # relative
BOUND_RANGE = (1.0, 6.0)  # standard deviations
JITTER_S = 50e-6  # of any step, whatever its length
RESTORE_SD = 0.2  # of the machine's speed against that of an earlier run
MIN_VARIANCE = 1e-10  # of a cost, relative: rounding must not make P indefinite
MAX_RATIO = 1e6  # of a cost and its prior
MIN_S = 1e-9
FLOOR = 0.02  # of a cost against the machine's speed: nothing is free


class LatencyModel:
    """`features` are float64 vectors of NUM_FEATURES amounts, indexed by `Feature`."""

    def __init__(self, prior: Vector) -> None:
        """`prior`: seconds a unit of each feature; only their ratios matter after a few steps."""
        assert prior.shape == (NUM_FEATURES,)
        assert (prior > 0).all(), prior
        self.prior = prior.astype(np.float64)
        self.num_observed = 0
        self._first: list[tuple[Vector, float]] = []  # steps by which the prior is scaled
        self._theta = np.empty(NUM_FEATURES)
        self._p = np.empty((NUM_FEATURES, NUM_FEATURES))
        self._reset()
        self._x, self._gain, self._scratch = (np.empty(NUM_FEATURES) for _ in range(3))
        self._square = np.empty((NUM_FEATURES, NUM_FEATURES))
        self._diagonal = np.einsum("ii->i", self._p)  # a view

    def _reset(self) -> None:
        self._theta[:] = 1.0
        self._p[:] = COMMON_SD**2
        self._p += np.diag(FEATURE_SD**2)
        self._noise = 0.1  # relative standard deviation of a step's time
        self._bound = 2.0  # standard deviations
        self._speed = 1.0  # seconds against the prior's
        self._run = 0  # clipped innovations in a row; negative: too long a prediction

    # ---- prediction

    def mean(self, features: Vector) -> float:
        """Expected seconds of a step."""
        np.multiply(features, self.prior, out=self._x)
        return float(self._theta.dot(self._x))

    def predict(self, features: Vector) -> tuple[float, float]:
        """Expected seconds and their upper bound."""
        mean = self.mean(features)
        return mean, mean + self._bound * self._variance(mean) ** 0.5

    def upper(self, features: Vector) -> float:
        """Upper bound of the seconds of a step."""
        return self.predict(features)[1]

    def expected_prices(self) -> Vector:
        """Seconds that one more unit of each feature adds on average."""
        return self._theta * self.prior

    def prices(self, optimistic: bool = False) -> Vector:
        """Seconds that one more unit of each feature adds at most: for any amounts a and b
        `upper(a + b) <= upper(a) + prices . b`. Or, optimistic, at least: the difference is what
        is still to be learnt.

        The bound's standard deviation is a norm of the amounts (its square is a quadratic form),
        so that of a sum is at most the sum of those of its parts.
        """
        if optimistic:
            low: Vector = self._theta - self._bound * np.sqrt(self._diagonal)
            return np.maximum(low, OPTIMISM * self._theta) * self.prior
        price: Vector = np.sqrt(self._diagonal)
        price *= self._bound
        np.multiply(self._theta, 1.0 + self._bound * self._noise, out=self._scratch)
        price += self._scratch
        price *= self.prior
        return price

    # ---- learning

    def observe(self, features: Vector, seconds: float) -> None:
        """Learn from a step that took so long."""
        mean = self.mean(features)
        if mean < MIN_S or not 0.0 < seconds < float("inf"):
            return  # an empty step, or no time
        self.num_observed += 1
        if self.num_observed <= SCALING_STEPS:
            self._first.append((features.copy(), seconds))
        if self.num_observed == SCALING_STEPS:
            self._scale_prior()
            return
        self._learn(seconds, mean)

    def _scale_prior(self) -> None:
        """How fast the machine is, by the first steps, and then what they say of each cost.

        P is relative to the prior: were that ten times too slow, it would leave costs that were not
        seen yet so uncertain that nothing of their kind ever fits a step.
        """
        self.prior *= np.median([took / float(f @ self.prior) for f, took in self._first])
        self._reset()
        for features, seconds in self._first:
            self._learn(seconds, self.mean(features))
        self._first.clear()

    def _learn(self, seconds: float, mean: float) -> None:
        """From the step with the amounts in `_x`."""
        x, theta, gain = self._x, self._theta, self._gain
        self._drift(mean)
        variance = self._variance(mean)
        error = seconds - mean
        score = error / variance**0.5
        outlier = abs(score) > CLIP
        if outlier and self._is_change(score):
            self._add_common(CHANGE_SD)
            variance = self._variance(mean)
        elif outlier:
            error *= CLIP / abs(score)
        else:
            self._run = 0
        np.multiply(gain, error / variance, out=self._scratch)
        theta += self._scratch
        np.multiply.outer(gain, gain, out=self._square)
        self._square /= variance
        self._p -= self._square
        np.maximum(self._diagonal, MIN_VARIANCE, out=self._diagonal)
        self._speed += NOISE_RATE * (min(seconds / float(x.sum()), MAX_RATIO) - self._speed)
        np.clip(theta, FLOOR * self._speed, MAX_RATIO, out=theta)
        self._calibrate(score, variance, mean)

    def _variance(self, mean: float) -> float:
        """Of a step with the amounts in `_x`: what the costs may be off, and noise. Leaves P x in
        `_gain`."""
        np.dot(self._p, self._x, out=self._gain)
        own = max(0.0, float(self._gain.dot(self._x)))
        return own + (self._noise * mean) ** 2 + JITTER_S**2

    def _drift(self, mean: float) -> None:
        """What may have changed since the last step: the features in it, in proportion to their
        part of its time, and the machine's speed. Costs that are not seen stay nearly as sure as
        they were, and P cannot wind up."""
        share = self._scratch
        np.multiply(self._theta, self._theta, out=share)
        share *= self._x
        share *= FEATURE_DRIFT**2 / mean  # theta^2 x (theta x / mean) / theta
        self._diagonal += share
        np.multiply(self._theta, self._theta, out=share)
        unsure = (self._x == 0.0) & (self._diagonal < UNSEEN_SD**2 * share)
        share *= UNSEEN_DRIFT**2
        np.add(self._diagonal, share, out=self._diagonal, where=unsure)
        self._add_common(COMMON_DRIFT)

    def _add_common(self, deviation: float) -> None:
        """All costs may have changed together, by so much relative to each."""
        np.multiply.outer(self._theta, self._theta, out=self._square)
        self._square *= deviation**2
        self._p += self._square

    def _is_change(self, score: float) -> bool:
        """The last of a run of steps that were all too long, or all too short."""
        side = 1 if score > 0 else -1
        self._run = self._run + side if self._run * side > 0 else side
        if abs(self._run) < CHANGE_RUN:
            return False
        self._run = 0
        return True

    def _calibrate(self, score: float, variance: float, mean: float) -> None:
        """Noise and bound from the step's residual, an outlier's up to `CLIP`; the noise as far as
        the residual is not explained by costs that are still unknown."""
        noise = (self._noise * mean) ** 2 / variance  # part of the variance
        above = abs(score) > MEDIAN_SCORE
        self._noise *= 1.0 + NOISE_RATE * noise * (1.0 if above else -1.0)
        self._noise = min(max(self._noise, NOISE_RANGE[0]), NOISE_RANGE[1])
        missed = score > self._bound
        self._bound += COVERAGE_RATE * (missed - (1.0 - COVERAGE))
        self._bound = min(max(self._bound, BOUND_RANGE[0]), BOUND_RANGE[1])

    # ---- state

    def state(self) -> dict[str, Any]:
        """Plain data from which `restore` goes on."""
        return {
            "prior": self.prior.tolist(),
            "theta": self._theta.tolist(),
            "p": self._p.tolist(),
            "noise": self._noise,
            "bound": self._bound,
            "num_observed": self.num_observed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, and changes nothing, where `state` is not that of such a model."""
        try:
            prior, theta, p = (
                np.array(state[k], dtype=np.float64) for k in ("prior", "theta", "p")
            )
            noise, bound = float(state["noise"]), float(state["bound"])
            num_observed = int(state["num_observed"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the state of a latency model: {error!r}") from None
        shapes = (prior.shape, theta.shape, p.shape)
        if shapes != ((NUM_FEATURES,), (NUM_FEATURES,), (NUM_FEATURES, NUM_FEATURES)):
            raise ValueError(f"a latency model with other features: {shapes}")
        sound = bool(np.isfinite(p).all() and (prior > 0).all() and (theta > 0).all())
        sound = sound and bool(np.isfinite(theta).all()) and np.allclose(p, p.T)
        if not sound or np.linalg.eigvalsh(p).min() < -1e-9 or not noise > 0 or not bound > 0:
            raise ValueError("the numbers of the latency model are not sound")
        self.prior, self.num_observed = prior, max(num_observed, SCALING_STEPS)
        self._first.clear()
        self._theta[:] = theta
        self._p[:] = p
        self._noise = min(max(noise, NOISE_RANGE[0]), NOISE_RANGE[1])
        self._bound = min(max(bound, BOUND_RANGE[0]), BOUND_RANGE[1])
        self._speed = float(theta.mean())
        # The machine may be another one of its kind, or throttled.
        self._add_common(RESTORE_SD)
