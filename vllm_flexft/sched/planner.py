"""How much finetune work fits this step: slack under the latency objective.

Two numbers are learnt online, as exponential moving averages: the time of a step without finetune
work, by the number of inference tokens in it, and the seconds that one unit of finetune work adds
(see costs.py), where a step counts by its units, since a little work is hardly seen in a step's
time. The budget of a step with inference in it is what is left of the TPOT objective;
without any, a step is bounded by the part of the TTFT objective that a new arrival may wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DEFAULT_TPOT_MS = 50.0
DEFAULT_TTFT_MS = 5000.0
TPOT_MARGIN = 0.8  # plan for this part of the objective; the rest absorbs prediction error
TTFT_SHARE = 0.1  # a new arrival waits at most this part of its objective for a running step
SMOOTHING = 0.2
MIN_UNIT_S = 1e-9  # keeps a budget finite, whatever was measured
PROBE_UNITS = 16.0  # of a loaded step before a unit's cost is known: small, to learn it


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What vLLM scheduled for inference in this step."""

    num_tokens: int
    num_running: int
    num_waiting: int


@dataclass(slots=True)
class Planner:
    tpot_s: float
    ttft_s: float
    unit_s: float | None = None  # seconds a unit of finetune work
    token_s: float | None = None  # seconds of an inference-only step, per token of it
    base_s: float = 0.0
    _idle_units: float = field(default=256.0, init=False)
    _work_s: float = field(default=0.0, init=False)  # decaying sums behind unit_s
    _work_units: float = field(default=0.0, init=False)

    @classmethod
    def for_objectives(cls, tpot_ms: float | None, ttft_ms: float | None) -> Planner:
        return cls(
            tpot_s=(tpot_ms or DEFAULT_TPOT_MS) / 1e3, ttft_s=(ttft_ms or DEFAULT_TTFT_MS) / 1e3
        )

    def set_objectives(self, tpot_ms: float, ttft_ms: float) -> None:
        self.tpot_s, self.ttft_s = tpot_ms / 1e3, ttft_ms / 1e3

    def budget(self, load: StepLoad) -> float:
        """Units of finetune work for this step; infinite never, zero when inference needs all."""
        if load.num_tokens == 0:
            if load.num_waiting:
                return 0.0  # waiting and nothing scheduled: memory is short
            if self.unit_s is None:
                return self._idle_units
            return max(1.0, TTFT_SHARE * self.ttft_s / self.unit_s)
        slack = TPOT_MARGIN * self.tpot_s - self.predict(load)
        if load.num_waiting or slack <= 0:
            return 0.0
        return PROBE_UNITS if self.unit_s is None else slack / self.unit_s

    def predict(self, load: StepLoad) -> float:
        """Seconds of this step without finetune work."""
        if load.num_tokens == 0:
            return 0.0
        return (self.token_s or 0.0) * load.num_tokens + self.base_s

    def observe(self, load: StepLoad, units: float, seconds: float) -> None:
        """Learn from a finished step."""
        if units == 0.0:
            if load.num_tokens == 0:
                return
            # A decode step's time hardly depends on its few tokens: keep it as the base.
            if load.num_tokens <= load.num_running:
                self.base_s = _average(self.base_s or None, seconds)
            else:
                extra = max(0.0, seconds - self.base_s) / load.num_tokens
                self.token_s = _average(self.token_s, extra)
            return
        self._work_s = (1 - SMOOTHING) * self._work_s + max(0.0, seconds - self.predict(load))
        self._work_units = (1 - SMOOTHING) * self._work_units + units
        self.unit_s = max(MIN_UNIT_S, self._work_s / self._work_units)


def _average(old: float | None, new: float) -> float:
    return new if old is None else (1 - SMOOTHING) * old + SMOOTHING * new
