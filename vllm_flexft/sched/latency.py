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

Plain floats, not numpy: the caches are cold whenever a step is learnt, and the code that numpy runs
for two dozen small operations takes longer to come in than this takes to run.

No clock, no I/O, no vLLM: time comes in as a number.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_flexft.sched.step_estimate import JITTER_S, Costs, StepEstimate, dot, product

Vector = npt.NDArray[np.float64]
Amounts = Vector | Sequence[float]  # of each Feature


class Feature(IntEnum):
    """What a step may hold; the unit of each."""

    STEP = 0  # 1 if the model runs at all
    DECODE = 1  # rows of one token
    PREFILL = 2  # tokens of inference prompts
    CONTEXT = 3  # keys that inference attends, summed over its tokens
    CHUNKS = 4  # 1 if it has any: adapters and capture in every layer, and no CUDA graph
    CHUNK = 5  # finetune tokens through the forward
    CHUNK_CONTEXT = 6  # keys that they attend
    LOSS = 7  # rows through the LM head, forward and backward
    LAYER = 8  # tokens x layers through the backward
    LAYER_CONTEXT = 9  # keys attended in it
    UPDATE = 10  # adapter parameters in an optimizer update
    SAVE = 11  # adapter parameters in a snapshot


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
RESTORE_SD = 0.2  # of the machine's speed against that of an earlier run
MIN_VARIANCE = 1e-10  # of a cost, relative: rounding must not make P indefinite
MAX_RATIO = 1e6  # of a cost and its prior
MIN_S = 1e-9
FLOOR = 0.02  # of a cost against the machine's speed: nothing is free


