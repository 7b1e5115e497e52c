"""Going on from an adapter instead of from the base: its weights into the fresh one, if they fit exactly; of a full
fine-tune, what it changes into the changes."""

from __future__ import annotations

import json
from typing import Any

from labeling.errors import InvalidInput
from loop.trainers.full_finetuning import put_adapter
from loop.trainers.phases import put_weights
from loop.trainers.spec import LoraSpec, StartSpec


class UnfitStart(InvalidInput):
    code = "unfit_start"
    default_hint = 'Set trainer.rank, alpha and target_modules to those of that adapter, or trainer.start = "base".'


def start_from(model: Any, start: StartSpec, lora: LoraSpec, finetuning_type: str = "lora") -> None:
    config = json.loads((start.folder / "adapter_config.json").read_text(encoding="utf-8"))
    has = (config["r"], config["lora_alpha"], sorted(config["target_modules"]))
    wanted = (lora.rank, lora.alpha, sorted(lora.target_modules))
    if has != wanted:
        raise UnfitStart(f"{start.name} has rank, alpha and layers {has}; this recipe has {wanted}")
    path = start.folder / "adapter_model.safetensors"
    if finetuning_type == "full":
        put_adapter(model, path, lora.alpha / lora.rank)
    else:
        put_weights(model, path)
