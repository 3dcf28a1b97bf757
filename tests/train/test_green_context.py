"""The backward's share of the multiprocessors, as far as it can be seen without a GPU."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch.cuda import green_contexts

from vllm_flexft.train.stream import TwoStreams

DEVICE = torch.device("cuda", 0)


class Green:
    """Stands in for torch's `GreenContext`, which needs a GPU."""

    made: list[tuple[int, int]] = []

    @classmethod
    def create(cls, *, num_sms, device_id):
        cls.made.append((num_sms, device_id))
        return cls()

    def Stream(self):
        return "stream of the green context"


@pytest.fixture
def streams(monkeypatch):
    """num_sms -> TwoStreams, on a torch whose plain streams are words."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: f"stream of {priority}")
    return lambda num_sms: TwoStreams(DEVICE, num_sms)


def test_torchs_green_context_is_called_as_it_is_defined():
    accepted = inspect.signature(green_contexts.GreenContext.create).parameters
    assert {"num_sms", "device_id"} <= accepted.keys()
    assert callable(green_contexts.GreenContext.Stream)


def test_a_share_is_a_stream_of_a_green_context_with_so_many_multiprocessors(streams, monkeypatch):
    monkeypatch.setattr(green_contexts, "GreenContext", Green)
    assert streams(16)._backward == "stream of the green context"
    assert Green.made == [(16, 0)]


def test_without_a_share_the_stream_is_a_plain_one(streams, monkeypatch):
    monkeypatch.setattr(green_contexts, "GreenContext", None)
    assert streams(None)._backward == "stream of 0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this device may have green contexts")
def test_where_there_are_no_green_contexts_the_log_says_so_and_all_goes_on(streams, caplog):
    with caplog.at_level(logging.WARNING, "vllm.flexft"):
        logging.getLogger("vllm").propagate = True
        assert streams(16)._backward == "stream of 0"
    assert "backward_sms has no effect" in caplog.text
