"""The trainable adapter: fp32 masters and gradients, mirrored into a private serving slot.

All A matrices, then all B matrices, lie in one flat fp32 vector, so that clipping and the
optimizer are one operation each. The slot that the forward pass reads holds A and scaling * B in
the model's dtype; gradients are taken with respect to the slot's values and turned into master
gradients once an optimizer step (`finish_gradients`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexft_kernels.lora import Lora
from vllm_flexft.config import PeftConfig
from vllm_flexft.graph.families import TARGETS, target_layers, target_names
from vllm_flexft.train.model import LoraSlot, ServedModel


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """One adapted linear: masters, gradients and slot. Legend: R rank, I inputs, O outputs."""

    name: str  # PEFT's, without the prefix: "model.layers.0.self_attn.q_proj"
    part: slice  # its columns in the packed output
    a: Tensor  # (R, I) fp32
    b: Tensor  # (O, R) fp32
    grad_a: Tensor  # (R, I) fp32
    grad_b: Tensor  # (O, R) fp32, with respect to scaling * B until finish_gradients()
    slot: LoraSlot

    @property
    def bypass(self) -> Lora:
        """As the backward sees it; the slot's B carries the scaling."""
        return Lora(self.slot.a, self.slot.b, self.grad_a, self.grad_b)


def lora_scaling(peft: PeftConfig) -> float:
    """PEFT: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
    return peft.lora_alpha / (math.sqrt(peft.r) if peft.use_rslora else peft.r)


@dataclass(frozen=True, slots=True)
class Target:
    """Where an adapter of a job hangs: layer, packed linear, part of it."""

    layer: int
    peft_name: str
    packed: str
    part_index: int
    in_features: int
    out_features: int
    columns: slice


def targets_of(model: ServedModel, peft: PeftConfig) -> list[Target]:
    targets = []
    for index in target_layers(peft.layers_to_transform, len(model.layers)):
        for name in target_names(peft.target_modules):
            packed, part, parent = TARGETS[name]
            linear = model.layers[index].linear(packed)
            start = sum(linear.splits[:part])
            targets.append(
                Target(
                    layer=index,
                    peft_name=f"model.layers.{index}.{parent}.{name}",
                    packed=packed,
                    part_index=part,
                    in_features=linear.in_features,
                    out_features=linear.splits[part],
                    columns=slice(start, start + linear.splits[part]),
                )
            )
    return targets


class TrainableAdapter:
    def __init__(
        self,
        targets: list[Target],
        slots: list[LoraSlot],
        peft: PeftConfig,
        device: torch.device,
    ) -> None:
        self.scaling = lora_scaling(peft)
        rank = peft.r
        num_a = sum(rank * t.in_features for t in targets)
        num_b = sum(rank * t.out_features for t in targets)
        self.master = torch.zeros(num_a + num_b, dtype=torch.float32, device=device)
        self.grad = torch.zeros_like(self.master)
        self._grad_b = self.grad[num_a:]
        # layer -> packed linear -> its adapted parts
        self.linears: dict[int, dict[str, list[LoraLinear]]] = {}
        at_a, at_b = 0, num_a
        for target, slot in zip(targets, slots, strict=True):
            shape_a, shape_b = (rank, target.in_features), (target.out_features, rank)
            end_a, end_b = at_a + math.prod(shape_a), at_b + math.prod(shape_b)
            linear = LoraLinear(
                name=target.peft_name,
                part=target.columns,
                a=self.master[at_a:end_a].view(shape_a),
                b=self.master[at_b:end_b].view(shape_b),
                grad_a=self.grad[at_a:end_a].view(shape_a),
                grad_b=self.grad[at_b:end_b].view(shape_b),
                slot=slot,
            )
            self.linears.setdefault(target.layer, {}).setdefault(target.packed, []).append(linear)
            at_a, at_b = end_a, end_b

    @property
    def lowest_layer(self) -> int:
        return min(self.linears)

    def all_linears(self) -> list[LoraLinear]:
        return [ll for packed in self.linears.values() for parts in packed.values() for ll in parts]

    def initialise(self, seed: int) -> None:
        """A ~ kaiming-uniform(a=sqrt(5)), B = 0, as PEFT does; drawn on CPU from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        for linear in self.all_linears():
            bound = 1 / math.sqrt(linear.a.shape[1])
            draw = torch.empty(linear.a.shape).uniform_(-bound, bound, generator=generator)
            linear.a.copy_(draw)
            linear.b.zero_()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take masters from PEFT-named tensors; raises ValueError where they do not fit."""
        expected = dict(self._peft_items())
        if missing := sorted(expected.keys() - tensors.keys()):
            raise ValueError(f"adapter lacks {len(missing)} tensors of this job, e.g. {missing[0]}")
        if extra := sorted(tensors.keys() - expected.keys()):
            raise ValueError(
                f"adapter has {len(extra)} tensors that this job does not train, e.g. {extra[0]}; "
                "set peft.target_modules and peft.layers_to_transform as in its adapter_config.json"
            )
        for key, view in expected.items():
            if tensors[key].shape != view.shape:
                raise ValueError(
                    f"adapter tensor {key} has shape {tuple(tensors[key].shape)}, "
                    f"this job needs {tuple(view.shape)}: it is of another rank or base model"
                )
            view.copy_(tensors[key])

    def state(self) -> dict[str, Tensor]:
        """The masters under PEFT's names; views, which the next update changes."""
        return dict(self._peft_items())

    def named_like_state(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector laid out like `master` (moments), under PEFT's names."""
        return {
            key: flat[view.storage_offset() : view.storage_offset() + view.numel()].view(view.shape)
            for key, view in self._peft_items()
        }

    def flat_from_named(self, named: Mapping[str, Tensor], out: Tensor) -> None:
        for key, view in self._peft_items():
            out[view.storage_offset() : view.storage_offset() + view.numel()].copy_(
                named[key].reshape(-1)
            )

    def push(self) -> None:
        """Masters -> the slot that the next forward pass reads."""
        for linear in self.all_linears():
            linear.slot.a.copy_(linear.a)
            linear.slot.b.copy_(linear.b * self.scaling)

    def finish_gradients(self) -> None:
        """d(scaling * B) -> dB."""
        self._grad_b.mul_(self.scaling)

    def _peft_items(self) -> Iterator[tuple[str, Tensor]]:
        for linear in self.all_linears():
            yield f"base_model.model.{linear.name}.lora_A.weight", linear.a
            yield f"base_model.model.{linear.name}.lora_B.weight", linear.b
