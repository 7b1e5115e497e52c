"""Adapters of a base, made of numpy and bytes: good, without effect, broken in one way each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loop.settings import LINEAR_LAYERS

Weights = dict[str, NDArray[np.float32]]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def weights_for(base: Mapping[str, Any], *, rank: int = 4, size: float = 0.02, seed: int = 0) -> Weights:
    """Random A and B of every linear layer; `size` is B's spread: 0 = an adapter without effect."""
    random = np.random.default_rng(seed)
    hidden, inner, heads = base["hidden_size"], base["intermediate_size"], base["num_attention_heads"]
    head = base.get("head_dim") or hidden // heads
    keys = base["num_key_value_heads"] * head
    sides = {
        "self_attn": {
            "q_proj": (hidden, heads * head),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (heads * head, hidden),
        },
        "mlp": {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)},
    }
    weights: Weights = {}
    for layer in range(base["num_hidden_layers"]):
        for block, modules in sides.items():
            for module, (into, out) in modules.items():
                place = f"base_model.model.model.layers.{layer}.{block}.{module}"
                a, b = (
                    random.normal(size=(rank, into)) / into**0.5,
                    random.normal(size=(out, rank)) * size + 0.0,
                )  # no -0.0
                weights[f"{place}.lora_A.weight"] = a.astype(np.float32)
                weights[f"{place}.lora_B.weight"] = b.astype(np.float32)
    return weights


def config_for(*, rank: int = 4, base_name: str = "base", **changed: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": list(LINEAR_LAYERS),
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        **changed,
    }


def tensor_bytes(weights: Weights, dtype: str = "BF16", **header: Any) -> bytes:
    """The safetensors format: length of the header, header, data. `header` overrides whole entries of it."""
    entries, data = {}, b""
    for name, values in weights.items():
        raw = _raw(values, dtype)
        entries[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries, **header}).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_adapter(
    folder: Path,
    base: Mapping[str, Any],
    *,
    rank: int = 4,
    size: float = 0.02,
    seed: int = 0,
    dtype: str = "BF16",
    change: Callable[[Weights], Weights | None] | None = None,
    **config: Any,
) -> Path:
    """A whole adapter folder; `change` edits the weights in place or gives others, `config` the configuration."""
    folder.mkdir(parents=True)
    weights = weights_for(base, rank=rank, size=size, seed=seed)
    if change is not None:
        weights = change(weights) or weights
    (folder / CONFIG).write_text(json.dumps(config_for(rank=rank, **config)))
    (folder / WEIGHTS).write_bytes(tensor_bytes(weights, dtype))
    return folder


def _raw(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "BF16":  # the upper half of a float32, cut; NaN and infinity stay what they are
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
