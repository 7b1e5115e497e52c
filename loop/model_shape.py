"""The sizes of a dense decoder, read from its config.json or named ("8B"): what its memory follows from. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labeling.errors import InvalidInput

# Decoders of one attention and one feed-forward block a layer, the latter with a gate.
DENSE = frozenset(
    {
        *("llama", "mistral", "ministral", "mistral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"),
        *("granite", "cohere", "cohere2", "olmo", "olmo2", "olmo3", "smollm3", "stablelm", "helium", "exaone4"),
        *("seed_oss", "arcee", "apertus", "glm", "glm4", "hunyuan_v1_dense"),
    }
)
UNGATED = frozenset({"starcoder2", "arcee", "apertus"})  # two matrices in the feed-forward block instead of three
ALL_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class UnknownShape(InvalidInput):
    """Not a model whose memory can be told from its config.json; the message says why."""

    code = "unknown_shape"
    default_hint = "Name a dense decoder: a folder with its config.json, or one of 1B, 3B, 7B, 8B, 13B, 32B, 70B."


@dataclass(frozen=True)
class ModelShape:
    """`intermediate` is the width of the feed-forward block; `heads` x `head_dim` need not be `hidden`."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    gated: bool = True

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    def sides(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of a block."""
        mlp = {"up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden)}
        if self.gated:
            mlp["gate_proj"] = (self.hidden, self.intermediate)
        return {
            "q_proj": (self.hidden, self.query_width),
            "k_proj": (self.hidden, self.key_width),
            "v_proj": (self.hidden, self.key_width),
            "o_proj": (self.query_width, self.hidden),
            **mlp,
        }

    @property
    def linear_parameters(self) -> int:
        """Of all blocks: what NF4 quantises. Norms and biases, a ten-thousandth, are left out."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.sides().values())

    @property
    def embedding_parameters(self) -> int:
        """Of the table and, unless tied, the head: neither is ever quantised."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.embedding_parameters

    @property
    def largest_linear(self) -> int:
        return max(inputs * outputs for inputs, outputs in self.sides().values())

    def target_parameters(self, targets: Sequence[str]) -> int:
        """Of these linear layers themselves, in all blocks."""
        sides = self.sides()
        return self.layers * sum(sides[name][0] * sides[name][1] for name in set(targets) if name in sides)

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        sides = self.sides()
        return self.layers * sum(rank * sum(sides[name]) for name in set(targets) if name in sides)


def read_shape(folder: Path) -> ModelShape:
    """From the folder's config.json; raises UnknownShape with the reason."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except OSError as error:
        raise UnknownShape(f"{folder} holds no readable config.json: {error.strerror}") from None
    except ValueError:
        raise UnknownShape(f"{folder}/config.json is not JSON") from None
    if not isinstance(config, dict):
        raise UnknownShape(f"{folder}/config.json is not a model's configuration")
    return shape_of(config, folder.name)


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """`config` as Hugging Face writes it; the text part where the model is multimodal."""
    config = config.get("text_config") or config
    _dense(config, name)
    try:
        hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
        return ModelShape(
            name=name,
            hidden=hidden,
            intermediate=_whole(config, "intermediate_size"),
            layers=_whole(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocabulary=_whole(config, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", _tied_by_default(config))),
            gated=config.get("model_type") not in UNGATED,
        )
    except KeyError as error:
        raise UnknownShape(f"the configuration of {name} does not say {error}") from None


def _dense(config: Mapping[str, Any], name: str) -> None:
    experts = sorted(key for key in config if "expert" in key and config[key])
    if experts:
        raise UnknownShape(
            f"{name} is a mixture of experts ({experts[0]} = {config[experts[0]]}): which experts a token takes, and "
            "so what it needs, is not in its config.json"
        )
    family = config.get("model_type")
    if family not in DENSE | UNGATED:
        raise UnknownShape(f"{name} is of the family {family!r}, whose memory is not known here")


def _tied_by_default(config: Mapping[str, Any]) -> bool:
    """Where config.json leaves it out: these families' own default in transformers."""
    return config.get("model_type") in {"gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "starcoder2"}


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if type(value) is not int or value < 1:
        raise UnknownShape(f"{key} is {value!r}, not a whole number above 0")
    return value


# hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary; the model that the numbers are of.
NAMED = {
    "1B": ModelShape("1B", 2048, 8192, 16, 32, 8, 64, 128_256, tied=True),  # Llama 3.2 1B
    "3B": ModelShape("3B", 3072, 8192, 28, 24, 8, 128, 128_256, tied=True),  # Llama 3.2 3B
    "7B": ModelShape("7B", 4096, 11_008, 32, 32, 32, 128, 32_000),  # Llama 2 7B
    "8B": ModelShape("8B", 4096, 14_336, 32, 32, 8, 128, 128_256),  # Llama 3 8B
    "13B": ModelShape("13B", 5120, 13_824, 40, 40, 40, 128, 32_000),  # Llama 2 13B
    "32B": ModelShape("32B", 5120, 27_648, 64, 40, 8, 128, 152_064),  # Qwen2.5 32B
    "70B": ModelShape("70B", 8192, 28_672, 80, 64, 8, 128, 128_256),  # Llama 3 70B
}


def find_shape(model: str) -> ModelShape:
    """A name of NAMED, or a folder with a config.json."""
    return NAMED.get(model.upper()) or read_shape(Path(model))
