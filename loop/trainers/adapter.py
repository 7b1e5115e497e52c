"""The trained adapter on disk: two files, in bfloat16, written for the served base. Nothing that holds code."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save

from labeling.errors import NightschoolError
from loop.digests import write_durably
from loop.trainers.spec import ADAPTER_FILES


class BrokenAdapter(NightschoolError):
    code = "broken_adapter"
    default_hint = "Training diverged; lower trainer.learning_rate."


def write_adapter(
    model: Any, folder: Path, base_name: str, weights: Mapping[str, torch.Tensor] | None = None
) -> dict[str, str]:
    """Digests by file name. `weights`: by peft's names, where they are not the model's own: extracted, or put together
    by a backend from what no process holds whole.

    Vendors name the base by the path or the 4-bit copy it was loaded from: we name it.
    """
    shutil.rmtree(folder, ignore_errors=True)  # half of an earlier try
    folder.mkdir(parents=True)
    files = (_config(model, base_name), _weights(get_peft_model_state_dict(model) if weights is None else weights))
    for name, content in zip(ADAPTER_FILES, files, strict=True):
        write_durably(folder / name, content)
    return {
        name: f"sha256:{hashlib.sha256(content).hexdigest()}"
        for name, content in zip(ADAPTER_FILES, files, strict=True)
    }


def _weights(trained: Mapping[str, torch.Tensor]) -> bytes:
    weights = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in sorted(trained.items())}
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise BrokenAdapter(f"{len(broken)} of {len(weights)} trained tensors are not finite, the first is {broken[0]}")
    return save(weights, metadata={"format": "pt"})


def _config(model: Any, base_name: str) -> bytes:
    """In a settled order: PEFT keeps target_modules as a set, whose order differs between runs."""
    config = {name: value for name, value in model.peft_config["default"].to_dict().items() if _plain(value)}
    config |= {"base_model_name_or_path": base_name, "inference_mode": True, "revision": None}
    return json.dumps(config, sort_keys=True, indent=1, default=_in_order).encode()


def _plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool, list, set, tuple, dict, type(None)))


def _in_order(value: object) -> object:
    """Enums inside, and sets."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))
