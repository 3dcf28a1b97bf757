"""What a run left on disk, read without the package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def check_checkpoints(output_dir: Path) -> list[int]:
    """Every checkpoint folder has all its files, with the sums of its manifest; their steps."""
    steps = []
    for folder in output_dir.glob("checkpoint-*"):
        manifest = json.loads((folder / "manifest.json").read_text())
        present = {path.name for path in folder.iterdir()}
        assert present == {*manifest["files"], "manifest.json"}, folder
        for name, entry in manifest["files"].items():
            content = (folder / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"], folder / name
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            assert load_file(folder / name), folder / name
        steps.append(int(folder.name.removeprefix("checkpoint-")))
    return sorted(steps)


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(output_dir: Path, undisturbed: Path, tolerance: float = 1e-4) -> float:
    """Adapter and metrics equal the undisturbed run's; returns the largest adapter difference."""
    ours, theirs = metrics(output_dir), metrics(undisturbed)
    assert [line["step"] for line in ours] == list(range(1, len(theirs) + 1))
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys()
        assert abs(line["loss"] - expected["loss"]) <= tolerance
        for exact in ("epoch", "learning_rate", "num_tokens", "num_input_tokens"):
            assert line[exact] == expected[exact], (line["step"], exact)
    adapter, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (output_dir, undisturbed)
    )
    assert adapter.keys() == expected.keys()
    difference = max(float((adapter[k] - expected[k]).abs().max()) for k in adapter)
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    assert difference <= tolerance * largest, difference
    assert any(bool(torch.any(tensor)) for key, tensor in adapter.items() if "lora_B" in key)
    return difference
