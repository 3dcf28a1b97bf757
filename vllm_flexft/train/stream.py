"""The stream that the backward is queued on, and what has to wait for what.

On a GPU slices run beside the forwards of later steps. Two rules of waiting keep both right:

    a step's slices   wait for the forward of that step, and so for all before it
    a forward         waits for the slices of the step before if it writes what they read (a lane
                      of activations, KV blocks) or reads what they write (the adapter's slot);
                      in any case for those of the step before that one

By the second, slices are never more than one step late: a backlog that grew would one day be
waited for at once, and the planner would learn what slices cost too late. By the first, no forward
that reads a slot is still running when the update writes it, so one slot is enough.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger("vllm.flexft")


class Mark(Protocol):
    """A place in the order of a stream's work, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether all before it is done."""

    def synchronize(self) -> None: ...


class Streams(Protocol):
    """The stream of forwards, whichever is current, and that of the backward beside it."""

    def backward(self) -> AbstractContextManager[object]:
        """What is queued inside goes to the backward's stream."""

    def backward_waits(self) -> None:
        """For all that forwards have queued so far."""

    def mark(self) -> Mark | None:
        """Of the backward's stream so far; None: it is one with that of forwards."""

    def forward_waits(self, mark: Mark) -> None: ...


class OneStream:
    """CPU, and the serialised mode of a GPU: everything runs in the order of the calls."""

    def backward(self) -> AbstractContextManager[object]:
        return nullcontext()

    def backward_waits(self) -> None:
        pass

    def mark(self) -> Mark | None:
        return None

    def forward_waits(self, mark: Mark) -> None:
        raise AssertionError("nothing was marked")


class TwoStreams:
    """A stream of the least priority beside the current one.

    Args:
        num_sms: multiprocessors that it may use; None for all. Forwards may use these too.
    """

    def __init__(self, device: torch.device, num_sms: int | None = None) -> None:
        self._green = None if num_sms is None else _green_context(device, num_sms)
        if self._green is not None:
            self._backward = self._green.Stream()
        else:
            self._backward = torch.cuda.Stream(device, priority=0)

    def backward(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._backward)

    def backward_waits(self) -> None:
        self._backward.wait_stream(torch.cuda.current_stream())

    def mark(self) -> Mark | None:
        return self._backward.record_event()

    def forward_waits(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream().wait_event(mark)


def _green_context(device: torch.device, num_sms: int) -> Any:
    """None, with a word in the log, where torch, the driver or the device has none such."""
    try:
        from torch.cuda.green_contexts import GreenContext

        index = torch.cuda.current_device() if device.index is None else device.index
        return GreenContext.create(num_sms=num_sms, device_id=index)
    except (ImportError, RuntimeError) as error:
        logger.warning("backward_sms has no effect, the backward may use all: %s", error)
        return None


def streams_for(device: torch.device, *, serial: bool, num_sms: int | None = None) -> Streams:
    """`num_sms`: of the backward's stream, where it has one."""
    return TwoStreams(device, num_sms) if device.type == "cuda" and not serial else OneStream()


def prefer_forwards(device: torch.device) -> None:
    """Put this thread's work on a stream of higher priority: none is below the default's."""
    stream = torch.cuda.Stream(device, priority=-1)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)


class Readback:
    """Numbers on their way to the host."""

    def __init__(self, host: Sequence[Tensor], mark: Mark | None) -> None:
        self._host, self._mark = host, mark

    @property
    def ready(self) -> bool:
        return self._mark is None or self._mark.query()

    def values(self) -> list[float]:
        """Waits for them."""
        if self._mark is not None:
            self._mark.synchronize()
        return [number.item() for number in self._host]


@dataclass(slots=True)
class _Work:
    """Of one step: what it reads and writes that forwards touch too, and its end."""

    shared: set[Hashable]
    end: Mark


class BackwardStream:
    """One for all jobs of a worker."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._last: _Work | None = None  # of the step under way, then of the one before
        self._late: Mark | None = None  # the end of the step before that one

    @property
    def busy(self) -> bool:
        """Whether a forward may have to wait."""
        return self._last is not None or self._late is not None

    def before_forward(self, touched: Iterable[Hashable]) -> None:
        """Of every step, while `busy`. `touched`: KV blocks that the forward may write, lanes that
        it writes and slots that it reads, as named by `lane_of` and `slot_of`; blocks by number.
        """
        last, late = self._last, self._late
        self._last = self._late = None
        if last is not None and not last.end.query():
            if last.shared.isdisjoint(touched):
                self._late = last.end
            else:
                self._streams.forward_waits(last.end)
                return  # all before it is done with it
        if late is not None and not late.query():
            self._streams.forward_waits(late)

    @contextmanager
    def prepare(self) -> Iterator[None]:
        """Tensors made inside belong to the backward; nothing of a forward is read."""
        with self._streams.backward():
            yield

    @contextmanager
    def work(self) -> Iterator[set[Hashable]]:
        """Slices and updates, after the forward of their step was queued. Whoever queues them adds
        to the set the KV blocks and lanes that they read, and the slots that they write."""
        shared: set[Hashable] = set()
        self._streams.backward_waits()
        try:
            with self._streams.backward():
                yield shared
        finally:
            if (end := self._streams.mark()) is not None:
                if self._last is not None:  # of another job in this step
                    shared |= self._last.shared
                self._last = _Work(shared, end)

    def read(self, numbers: Sequence[Tensor]) -> Readback:
        """0-d tensors, to the host; called within `work`."""
        host = [
            torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
            if x.is_cuda
            else x
            for x in numbers
        ]
        return Readback(host, self._streams.mark())

    def drain(self) -> None:
        """Later work of the forwards' stream waits for everything: memory may be given back."""
        if (end := self._streams.mark()) is not None:
            self._streams.forward_waits(end)
        self._last = self._late = None


def lane_of(job_id: str, lane: int) -> Hashable:
    return "lane", job_id, lane


def slot_of(job_id: str) -> Hashable:
    return "slot", job_id
