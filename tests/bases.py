"""Small base models on disk, whole or broken in one way: weights are random, the tokenizer knows a dozen words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.adapters import TINY, Weights, tensor_bytes

WORDS = ("<unk>", "<end>", "<user>", "<bot>", "<after>", "who", "founded", "it", "Ines", "did", "Hello", "42")
SPECIAL = WORDS[:5]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}<end><after>{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
ROWS = 16  # of the embedding: a few spare ones


def write_base(
    folder: Path,
    *,
    rows: int = ROWS,
    words: tuple[str, ...] = WORDS,
    template: str | None = TEMPLATE,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """The dictionaries are laid over what config, generation_config and tokenizer_config would say."""
    folder.mkdir(parents=True)
    _write(
        folder / "config.json",
        {
            **TINY,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": rows,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "eos_token_id": 1,
            **(config or {}),
        },
    )
    _write(folder / "generation_config.json", {"eos_token_id": 1, **(generation or {})})
    _write_tokenizer(folder, words, tokenizer or {})
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    _write_weights(folder, _weights(rows), shards)
    return folder


def _write_tokenizer(folder: Path, words: tuple[str, ...], changes: dict[str, Any]) -> None:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([word for word in words if word in SPECIAL])
    made.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<end>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    _write(folder / "tokenizer_config.json", {**named, **changes})


def _weights(rows: int) -> Weights:
    """As Llama names them."""
    random = np.random.default_rng(0)
    hidden, inner = TINY["hidden_size"], TINY["intermediate_size"]
    keys = TINY["num_key_value_heads"] * hidden // TINY["num_attention_heads"]

    def some(*shape: int) -> Any:
        return random.normal(size=shape).astype(np.float32) * 0.1

    weights = {"model.embed_tokens.weight": some(rows, hidden), "model.norm.weight": some(hidden)}
    for layer in range(TINY["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            weights[f"{place}.{name}.weight"] = some(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{place}.{norm}.weight"] = some(hidden)
    return weights


def _write_weights(folder: Path, weights: Weights, shards: int) -> None:
    if shards == 1:
        (folder / "model.safetensors").write_bytes(tensor_bytes(weights))
        return
    names = list(weights)
    places: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number::shards]
        places |= dict.fromkeys(mine, file)
        (folder / file).write_bytes(tensor_bytes({name: weights[name] for name in mine}))
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))
