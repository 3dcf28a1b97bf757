"""How long one step will take, while work is added to it.

Planning asks for the bound of a step a dozen times with a little more in it each time: only what
changes is summed up again.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

JITTER_S = 50e-6  # of any step, whatever its length

Work = Sequence[tuple[int, float]]  # features, and how much of each


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(map(operator.mul, a, b))


def product(matrix: Sequence[Sequence[float]], x: Sequence[float]) -> list[float]:
    """Of a symmetric matrix and a vector that is zero in many places."""
    result = [0.0] * len(x)
    for row, a in zip(matrix, x, strict=True):
        if a:
            result = [r + a * v for r, v in zip(result, row, strict=True)]
    return result


class Costs:
    """What the latency model knows, as plain numbers; see there for the meaning of each."""

    __slots__ = ("bound", "noise", "p", "prices", "prior", "theta")

    def __init__(
        self,
        prior: list[float],
        theta: list[float],
        p: list[list[float]],
        noise: float,
        bound: float,
    ) -> None:
        self.prior, self.theta, self.p = prior, theta, p
        self.noise, self.bound = noise, bound
        # Seconds that one more unit of each feature adds at most; see LatencyModel.prices.
        sure = 1.0 + bound * noise
        self.prices = [
            cost * (sure * ratio + bound * row[i] ** 0.5)
            for i, (cost, ratio, row) in enumerate(zip(prior, theta, p, strict=True))
        ]


class StepEstimate:
    """Expected seconds of a step, and their upper bound."""

    __slots__ = ("_costs", "_spread", "_work", "mean", "upper")

    def __init__(self, costs: Costs, work: Work) -> None:
        self._costs = costs
        self.mean = 0.0
        self._spread = 0.0  # x P x, x being the amounts relative to their prior costs
        self._work: list[tuple[int, float]] = []  # features, and x
        self.upper = 0.0
        self.add(work)

    def add(self, work: Work) -> None:
        self.mean, self._spread, self.upper, self._work = self._with(work)

    def upper_with(self, work: Work) -> float:
        """The bound with that as well, which is not added."""
        return self._with(work)[2]

    def _with(self, work: Work) -> tuple[float, float, float, list[tuple[int, float]]]:
        costs, mean, spread = self._costs, self.mean, self._spread
        done = self._work.copy()
        for i, amount in work:
            x, row = amount * costs.prior[i], costs.p[i]
            half = 0.5 * x * row[i]
            for j, y in done:
                half += y * row[j]
            mean += costs.theta[i] * x
            spread += 2.0 * x * half
            done.append((i, x))
        variance = max(0.0, spread) + (costs.noise * mean) ** 2 + JITTER_S**2
        return mean, spread, mean + costs.bound * variance**0.5, done
