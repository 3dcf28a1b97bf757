"""Finetuning's memory on a GPU comes out of what the engine may use, not on top of it."""

import contextlib
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.worker import gpu_worker

from vllm_flexft import wiring
from vllm_flexft.config import ServerOptions
from vllm_flexft.runner.worker import CoServeGPUWorker

GIB = 2**30
MAY_USE, WEIGHTS = 100 * GIB, 30 * GIB


@pytest.fixture
def kv_cache_bytes(monkeypatch):
    """What the installed vLLM's worker gives its KV cache, by the server options."""

    def init_device(worker):
        worker.requested_memory = MAY_USE
        worker.model_runner = type("Runner", (), {})()
        worker.model_runner.model_memory_usage = WEIGHTS
        worker.model_runner.profile_run = lambda randomize_inputs: None

    @contextlib.contextmanager
    def profiling(snapshot, weights_memory):
        yield SimpleNamespace(
            after_profile=SimpleNamespace(free_memory=0, total_memory=1),
            total_consumed=weights_memory,
            transient_peak_headroom=0,
            non_kv_cache_memory=weights_memory,
        )

    monkeypatch.setattr(gpu_worker.Worker, "init_device", init_device)
    monkeypatch.setattr(gpu_worker, "memory_profiling", profiling)
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(gpu_worker.logger, "info_once", lambda *_: None)

    def measured(**options):
        worker = object.__new__(CoServeGPUWorker)
        carried = wiring.normalise(
            {"co_finetune": [], "co_finetune_config": options}, max_rank=None, reserved_names=()
        )
        jobs = ServerOptions.from_mapping(options).max_jobs_at_once
        worker.vllm_config = SimpleNamespace(
            additional_config=carried,
            lora_config=SimpleNamespace(max_loras=1 + jobs),
            compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
        )
        worker.cache_config = SimpleNamespace(
            kv_cache_memory_bytes=None, gpu_memory_utilization=0.9
        )
        worker.model_config = SimpleNamespace(multimodal_config=None)
        worker.parallel_config = SimpleNamespace()
        worker.init_snapshot = SimpleNamespace(free_memory=MAY_USE, total_memory=MAY_USE)
        worker.observability_config = None
        monkeypatch.setattr(
            CoServeGPUWorker, "randomize_dummy_inputs", property(lambda _: False), raising=False
        )
        worker.init_device()
        return worker.determine_available_memory()

    return measured


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_kv_cache_gets_what_finetuning_leaves(kv_cache_bytes, jobs):
    left = kv_cache_bytes(memory_gib=12, max_jobs_at_once=jobs)
    assert left == MAY_USE - WEIGHTS - 12 * GIB


def test_without_the_option_scheduler_and_worker_count_an_eighth_of_the_gpu(
    kv_cache_bytes, monkeypatch
):
    monkeypatch.setattr(
        type(current_platform), "get_device_total_memory", classmethod(lambda _: 80 * GIB)
    )
    assert kv_cache_bytes(max_jobs_at_once=2) == MAY_USE - WEIGHTS - 10 * GIB
    options = ServerOptions(max_jobs_at_once=2)
    assert wiring.memory_budget(options, "cuda") == 5 * GIB


def test_more_than_the_engine_may_use_is_refused_with_both_options(kv_cache_bytes):
    with pytest.raises(ValueError, match=r"100\.0 GiB.*--gpu-memory-utilization.*memory_gib"):
        kv_cache_bytes(memory_gib=100)
