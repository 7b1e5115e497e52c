"""What a plain LoRA of a base is: which settings engines serve, and every tensor's name and shape. No files here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from labeling.errors import InvalidInput, Refused

BLOCK_OF = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
# Fields of PEFT's configuration whose only servable values are "off".
MUST_BE_OFF = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices", "target_parameters"),
    *("exclude_modules", "use_qalora", "alora_invocation_tokens"),
)


class AdapterRejected(Refused):
    """Its files may not reach an engine; the message names the trouble."""

    code: ClassVar[str] = "adapter_rejected"
    default_hint = "Nothing was loaded. Train it again for this base, with a rank and modules that the engine serves."


class BaseMissing(InvalidInput):
    code: ClassVar[str] = "base_missing"
    default_hint = "projects.base_dir must name a folder with config.json, *.safetensors and the tokenizer."


def servable(config: dict[str, Any], max_rank: int, allowed: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """Rank and modules of a plain LoRA; vLLM serves nothing else (vllm#9280)."""
    if config.get("peft_type") != "LORA":
        raise AdapterRejected(f"peft_type is {config.get('peft_type')!r}; only LORA is served")
    on = [field for field in MUST_BE_OFF if config.get(field)]
    if on or config.get("bias", "none") != "none":
        raise AdapterRejected(f"{on[0] if on else 'bias'} is on; engines serve plain LoRA only")
    rank, modules = config.get("r"), config.get("target_modules")
    if type(rank) is not int or not 1 <= rank <= max_rank:
        raise AdapterRejected(f"rank {rank!r}: the engine serves 1 to {max_rank}")
    if not isinstance(modules, list) or not modules or not all(isinstance(module, str) for module in modules):
        raise AdapterRejected(f"target_modules is {str(modules)[:100]!r}, not a list of module names")
    unknown = sorted(set(modules) - (set(allowed) & set(BLOCK_OF)))
    if unknown:
        raise AdapterRejected(f"module {unknown[0]!r} is not among those that are trained and served here")
    alpha = config.get("lora_alpha")
    if type(alpha) not in {int, float} or not 0 < float(alpha or 0) < 1e6:
        raise AdapterRejected(f"lora_alpha is {alpha!r}")
    return rank, tuple(sorted(set(modules)))


def scaling(config: dict[str, Any], rank: int) -> float:
    return float(config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank))


def expected_shapes(base: dict[str, Any], modules: Sequence[str], rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every tensor that PEFT writes for a Llama, Mistral or Qwen2 shaped decoder."""
    try:
        hidden, heads, layers = base["hidden_size"], base["num_attention_heads"], base["num_hidden_layers"]
        inner = base["intermediate_size"]
        head = base.get("head_dim") or hidden // heads
        keys = (base.get("num_key_value_heads") or heads) * head
    except KeyError as error:
        raise BaseMissing(f"the base's config.json does not say {error}: its adapters cannot be checked") from error
    sides = {
        "q_proj": (hidden, heads * head),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (heads * head, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    for layer in range(layers):
        for module in modules:
            place = f"base_model.model.model.layers.{layer}.{BLOCK_OF[module]}.{module}"
            yield f"{place}.lora_A.weight", (rank, sides[module][0])
            yield f"{place}.lora_B.weight", (sides[module][1], rank)


def weights(base: dict[str, Any], modules: Sequence[str]) -> int:
    """How many numbers the adapted layers' own weights are."""
    sides = dict(expected_shapes(base, modules, 1))
    return sum(
        columns * sides[name.replace(".lora_A.", ".lora_B.")][0]
        for name, (_, columns) in sides.items()
        if ".lora_A." in name
    )


def parameters(base: dict[str, Any], modules: Sequence[str], rank: int) -> int:
    """How many numbers such a LoRA trains."""
    return sum(rows * columns for _, (rows, columns) in expected_shapes(base, modules, rank))
