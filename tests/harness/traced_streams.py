"""Two streams that run nothing later, but know what could: a race detector for an engine on CPU.

Each stream has a vector clock (Mattern 1989); a wait joins that of the other into it. An access to
something shared races with an earlier one of the other stream, one of them writing, that its clock
does not know of: a GPU could have run them in either order, or at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FORWARD, BACKWARD = "forward", "backward"
Clock = dict[str, int]


class TracedMark:
    def __init__(self, streams: TracedStreams) -> None:
        self._streams, self._forwards = streams, streams.forwards
        self.clock = dict(streams.clocks[BACKWARD])

    def query(self) -> bool:
        """Slices are as late as they may ever be: three steps, if nothing waits."""
        if self._streams.forwards < self._forwards + 3:
            return False
        self._streams.join(FORWARD, self.clock)  # the host knows: all that it queues is later
        return True

    def synchronize(self) -> None:
        self._streams.join(FORWARD, self.clock)


class TracedStreams:
    """`vllm_flexft.train.stream.Streams`."""

    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = {
            FORWARD: {FORWARD: 0, BACKWARD: 0},
            BACKWARD: {FORWARD: 0, BACKWARD: 0},
        }
        self.races: set[tuple[str, Hashable]] = set()  # kind of what is shared, and which
        self.forwards = 0
        self.most_late = 0  # steps that slices were behind, at any forward
        self.deferred = 0  # numbers that were not there when first asked for
        self._stream = FORWARD
        self._seen: dict[tuple[str, Hashable], dict[tuple[str, bool], int]] = defaultdict(dict)
        self._ends: dict[int, int] = {}  # step -> backward's clock after it

    def join(self, stream: str, clock: Clock) -> None:
        mine = self.clocks[stream]
        for other, time in clock.items():
            mine[other] = max(mine[other], time)

    @contextmanager
    def backward(self) -> Iterator[None]:
        self._stream = BACKWARD
        try:
            yield
        finally:
            self._stream = FORWARD

    def backward_waits(self) -> None:
        self.join(BACKWARD, self.clocks[FORWARD])

    def mark(self) -> TracedMark:
        self._ends[self.forwards] = self.clocks[BACKWARD][BACKWARD]
        return TracedMark(self)

    def forward_waits(self, mark: Any) -> None:
        self.join(FORWARD, mark.clock)

    def access(self, kind: str, which: Hashable, *, write: bool) -> None:
        me, clock = self._stream, self.clocks[self._stream]
        clock[me] += 1
        seen = self._seen[kind, which]
        for (stream, wrote), time in seen.items():
            if stream != me and (write or wrote) and clock[stream] < time:
                self.races.add((kind, which))
        seen[me, write] = clock[me]

    def forward(self) -> None:
        self.forwards += 1
        known = self.clocks[FORWARD][BACKWARD]
        behind = [step for step, end in self._ends.items() if end > known]
        if behind:
            self.most_late = max(self.most_late, self.forwards - min(behind))

    @property
    def raced(self) -> set[str]:
        return {kind for kind, _ in self.races}


@contextmanager
def traced(runner: Any) -> Iterator[TracedStreams]:
    """Everything that the forward and the backward of a worker share is watched meanwhile."""
    from vllm.forward_context import get_forward_context

    from vllm_flexft.runner.hook import CoServeRunnerMixin
    from vllm_flexft.train.activations import ActivationStore
    from vllm_flexft.train.adapter import TrainableAdapter
    from vllm_flexft.train.backward import MicroBatchBackward
    from vllm_flexft.train.optimizer import AdapterOptimizer
    from vllm_flexft.train.stream import BackwardStream

    streams = TracedStreams()
    with pytest.MonkeyPatch.context() as patch:

        def watch(cls: Any, name: str, see: Any) -> None:
            original = getattr(cls, name)

            def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
                see(self, *args)
                return original(self, *args, **kwargs)

            patch.setattr(cls, name, watched)

        def forward(runner: Any, *_: Any) -> None:
            streams.forward()
            for plan in runner._plans:
                if plan.chunks:
                    streams.access("slot", "", write=False)
            slots = next(iter(get_forward_context().slot_mapping.values()))
            block_size = runner.cache_config.block_size
            for block in set((slots[slots >= 0] // block_size).tolist()):
                streams.access("block", block, write=True)

        def run_slice(batch: Any, part: Any) -> None:
            if part.stage < len(batch.model.layers):
                for table in batch._block_tables:
                    for block in set(table.flatten().tolist()) & batch.kv_blocks:
                        streams.access("block", block, write=False)

        watch(CoServeRunnerMixin, "_model_forward", forward)
        watch(MicroBatchBackward, "_run_slice", run_slice)
        lane = streams.access
        watch(ActivationStore, "write", lambda _, rows, *a: lane("lane", rows.lane, write=True))
        for read in ("window", "pick"):
            watch(ActivationStore, read, lambda _, at, *a: lane("lane", at, write=False))
        watch(TrainableAdapter, "push", lambda _: streams.access("slot", "", write=True))
        watch(AdapterOptimizer, "update", lambda *_: streams.access("master", "", write=True))
        watch(TrainableAdapter, "state", lambda _: streams.access("master", "", write=False))
        patch.setattr(runner, "_stream", BackwardStream(streams))
        yield streams
