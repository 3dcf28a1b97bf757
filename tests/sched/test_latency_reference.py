"""The latency model learns with few calls into numpy; here it is written down as in the book."""

from __future__ import annotations

import numpy as np
import pytest
from harness.plant import PRIOR, Plant

from vllm_flexft.sched import latency
from vllm_flexft.sched.latency import LatencyModel, Vector
from vllm_flexft.sched.step_estimate import JITTER_S


class Reference:
    """Kalman filter of theta; a drift of P, a measurement, robust against outliers."""

    def __init__(self, model: LatencyModel) -> None:
        state = model.state()
        self.prior, self.theta = np.array(state["prior"]), np.array(state["theta"])
        self.p, self.noise, self.bound = np.array(state["p"]), state["noise"], state["bound"]
        self.speed, self.run = model._speed, model._run

    def observe(self, features: Vector, seconds: float) -> None:
        x, theta = features * self.prior, self.theta
        mean = float(theta @ x)
        diagonal = np.diag(self.p)
        seen = latency.FEATURE_DRIFT**2 * theta**2 * x / mean
        unsure = (x == 0) & (diagonal < (latency.UNSEEN_SD * theta) ** 2)
        unseen = np.where(unsure, (latency.UNSEEN_DRIFT * theta) ** 2, 0.0)
        self.p = self.p + np.diag(seen + unseen)
        self.p = self.p + latency.COMMON_DRIFT**2 * np.outer(theta, theta)

        def variance() -> float:
            return float(x @ self.p @ x) + (self.noise * mean) ** 2 + JITTER_S**2

        error = seconds - mean
        score = error / np.sqrt(variance())
        if abs(score) <= latency.CLIP:
            self.run = 0
        else:
            side = int(np.sign(score))
            self.run = self.run + side if self.run * side > 0 else side
            if abs(self.run) == latency.CHANGE_RUN:
                self.run = 0
                self.p = self.p + latency.CHANGE_SD**2 * np.outer(theta, theta)
            else:
                error *= latency.CLIP / abs(score)
        gain, total = self.p @ x, variance()
        self.p = self.p - np.outer(gain, gain) / total
        self.speed += latency.NOISE_RATE * (seconds / x.sum() - self.speed)
        least = latency.FLOOR * self.speed
        self.theta = np.clip(theta + gain * error / total, least, latency.MAX_RATIO)
        part = (self.noise * mean) ** 2 / total
        up = 1.0 if abs(score) > latency.MEDIAN_SCORE else -1.0
        self.noise = np.clip(self.noise * (1 + latency.NOISE_RATE * part * up), 0.01, 0.5)
        missed = float(score > self.bound)
        self.bound += latency.COVERAGE_RATE * (missed - (1.0 - latency.COVERAGE))
        self.bound = np.clip(self.bound, 1.0, 6.0)


@pytest.mark.parametrize("seed", range(3))
def test_it_learns_what_the_formulas_say(seed: int) -> None:
    model, plant = LatencyModel(PRIOR), Plant(seed, noise=0.08, outliers=0.02)
    for _ in range(latency.SCALING_STEPS):
        model.observe(features := plant.step(), plant.seconds(features))
    reference = Reference(model)
    for step in range(600):
        plant.slowness = 3.0 if step > 300 else 1.0  # a change, which is no outlier
        features = plant.step(finetune=step % 200 < 150)
        seconds = plant.seconds(features)
        reference.observe(features, seconds)
        model.observe(features, seconds)
    state = model.state()
    assert state["theta"] == pytest.approx(reference.theta, rel=1e-8)
    assert np.array(state["p"]) == pytest.approx(reference.p, rel=1e-6, abs=1e-12)
    assert state["noise"] == pytest.approx(reference.noise)
    assert state["bound"] == pytest.approx(reference.bound)
