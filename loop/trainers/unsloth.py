"""`python -m loop.trainers.unsloth SPEC`: the spec, rows and loop of `peft.py`, on a GPU with Unsloth's kernels."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

from labeling.errors import NightschoolError
from loop.trainers.child import Backend, main
from loop.trainers.spec import TrainSpec

CHECKPOINTING: dict[str, bool | str] = {"off": False, "on": True, "offload": "unsloth"}  # Unsloth's words for it


class NoAccelerator(NightschoolError):
    code = "no_accelerator"
    default_hint = 'Set trainer.backend = "peft", or run this project\'s trainer on a machine with a CUDA GPU.'


class NoUnsloth(NightschoolError):
    code = "no_unsloth"
    default_hint = "Set trainer.python to the Python of deploy/environments/gpu."


def start() -> None:
    """Unsloth patches transformers, peft and trl as they are imported: it goes first."""
    import torch

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ["UNSLOTH_DISABLE_AUTO_PADDING_FREE"] = "1"  # batches are packed by us, or not at all
    os.environ["UNSLOTH_RETURN_LOGITS"] = "0"
    if not torch.cuda.is_available():
        raise NoAccelerator("Unsloth needs a GPU and this machine has none")
    # Imports make millions of objects that stay: looked through for garbage again and again, by every library that
    # collects it while a model is loaded, they would cost half a second each time.
    gc.disable()
    try:
        import unsloth  # noqa: F401
    except ModuleNotFoundError as error:
        raise NoUnsloth(f"this environment lacks {error.name}, which the unsloth backend needs") from None
    finally:
        gc.enable()
    gc.freeze()


def load(spec: TrainSpec, longest: int) -> Any:
    import torch
    from unsloth import FastLanguageModel
    from unsloth.utils.packing import mark_allow_overlength

    from loop.trainers import unsloth_products, varlen_attention

    varlen_attention.use_in_unsloth()
    unsloth_products.use_in_unsloth()
    model, _ = FastLanguageModel.from_pretrained(
        str(spec.base_dir),
        max_seq_length=longest,
        load_in_4bit=spec.quantisation == "nf4",
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    mark_allow_overlength(model)  # a packed sequence is longer than any row; it would be cut
    return FastLanguageModel.get_peft_model(
        model,
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=list(spec.lora.target_modules),
        bias="none",
        use_gradient_checkpointing=CHECKPOINTING[spec.memory.checkpointing],
        random_state=spec.seed,
    )


if __name__ == "__main__":
    sys.exit(main(Backend(start, load, "unsloth")))
