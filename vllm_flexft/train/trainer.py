"""The training loop, as the worker runs it: one call a step, doing what the plan says.

    begin micro-batches -> (vLLM's forward fills their lanes) -> backward slices
    -> optimizer update -> snapshot for the writer

Start reading here. `docs/architecture.md` follows one sequence through it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Literal

from torch import Tensor

from vllm_flexft.graph.grid import BackwardGrid
from vllm_flexft.graph.job_memory import JobMemory, Lanes
from vllm_flexft.graph.memory import MemoryPlan
from vllm_flexft.plan import (
    MicroBatch,
    OpenJob,
    OptimizerStep,
    SaveRequest,
    StepPlan,
    StepResult,
    Written,
)
from vllm_flexft.publish.adapter_files import read_adapter
from vllm_flexft.publish.checkpoint import TrainState, read_checkpoint
from vllm_flexft.publish.writer import CheckpointWriter, WriteRequest, WriteResult
from vllm_flexft.train.activations import ActivationStore
from vllm_flexft.train.adapter import Target, TrainableAdapter, targets_of
from vllm_flexft.train.backward import MicroBatchBackward
from vllm_flexft.train.layer import LayerBackward
from vllm_flexft.train.model import LoraSlot, ServedModel
from vllm_flexft.train.optimizer import AdapterOptimizer
from vllm_flexft.train.results import Results
from vllm_flexft.train.stream import BackwardStream, OneStream, lane_of, slot_of
from vllm_flexft.train.working import WorkingBuffers

logger = logging.getLogger("vllm.flexft")


class Trainer:
    """One job in training on this rank.

    What it queues on its stream it never waits for, but at a `SaveRequest`: losses and norms are
    reported when they have come, on a GPU with a later step.

    After an error the trainer does nothing but report it, so that plans which were already under
    way cannot touch the adapter.
    """

    def __init__(
        self,
        setup: OpenJob,
        model: ServedModel,
        make_slots: Callable[[list[Target]], list[LoraSlot]],
        memory_bytes: float,
        stream: BackwardStream | None = None,
    ) -> None:
        """`memory_bytes`: for activations, gradients and optimizer; raises ValueError with the
        number that would do where it is too little."""
        self.setup, self.model = setup, model
        self._stream = stream or BackwardStream(OneStream())
        peft = setup.job.peft
        targets = targets_of(model, peft)
        self.adapter = TrainableAdapter(targets, make_slots(targets), peft, model.device)
        self.optimizer = AdapterOptimizer(self.adapter, setup.job.training)
        self._restore()
        self.adapter.push()
        lanes = Lanes(setup.num_lanes, setup.lane_tokens)
        self.memory = self._plan_memory(lanes, memory_bytes)
        self.store = ActivationStore(
            self.memory,
            lanes,
            model.dtype,
            model.device,
            offload=setup.activation_policy == "offload",
        )
        self.working = WorkingBuffers(
            model.shape,
            lanes,
            setup.windows,
            model.dtype,
            model.device,
            gathers_kv=any(layer.attention.kv_pages is None for layer in model.layers),
        )
        self._layers = {
            index: LayerBackward.of(model.layers[index], self.adapter, needs)
            for index, needs in self.memory.needs.items()
        }
        self._micro_batches: dict[int, MicroBatchBackward] = {}
        self._writer = CheckpointWriter()
        self._results = Results(setup.job_id, self._stream)
        self._loss_sum: Tensor | None = None  # of the optimizer step under way, on the device
        self.error: str | None = None

    def _plan_memory(self, lanes: Lanes, memory_bytes: float) -> MemoryPlan:
        """What the layers keep, with what is left of the budget after the rest is counted."""
        setup, model = self.setup, self.model
        memory = JobMemory.of(
            model.shape,
            setup.job,
            model.dtype.itemsize,
            setup.activation_policy,
            setup.windows,
        )
        return memory.plan(lanes, memory_bytes)

    def _restore(self) -> None:
        """Checkpoint, else the adapter to start from, else a fresh initialisation."""
        job = self.setup.job
        if self.setup.resume_from is not None:
            # The scheduler's side has verified it. This runs in a step: it must not hash it again.
            state = read_checkpoint(Path(self.setup.resume_from), verify=False)
            self.adapter.load(state.adapter)
            self.optimizer.load(state.optimizer, state.step)
        elif job.peft.init_adapter is not None:
            try:
                self.adapter.load(read_adapter(Path(job.peft.init_adapter))[0])
            except ValueError as error:
                raise ValueError(f"peft.init_adapter {job.peft.init_adapter}: {error}") from None
        else:
            self.adapter.initialise(job.training.seed)

    def begin(self, batches: tuple[MicroBatch, ...]) -> None:
        """Before the forward: the micro-batches whose chunks are about to ride along.

        Never raises: see `error`.
        """
        try:
            for batch in batches:
                self._begin(batch)
        except Exception as error:
            self.fail(error)

    def _begin(self, batch: MicroBatch) -> None:
        top = len(self.model.layers)
        grid = BackwardGrid(
            num_tokens=batch.num_tokens,
            windows=self.setup.windows,
            num_layers=top,
            lowest_layer=self.adapter.lowest_layer if batch.train else top,
        )
        with self._stream.prepare():
            self._micro_batches[batch.id] = MicroBatchBackward(
                batch, grid, self.model, self._layers, self.store, self.working
            )

    def step(self, plan: StepPlan) -> list[StepResult]:
        """After the forward: backward slices, update, snapshot. Never raises: see `error`."""
        if self.error is None:
            try:
                if plan.backward or plan.optimizer_step is not None:
                    with self._stream.work() as shared:
                        self._backward(plan, shared)
                        if plan.optimizer_step is not None:
                            shared.add(slot_of(self.setup.job_id))
                            self._update(plan.optimizer_step)
                if plan.save is not None:
                    self._save(plan.save)
                written = self._written(plan.wait_for_writer)
                return self._results.report(opened=plan.open_job is not None, written=written)
            except Exception as error:  # the engine must outlive any finetuning failure
                self.fail(error)
        return [self._failed()]

    @property
    def awaiting(self) -> bool:
        """Whether results of earlier steps are still to come."""
        return self._results.awaiting and self.error is None

    def poll(self, *, wait: bool) -> list[StepResult]:
        """In a step without a plan: what has come, or all. Never raises: see `error`."""
        try:
            self._results.settle(wait=wait)
            return self._results.report(opened=False, written=())
        except Exception as error:
            self.fail(error)
        return [self._failed()]

    def _failed(self) -> StepResult:
        """With what was written before the failure: it is sound, and worth serving."""
        sound = [result for result in self._writer.poll() if result.error is None]
        written = tuple(map(_written, sound))
        return StepResult(self.setup.job_id, error=self.error, written=written)

    def fail(self, error: Exception) -> None:
        """Stop training for good; the first error is the one that is reported."""
        if self.error is not None:
            return
        if isinstance(error, FloatingPointError):
            self.error = f"training diverged: {error}; lower training.learning_rate"
            return
        logger.error("[%s] training failed", self.setup.job.name, exc_info=error)
        self.error = f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """What is being written is finished by the writer's thread; requests do not wait for it."""
        self._stream.drain()
        self._writer.close(timeout=0.0)

    def _backward(self, plan: StepPlan, shared: set[Hashable]) -> None:
        """Run the plan's slices; what they read goes into `shared`."""
        for work in plan.backward:
            micro_batch = self._micro_batches[work.micro_batch]
            batch = micro_batch.batch
            if work.block_ids is not None:
                micro_batch.locate_kv(work.block_ids)
            shared.add(lane_of(self.setup.job_id, batch.lane))
            shared |= micro_batch.kv_blocks
            micro_batch.run(work.count)
            if micro_batch.done:
                del self._micro_batches[work.micro_batch]
                loss, before = micro_batch.loss_sum, self._loss_sum
                self._results.expect(batch, loss, micro_batch.num_correct)
                if batch.train:
                    self._loss_sum = loss if before is None else before + loss

    def _update(self, step: OptimizerStep) -> None:
        assert self._loss_sum is not None, "an update without a micro-batch"
        norm = self.optimizer.update(step.learning_rate, self._loss_sum)
        self._loss_sum = None
        self._results.expect(step, norm)

    def _save(self, request: SaveRequest) -> None:
        """Hand the state to the writer, which copies it; its thread writes while training goes on.

        Raises FloatingPointError where an update overflowed: that must not be published.
        """
        self._results.settle(wait=True)  # of the last update too: the masters are at rest
        if not bool(self.adapter.master.isfinite().all()):
            raise FloatingPointError(f"adapter weights after step {request.step} are not finite")
        state = TrainState(
            step=request.step,
            adapter=self.adapter.state(),
            optimizer=self.optimizer.state(),
            counters=request.counters,
            log_history=[*self._results.log_history, *request.evaluations],
        )
        job = self.setup.job
        kinds: list[Literal["checkpoint", "final"]] = ["checkpoint"]
        if request.final:
            kinds.append("final")
        self._writer.submit(
            *(
                WriteRequest(
                    kind=kind,
                    output_dir=Path(self.setup.output_dir),
                    state=state,
                    peft=job.peft,
                    base_model=self.setup.base_model,
                    config_hash=self.setup.config_hash,
                )
                for kind in kinds
            )
        )

    def _written(self, wait: bool) -> tuple[Written, ...]:
        """What the writer finished since the last step; a final adapter that cannot be written
        is an error of the job, a checkpoint only a warning."""
        if wait:
            self._writer.drain(timeout=0.005)
        written = []
        for result in self._writer.poll():
            if result.error is not None and result.kind == "final":
                raise OSError(f"the final adapter could not be written: {result.error}")
            written.append(_written(result))
        return tuple(written)


def _written(result: WriteResult) -> Written:
    return Written(
        step=result.step,
        path=str(result.path) if result.path is not None else None,
        final=result.kind == "final",
        warning=str(result.error) if result.error is not None else None,
    )
