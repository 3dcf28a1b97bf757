"""A machine for the latency model to learn: known costs, noise, outliers, a variable clock."""

from __future__ import annotations

import numpy as np

from vllm_flexft.sched.latency import NUM_FEATURES, Feature, Vector

# Seconds a unit, in the order of Feature: a model of 100 M parameters on two CPU cores, about.
COSTS = np.array([8e-3, 2e-4, 3e-4, 5e-8, 5e-3, 2.5e-4, 2e-8, 4e-4, 1.2e-5, 2e-9, 4e-9, 1e-8])
# As if from the model's shape: 3 to 8 times too fast, and each off by its own factor.
PRIOR = COSTS / np.array([5.0, 2.0, 3.0, 5.0, 4.0, 2.5, 2.0, 6.0, 2.4, 2.0, 4.0, 8.0])


class Plant:
    def __init__(self, seed: int = 0, noise: float = 0.05, outliers: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise, self.outliers = noise, outliers
        self.slowness = 1.0

    def mean(self, features: Vector) -> float:
        return self.slowness * float(COSTS @ features)

    def seconds(self, features: Vector) -> float:
        """With multiplicative noise and, rarely, a step that takes five times as long."""
        factor = np.exp(self.noise * self.rng.standard_normal())
        if self.rng.random() < self.outliers:
            factor *= 5.0
        return self.mean(features) * float(factor)

    def step(self, finetune: bool = True, rows: tuple[int, int] = (1, 32)) -> Vector:
        """A random step as an engine runs them: decode rows, sometimes a prefill, and finetune
        work."""
        rng, features = self.rng, np.zeros(NUM_FEATURES)
        features[Feature.STEP] = 1
        features[Feature.DECODE] = decode = rng.integers(*rows)
        features[Feature.CONTEXT] = decode * rng.integers(100, 1000)
        if rng.random() < 0.15:
            features[Feature.PREFILL] = prefill = rng.integers(32, 512)
            features[Feature.CONTEXT] += prefill * 200
        if not finetune:
            return features
        if rng.random() < 0.6:
            features[Feature.CHUNKS] = 1
            features[Feature.CHUNK] = tokens = rng.integers(16, 200)
            features[Feature.CHUNK_CONTEXT] = tokens * rng.integers(16, 500)
        if rng.random() < 0.6:
            tokens = 64 * rng.integers(1, 8)
            if rng.random() < 0.1:
                features[Feature.LOSS] = tokens
            else:
                features[Feature.LAYER] = tokens
                features[Feature.LAYER_CONTEXT] = tokens * rng.integers(16, 500)
        if rng.random() < 0.02:
            features[Feature.UPDATE] = 3e6
        return features
