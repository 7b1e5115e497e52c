"""What the product is measured against: bare loops with nothing but forward, backward, clip and step.

    python rivals.py {hf|unsloth} BASE JSON     JSON: {quantised, checkpointing, batches: [[lengths]],
                                                optimizer: adamw | adamw_8bit}

`hf` is transformers + peft + bitsandbytes; batches are padded to their longest row. One JSON line on stdout.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

WARM = 3
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_unsloth(base: str, asked: dict[str, Any]) -> Any:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        base, max_seq_length=8192, load_in_4bit=asked["quantised"], dtype=torch.bfloat16, local_files_only=True
    )
    return FastLanguageModel.get_peft_model(
        model, r=16, target_modules=LAYERS, lora_alpha=16, lora_dropout=0, bias="none",
        use_gradient_checkpointing=asked["checkpointing"],
    )  # fmt: skip


def load_hf(base: str, asked: dict[str, Any]) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, device_map={"": _device()}, attn_implementation="sdpa",
        quantization_config=nf4 if asked["quantised"] else None,
    )  # fmt: skip
    if asked["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=LAYERS, task_type="CAUSAL_LM"))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run(name: str, base: str, asked: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    model = load_unsloth(base, asked) if name == "unsloth" else load_hf(base, asked)
    import torch

    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if asked["optimizer"] == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit as Optimizer
    else:
        from torch.optim import AdamW as Optimizer  # type: ignore[assignment]
    device = _device()
    fused: dict[str, Any] = {} if asked["optimizer"] == "adamw_8bit" else {"fused": True}
    optimizer = Optimizer(weights, lr=1e-4, **fused)
    seconds, tokens, first = [], [], 0.0
    for lengths in asked["batches"]:
        ids = torch.randint(3, 250, (len(lengths), max(lengths)), device=device)
        mask = torch.arange(max(lengths), device=device)[None] < torch.tensor(lengths, device=device)[:, None]
        whole = min(lengths) == max(lengths)
        _wait(device)
        since = time.monotonic()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(
                input_ids=ids, labels=ids.masked_fill(~mask, -100), attention_mask=None if whole else mask.long()
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        first = first or time.monotonic() - started
        seconds.append(time.monotonic() - since)
        tokens.append(sum(lengths))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "tokens_per_s": sum(tokens[WARM:]) / sum(seconds[WARM:]),
        "first_step_s": round(first, 1),
        "first_alone_s": round(seconds[0], 1),
        "peak_gib": round(peak / 2**30, 1),
    }


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))) + "\n")