class LatencyModel:
    """`features` are NUM_FEATURES amounts, indexed by `Feature`."""

    def __init__(self, prior: Vector) -> None:
        """`prior`: seconds a unit of each feature; only their ratios matter after a few steps."""
        assert prior.shape == (NUM_FEATURES,)
        assert (prior > 0).all(), prior
        self._prior: list[float] = prior.tolist()
        self.num_observed = 0
        self._first: list[tuple[list[float], float]] = []  # steps by which the prior is scaled
        self._reset()

    def _reset(self) -> None:
        self._theta = [1.0] * NUM_FEATURES
        self._p: list[list[float]] = (np.diag(FEATURE_SD**2) + COMMON_SD**2).tolist()
        self._noise = 0.1  # relative standard deviation of a step's time
        self._bound = 2.0  # standard deviations
        self._speed = 1.0  # seconds against the prior's
        self._run = 0  # clipped innovations in a row; negative: too long a prediction
        self._costs: Costs | None = None

    # ---- prediction

    @property
    def prior(self) -> Vector:
        return np.array(self._prior)

    @property
    def costs(self) -> Costs:
        """What is known by now."""
        if self._costs is None:
            self._costs = Costs(self._prior, self._theta, self._p, self._noise, self._bound)
        return self._costs

    def estimate(self, features: Amounts) -> StepEstimate:
        """Of a step with these amounts, to which more may be added."""
        return StepEstimate(self.costs, [(i, float(a)) for i, a in enumerate(features) if a])

    def mean(self, features: Amounts) -> float:
        """Expected seconds of a step."""
        return self.estimate(features).mean

    def predict(self, features: Amounts) -> tuple[float, float]:
        """Expected seconds and their upper bound."""
        estimate = self.estimate(features)
        return estimate.mean, estimate.upper

    def expected_prices(self) -> Vector:
        """Seconds that one more unit of each feature adds on average."""
        return np.array(self._theta) * self.prior

    def prices(self, optimistic: bool = False) -> Vector:
        """Seconds that one more unit of each feature adds at most: for any amounts a and b
        `upper(a + b) <= upper(a) + prices . b`. Or, optimistic, at least: the difference is what
        is still to be learnt.

        The bound's standard deviation is a norm of the amounts (its square is a quadratic form),
        so that of a sum is at most the sum of those of its parts.
        """
        if optimistic:
            theta = np.array(self._theta)
            low = theta - self._bound * np.sqrt(np.diag(self._p))
            return np.maximum(low, OPTIMISM * theta) * self.prior
        return np.array(self.costs.prices)

    # ---- learning

    def observe(self, features: Amounts, seconds: float) -> None:
        """Learn from a step that took so long."""
        x = [float(a) * c for a, c in zip(features, self._prior, strict=True)]
        mean = dot(self._theta, x)
        if mean < MIN_S or not 0.0 < seconds < float("inf"):
            return  # an empty step, or no time
        self.num_observed += 1
        if self.num_observed <= SCALING_STEPS:
            self._first.append(([float(a) for a in features], seconds))
        if self.num_observed == SCALING_STEPS:
            self._scale_prior()
            return
        self._learn(x, seconds, mean)

    def _scale_prior(self) -> None:
        """How fast the machine is, by the first steps, and then what they say of each cost.

        P is relative to the prior: were that ten times too slow, it would leave costs that were not
        seen yet so uncertain that nothing of their kind ever fits a step.
        """
        slowness = statistics.median(took / dot(f, self._prior) for f, took in self._first)
        self._prior = [slowness * cost for cost in self._prior]
        self._reset()
        for features, seconds in self._first:
            x = [a * cost for a, cost in zip(features, self._prior, strict=True)]
            self._learn(x, seconds, dot(self._theta, x))
        self._first.clear()

    def _learn(self, x: list[float], seconds: float, mean: float) -> None:
        """`x`: the step's amounts, each times its prior cost."""
        theta = self._theta
        self._drift(x, mean)
        gain = product(self._p, x)
        own = dot(gain, x)
        # The machine's speed may have changed: adds common theta theta' to P.
        common = COMMON_DRIFT**2
        variance = self._variance(own + common * mean**2, mean)
        error = seconds - mean
        score = error / variance**0.5
        outlier = abs(score) > CLIP
        if outlier and self._is_change(score):
            common += CHANGE_SD**2
            variance = self._variance(own + common * mean**2, mean)
        elif outlier:
            error *= CLIP / abs(score)
        else:
            self._run = 0
        speed = common**0.5
        scale = 1.0 / variance**0.5
        up = [speed * ratio for ratio in theta]
        down = [scale * (g + common * mean * t) for g, t in zip(gain, theta, strict=True)]
        self._p = [
            [v + u * a - d * b for v, a, b in zip(row, up, down, strict=True)]
            for row, u, d in zip(self._p, up, down, strict=True)
        ]
        for i, row in enumerate(self._p):
            if row[i] < MIN_VARIANCE:
                row[i] = MIN_VARIANCE
        self._speed += NOISE_RATE * (min(seconds / sum(x), MAX_RATIO) - self._speed)
        least, error = FLOOR * self._speed, error * scale
        self._theta = [
            min(max(t + error * d, least), MAX_RATIO) for t, d in zip(theta, down, strict=True)
        ]
        self._calibrate(score, variance, mean)
        self._costs = None

    def _variance(self, own: float, mean: float) -> float:
        """Of a step's time: what the costs may be off, and noise."""
        return max(0.0, own) + (self._noise * mean) ** 2 + JITTER_S**2

    def _drift(self, x: list[float], mean: float) -> None:
        """What may have changed since the last step, beside the machine's speed: the features in
        it, in proportion to their part of its time. Costs that are not seen stay nearly as sure as
        they were, and P cannot wind up."""
        seen = FEATURE_DRIFT**2 / mean  # theta^2 x (theta x / mean) / theta
        for i, (amount, ratio, row) in enumerate(zip(x, self._theta, self._p, strict=True)):
            if amount:
                row[i] += seen * amount * ratio * ratio
            elif row[i] < (UNSEEN_SD * ratio) ** 2:
                row[i] += (UNSEEN_DRIFT * ratio) ** 2

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
            "prior": list(self._prior),
            "theta": list(self._theta),
            "p": [list(row) for row in self._p],
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
        self.num_observed = max(num_observed, SCALING_STEPS)
        self._first.clear()
        # The machine may be another one of its kind, or throttled: by so much at everything.
        p += RESTORE_SD**2 * np.multiply.outer(theta, theta)
        self._prior, self._theta, self._p = prior.tolist(), theta.tolist(), p.tolist()
        self._noise = min(max(noise, NOISE_RANGE[0]), NOISE_RANGE[1])
        self._bound = min(max(bound, BOUND_RANGE[0]), BOUND_RANGE[1])
        self._speed = float(theta.mean())
        self._costs = None
