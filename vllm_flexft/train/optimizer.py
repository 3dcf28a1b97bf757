"""One optimizer step over the flat fp32 masters: clip, update, push to the slot."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_flexft.config import TrainingConfig
from vllm_flexft.train.adapter import TrainableAdapter


class AdapterOptimizer:
    """torch.optim over one flat parameter; moments and masters are fp32."""

    def __init__(self, adapter: TrainableAdapter, config: TrainingConfig) -> None:
        self.adapter, self.config = adapter, config
        parameter = torch.nn.Parameter(adapter.master, requires_grad=False)
        parameter.grad = adapter.grad
        self._optimizer: torch.optim.Optimizer
        if config.optim == "adamw_torch":
            self._optimizer = torch.optim.AdamW(
                [parameter],
                lr=0.0,
                betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
                fused=True,
            )
        else:
            self._optimizer = torch.optim.SGD(
                [parameter], lr=0.0, weight_decay=config.weight_decay, fused=True
            )
        self._parameter = parameter

    def update(self, learning_rate: float, loss: Tensor) -> Tensor:
        """Apply the accumulated gradients and clear them; returns their norm before clipping, 0-d.

        Masters and moments stay untouched where the norm or `loss`, 0-d, is not finite. That is
        decided on the device: nobody waits for it.
        """
        self.adapter.finish_gradients()
        grad = self.adapter.grad
        norm = torch.linalg.vector_norm(grad)
        # torch's fused optimizers read it, as torch.amp.GradScaler sets it.
        self._optimizer.found_inf = (norm + loss).isfinite().logical_not().float()
        if self.config.max_grad_norm > 0:
            # torch.nn.utils.clip_grad_norm_'s formula
            grad.mul_((self.config.max_grad_norm / (norm.double() + 1e-6)).clamp_(max=1.0))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        grad.zero_()
        self.adapter.push()
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Moments under PEFT's parameter names, as views; empty for plain SGD."""
        state = self._optimizer.state.get(self._parameter, {})
        return {
            moment: self.adapter.named_like_state(state[moment])
            for moment in ("exp_avg", "exp_avg_sq")
            if moment in state
        }

    def load(self, moments: Mapping[str, Mapping[str, Tensor]], steps_done: int) -> None:
        if not moments:
            return
        state = self._optimizer.state[self._parameter]
        state["step"] = torch.tensor(float(steps_done), device=self.adapter.master.device)
        for moment, named in moments.items():
            state[moment] = torch.zeros_like(self.adapter.master)
            self.adapter.flat_from_named(named, state[moment])
