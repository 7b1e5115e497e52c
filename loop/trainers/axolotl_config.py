"""The typed recipe as axolotl's YAML: a pure function of the spec. No torch and no axolotl here.

What axolotl would do in its own way is said for it: rows come tokenised by us (sft) or rendered by us (dpo, kto), are
never packed nor cut, and how many steps are trained is settled beforehand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loop.trainers.launch_config import ZERO3, fsdp_config
from loop.trainers.preference_rows import units_a_step
from loop.trainers.spec import TrainSpec

DATA, PREPARED, OUT, CONFIG = "data.jsonl", "prepared", "checkpoints", "config.yaml"
SCHEDULERS = {"constant": "constant_with_warmup"}  # the others have our names
TEXTS = {
    "dpo": {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"},
    "kto": {"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"},
}


def render(
    spec: TrainSpec,
    folder: Path,
    *,
    steps: int,
    on_gpu: bool,
    at_once: int | None = None,
    kto_weights: tuple[float, float] = (1.0, 1.0),
) -> dict[str, Any]:
    """`folder`: where data, checkpoints and this very configuration lie. `at_once`: one of `rows_at_once`, or all."""
    schedule, at_once = spec.schedule, at_once or rows_a_card(spec)
    return {
        "base_model": str(spec.base_dir),
        "trust_remote_code": False,
        "strict": False,
        "plugins": ["loop.trainers.axolotl_plugin.Told"],
        **_adapter(spec),
        **_sharding(spec, folder),
        **_data(spec, folder, kto_weights),
        "output_dir": str(folder / OUT),
        "sequence_len": spec.lengths.max_length,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "micro_batch_size": at_once,
        "gradient_accumulation_steps": rows_a_card(spec) // at_once,
        "num_epochs": 1,
        "max_steps": steps,
        "learning_rate": schedule.learning_rate if spec.method == "sft" else spec.preference.learning_rate,
        "lr_scheduler": SCHEDULERS.get(schedule.scheduler, schedule.scheduler),
        "warmup_ratio": schedule.warmup_share,
        "optimizer": "adamw_torch_fused" if on_gpu else "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": schedule.max_grad_norm,
        "save_strategy": "steps",
        "save_steps": schedule.save_steps,
        "save_total_limit": 2,
        "auto_resume_from_checkpoints": True,  # the folder is this run's alone
        "logging_steps": 1,
        "val_set_size": 0.0,
        "seed": spec.seed,
        "bf16": "auto" if on_gpu else False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        **_checkpointing(spec),
        "dataloader_pin_memory": on_gpu,
    }


def rows_a_card(spec: TrainSpec) -> int:
    """Of every step; axolotl deals them out in turn."""
    return max(1, units_a_step(spec.method, spec.schedule.batch_size) // spec.cards.gpus)


def rows_at_once(spec: TrainSpec) -> list[int]:
    """How many rows or pairs of a step can pass through the model at once, on each card; the most first.

    axolotl's parts of a step are alike. A thumb's loss needs the whole step.
    """
    rows = rows_a_card(spec)
    return [count for count in range(rows, 0, -1) if rows % count == 0 and (count == rows or spec.method != "kto")]


def _checkpointing(spec: TrainSpec) -> dict[str, Any]:
    """What "offload" moves to the host are the layers' inputs, as with us."""
    match spec.memory.checkpointing:
        case "on" | "offload" as mode:
            return {
                "gradient_checkpointing": True,
                # The other kind misses frozen weights: ZeRO-3 has let go of them (huggingface/transformers#47254).
                "gradient_checkpointing_kwargs": {"use_reentrant": spec.cards.sharding == "zero3"},
                **({"activation_offloading": "hidden_states"} if mode == "offload" else {}),
            }
        case _:
            return {"gradient_checkpointing": False}


def _sharding(spec: TrainSpec, folder: Path) -> dict[str, Any]:
    """axolotl sets up both by itself, whatever its launcher was given."""
    match spec.cards.sharding:
        case "fsdp":
            config = fsdp_config()
            del config["fsdp_ignored_modules"], config["fsdp_activation_checkpointing"], config["fsdp_version"]
            config["fsdp_cpu_ram_efficient_loading"] = spec.quantisation != "nf4"  # its schema refuses both together
            return {
                "fsdp_version": 2,
                "fsdp_config": {key.removeprefix("fsdp_"): value for key, value in config.items()},
            }
        case "zero3":
            return {"deepspeed": str(folder / ZERO3)}
        case _:
            return {}


def _adapter(spec: TrainSpec) -> dict[str, Any]:
    """Its own LoRA kernels are for one layout of weights and need a GPU: plain ones train every base."""
    quantised = spec.quantisation == "nf4"
    return {
        "adapter": "qlora" if quantised else "lora",
        "load_in_4bit": quantised,
        "lora_r": spec.lora.rank,
        "lora_alpha": spec.lora.alpha,
        "lora_dropout": spec.lora.dropout,
        "lora_target_modules": list(spec.lora.target_modules),
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
    }


def _data(spec: TrainSpec, folder: Path, kto_weights: tuple[float, float]) -> dict[str, Any]:
    source: dict[str, Any] = {"path": str(folder / DATA), "ds_type": "json", "split": "train"}
    common = {"dataset_prepared_path": str(folder / PREPARED), "excess_length_strategy": "raise"}
    if spec.method == "sft":  # tokenised, in the order of our plan
        source["type"] = None
        return {**common, "datasets": [source], "shuffle_merged_datasets": False, "curriculum_sampling": True}
    source["type"] = TEXTS[spec.method]
    kto: dict[str, Any] = {"kto_desirable_weight": kto_weights[0], "kto_undesirable_weight": kto_weights[1]}
    kto["remove_unused_columns"] = False  # its schema demands it
    return {
        **common,
        "datasets": [source],
        "rl": spec.method,
        "rl_beta": spec.preference.beta,
        **(kto if spec.method == "kto" else {}),
    }
