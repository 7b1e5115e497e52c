"""What accelerate's launcher is given: its own YAML, and DeepSpeed's JSON for ZeRO-3. Pure functions of the spec.

Keys are accelerate's (`accelerate config`, docs "FSDP2" and "DeepSpeed") and DeepSpeed's (docs "ZeRO").
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from loop.digests import write_durably
from loop.trainers.spec import TrainSpec

CONFIG, ZERO3 = "accelerate.yaml", "zero3.json"
# By name, in any base: adapters are trained whole on each card, and what the loss reads outside of layers stays there.
NOT_SHARDED = r".*\.(lora_[A-Za-z_]+|embed_tokens|lm_head|norm)(\..*)?"


def accelerate_config(spec: TrainSpec, *, on_gpu: bool, by_us: bool = True) -> dict[str, Any]:
    """The loss brings its own autocast and the trainer its own checkpointing: both are off here.

    `by_us`: otherwise a backend sets up its own sharding in the ranks, and only ranks are asked for.
    """
    sharded = by_us and spec.cards.sharding == "fsdp"
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP" if sharded else "MULTI_GPU",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": spec.cards.gpus,
        "gpu_ids": "all",  # each rank takes its own
        "main_training_function": "main",
        "main_process_port": 0,
        "same_network": True,
        "mixed_precision": "no",
        "downcast_bf16": "no",
        "use_cpu": not on_gpu,
        "debug": False,
        **({"fsdp_config": fsdp_config()} if sharded else {}),
    }


def fsdp_config() -> dict[str, Any]:
    """FSDP2, a layer at a time. Every rank reads only what it keeps, so that no host holds the base twice."""
    return {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # the base's own layers
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_offload_params": False,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_activation_checkpointing": False,
        "fsdp_ignored_modules": NOT_SHARDED,
    }


def zero3_config(spec: TrainSpec, *, on_gpu: bool) -> dict[str, Any]:
    """`"auto"`: as the trainer's own arguments say, which transformers fills in.

    Not so the width: the base is read before, and would be widened to float32, which DeepSpeed 0.18.9 then can't gather
    together with an adapter in bfloat16.
    """
    return {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
            "offload_optimizer": {"device": "none"},
            "offload_param": {"device": "none"},
        },
        "bf16": {"enabled": on_gpu},
        "gradient_clipping": spec.schedule.max_grad_norm,
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "steps_per_print": 1_000_000,
        "wall_clock_breakdown": False,
    }


def write_config(spec: TrainSpec, folder: Path, *, on_gpu: bool, by_us: bool = True) -> Path:
    """accelerate.yaml in `folder`; where it lies."""
    import yaml

    path = folder / CONFIG
    config = accelerate_config(spec, on_gpu=on_gpu, by_us=by_us)
    write_durably(path, yaml.safe_dump(config, sort_keys=False).encode())
    return path


def threads_of_a_rank(spec: TrainSpec) -> int:
    return spec.threads or max(1, (os.cpu_count() or 1) // spec.cards.gpus)
