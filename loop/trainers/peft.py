"""`python -m loop.trainers.peft SPEC`: LoRA, QLoRA and full fine-tuning with transformers, peft and bitsandbytes.

On a CPU, one GPU or several.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from loop.run_plan import EAGER_UP_TO_TOKENS
from loop.trainers.child import Backend, main
from loop.trainers.spec import LoraSpec, TrainSpec
from loop.trainers.team import team


def start() -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with more, the trainer would spread one batch over all


def load(spec: TrainSpec, longest: int) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from loop.trainers.checkpointing import recompute
    from loop.trainers.planned_run import compute_dtype

    if team().sharded:
        from loop.trainers.sharded_base import load_sharded

        return load_sharded(spec, longest, team().sharding())
    on_gpu = torch.cuda.is_available()
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
    )
    model = AutoModelForCausalLM.from_pretrained(
        spec.base_dir,
        local_files_only=True,
        dtype=compute_dtype(),
        quantization_config=quantised if spec.quantisation == "nf4" else None,
        device_map={"": "cuda" if on_gpu else "cpu"},
        attn_implementation=attention(longest, on_gpu=on_gpu),
    )
    recompute(model, spec.memory.checkpointing)
    if spec.finetuning_type == "full":
        from loop.trainers.full_finetuning import with_changes

        return with_changes(model, spec.lora)
    keep_trainable(model)
    return get_peft_model(model, LoraConfig(**adapter_fields(spec.lora)))


def attention(longest: int, *, on_gpu: bool) -> str:
    return "eager" if longest <= EAGER_UP_TO_TOKENS and not on_gpu else "sdpa"


def adapter_fields(lora: LoraSpec) -> dict[str, Any]:
    """Of peft's LoraConfig."""
    return {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def keep_trainable(model: Any) -> None:
    """On a CPU, bitsandbytes repacks a 4-bit layer that is called in eval mode; from then on, training included, it
    gives no gradient to what lies below, with no more than a warning."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()


if __name__ == "__main__":
    sys.exit(main(Backend(start, load)))
