"""The real scheduler, vLLM's and ours, with a model that takes no time: to measure and to test
planning alone.

The worker is played by bookkeeping: every request gets a token when its prompt is through, and
finetune work is answered as the trainer would answer it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from vllm_flexft.sched.retirement import Retirement

BLOCK = 16
TOKEN = 7  # what the model says
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 16,
    "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 4096, "vocab_size": 32000, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Feed:
    """Plays the thread that brings jobs: they come from `BareEngine.train`."""

    def __init__(self, *_: Any) -> None:
        self.retirement = Retirement()
        self.wake: Callable[[], None] = lambda: None
        self.ready: list[Any] = []
        self.reported: list[Any] = []

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def has_ready(self) -> bool:
        return bool(self.ready)

    def take(self) -> Any:
        return self.ready.pop(0) if self.ready else None

    def report(self, prepared: Any, record: Any) -> None:
        self.reported.append(record)

    def save(self, file: Any, state: Any) -> None: ...

    def is_cancelled(self, job_id: str) -> bool:
        return False


class BareEngine:
    """Steps through `schedule` and `update_from_output`, as vLLM's engine core does.

    Args:
        folder: for the model's configuration.
        blocks: of 16 tokens, in the KV cache.
        model: changes to the configuration `LLAMA`.
        device: what the scheduler thinks it runs on.
        co_serving: False for vLLM's own scheduler.
        options: of the server, vLLM's `--co-finetune-config`.
        engine: further fields of vLLM's EngineArgs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        blocks: int,
        model: Mapping[str, Any] | None = None,
        device: str = "cpu",
        co_serving: bool = True,
        options: dict[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins
        from vllm.utils.hashing import sha256
        from vllm.utils.import_utils import resolve_obj_by_qualname
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from vllm_flexft.sched import scheduler as ours

        load_general_plugins()
        folder.mkdir(parents=True, exist_ok=True)
        shape: dict[str, Any] = {**LLAMA, **(model or {})}
        (folder / "config.json").write_text(json.dumps(shape))
        co_finetune = {
            "co_finetune": [],
            "co_finetune_config": {"state_dir": str(folder / "state"), **(options or {})},
        }
        settings: dict[str, Any] = {
            "max_model_len": 2048,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 2048,
            "dtype": shape["torch_dtype"],
            "additional_config": co_finetune if co_serving else {},
            **engine,
        }
        config = EngineArgs(model=str(folder), **settings).create_engine_config()
        config.model_config.skip_tokenizer_init = True  # there is none
        config.device_config.device_type = device
        config.cache_config.num_gpu_blocks = blocks + 1
        config.cache_config.block_size = BLOCK
        spec = FullAttentionSpec(
            block_size=BLOCK,
            num_kv_heads=shape["num_key_value_heads"],
            head_size=shape["head_dim"],
            dtype=getattr(torch, shape["torch_dtype"]),
        )
        kv = KVCacheConfig(
            num_blocks=blocks + 1,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        cls: Any = config.scheduler_config.scheduler_cls or Scheduler
        if isinstance(cls, str):
            cls = resolve_obj_by_qualname(cls)
        # What an earlier run learnt of step times is of another machine.
        cache = mock.patch.dict(os.environ, VLLM_CACHE_ROOT=str(folder / "cache"))
        with cache, mock.patch.object(ours, "JobFeed", Feed):
            self.scheduler: Any = cls(
                vllm_config=config,
                kv_cache_config=kv,
                structured_output_manager=StructuredOutputManager(config),
                block_size=BLOCK,
                log_stats=True,
            )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.worker = BookkeepingWorker()
        self.num_preemptions = 0
        self._num_requests = 0
        preempt = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> None:
            self.num_preemptions += 1
            preempt(*args, **kwargs)

        self.scheduler._preempt_request = counted

    def ask(self, prompt_tokens: int, max_tokens: int, **fields: Any) -> str:
        """Queue a request; no two prompts are alike, so that none shares blocks."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self._num_requests += 1
        name = f"request-{self._num_requests}"
        prompt = [self._num_requests] + [11 + i % 89 for i in range(prompt_tokens - 1)]
        parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.scheduler.add_request(
            Request(name, prompt, parameters, None, block_hasher=self._hasher, **fields)
        )
        return name

    def step(self, during: Callable[[Any], None] = lambda output: None) -> Any:
        """One step; `during` is called with what was scheduled, before its result is there."""
        output = self.scheduler.schedule()
        self.scheduler.get_grammar_bitmask(output)
        during(output)
        self.scheduler.update_from_output(output, self.execute(output))
        return output

    def execute(self, output: Any) -> Any:
        """vLLM's ModelRunnerOutput of a step."""
        from vllm.v1.outputs import ModelRunnerOutput

        from vllm_flexft.plan import PLAN_ATTRIBUTE, RESULT_ATTRIBUTE

        requests = self.scheduler.requests
        names = list(output.num_scheduled_tokens)
        sampled = [
            [TOKEN]
            if name in requests and requests[name].num_computed_tokens >= requests[name].num_tokens
            else []
            for name in names
        ]
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        if plans := getattr(output, PLAN_ATTRIBUTE, ()):
            setattr(result, RESULT_ATTRIBUTE, tuple(map(self.worker.run, plans)))
        return result

    def train(self, job: Any) -> None:
        """Have a PreparedJob trained, in place of one from the job store."""
        self.scheduler._feed.ready.append(job)

    def close(self) -> None:
        self.scheduler.shutdown()


class BookkeepingWorker:
    """Answers plans as the trainer does; every loss is 2."""

    def __init__(self) -> None:
        self._window = 0
        self._slices: dict[int, tuple[Any, int]] = {}  # evaluations: micro-batch, slices left
        self.updates = self.tokens = 0

    def run(self, plan: Any) -> Any:
        from vllm_flexft.plan import EvaluationLoss, StepResult, Written

        if plan.open_job is not None:
            self._window = plan.open_job.windows.loss
        for batch in plan.begin:
            if not batch.train:
                self._slices[batch.id] = batch, -(-batch.num_tokens // self._window)
        self.tokens += sum(chunk.num_tokens for chunk in plan.chunks)
        evaluated = []
        for work in plan.backward:
            if work.micro_batch not in self._slices:
                continue
            batch, left = self._slices[work.micro_batch]
            self._slices[batch.id] = batch, left - work.count
            if left == work.count:
                del self._slices[batch.id]
                targets = int(np.count_nonzero(batch.supervised))
                evaluated.append(EvaluationLoss(batch.id, 2.0 * targets, targets // 2))
        step, save = plan.optimizer_step, plan.save
        self.updates += step is not None
        return StepResult(
            plan.job_id,
            opened=plan.open_job is not None,
            evaluated=tuple(evaluated),
            updated_step=None if step is None else step.step,
            loss=None if step is None else 2.0,
            grad_norm=None if step is None else 1.0,
            written=(Written(save.step, None, save.final),) if save is not None else (),
        )


def prepared_job(
    lengths: np.ndarray, folder: Path, *, valid: np.ndarray | None = None, **training: Any
) -> Any:
    """A PreparedJob whose sequences have these lengths, supervised from their second token on."""
    from vllm_flexft.config import FinetuneJob
    from vllm_flexft.data.order import BatchOrder
    from vllm_flexft.sched.prepared import PreparedJob

    job = FinetuneJob.from_mapping(
        {
            "name": "job",
            "dataset": {"path": "rows.jsonl"},
            "training": training,
            "output_dir": str(folder),
            **({} if valid is None else {"validation": {"path": "valid.jsonl"}}),
        }
    )
    settings = job.training
    order = BatchOrder(
        len(lengths), settings.train_batch_size, settings.seed, True,
        settings.num_train_epochs, settings.max_steps,
    )  # fmt: skip
    order.rows(0)  # the feed draws the first epoch's order, not a step
    return PreparedJob(
        job_id="job",
        job=job,
        config_hash="",
        output_dir=folder,
        train=_sequences(lengths),
        order=order,
        validation=None if valid is None else _sequences(valid),
        longest=int(max(lengths.max(), 0 if valid is None else valid.max())),
        lowest_layer=0,
    )


def _sequences(lengths: np.ndarray) -> Any:
    from vllm_flexft.data.dataset import DataReport, TrainingData

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens, count = int(offsets[-1]), len(lengths)
    supervised = np.ones(tokens, bool)
    supervised[offsets[:-1]] = False  # nothing predicts a first token
    report = DataReport(
        rows=count, sequences=count, truncated=0, dropped_overlong=0, dropped_no_target=0,
        tokens=tokens, targets=tokens - count, max_length=int(lengths.max()),
    )  # fmt: skip
    # Zeros that nobody writes to take no memory.
    return TrainingData(np.zeros(tokens, np.int32), supervised, offsets, np.arange(count), report)
