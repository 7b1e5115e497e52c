"""A sentence-embedding model of the BERT family from a local folder, run with numpy alone: no torch, no network.

Reads what sentence-transformers writes: config.json, model.safetensors, tokenizer.json, and the pooling if it is there.
Known: `bert`, `roberta` and `xlm-roberta` (MiniLM, BGE, E5, GTE, multilingual ones), mean or first-token pooling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from scipy.special import erf
from tokenizers import Tokenizer

from labeling.errors import InvalidInput

Array = NDArray[np.float32]
FILES = ("config.json", "model.safetensors", "tokenizer.json")
BATCH = 32
LONGEST = 512  # tokens; what comes behind them says nothing


class SentenceModelUnfit(InvalidInput):
    code: ClassVar[str] = "sentence_model_unfit"
    default_hint = (
        "embedding_model_dir must name a folder with config.json, model.safetensors and tokenizer.json of a "
        "sentence model of the BERT family, such as all-MiniLM-L6-v2; leave it out to use hashed n-grams."
    )


def _gelu(x: Array) -> Array:
    return np.asarray(x * 0.5 * (1 + erf(x * np.float32(0.7071067811865476))), np.float32)


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(np.float32(0.7978845608028654) * (x + 0.044715 * x**3))), np.float32)


def _relu(x: Array) -> Array:
    return np.maximum(x, np.float32(0))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
}


class SentenceModel:
    """An `Embedder`. `name` holds a digest of the configuration and the weights."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise SentenceModelUnfit(f"{folder} is no sentence model: {', '.join(missing)} missing")
        self._config = _read(folder / "config.json")
        self._first_token = _pools_first_token(folder)
        self._tokenizer = _tokenizer(folder, self._longest(folder))
        self._weights = _weights(folder)
        self._activation = self._known_activation(folder)
        self.dimensions: int = int(self._config["hidden_size"])
        self.name = f"{folder.name}-{_digest(folder)}"
        self._run(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), folder)

    def embed(self, texts: Sequence[str]) -> Array:
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        encoded = self._tokenizer.encode_batch([text.encode("utf-8", "replace").decode() for text in texts])
        for rows in _of_one_length([len(found.ids) for found in encoded]):
            vectors[rows] = self._pooled([encoded[row].ids for row in rows])
        return vectors

    def _longest(self, folder: Path) -> int:
        limit = _read(folder / "sentence_bert_config.json").get("max_seq_length") or LONGEST
        return min(int(limit), LONGEST, int(self._config.get("max_position_embeddings", LONGEST)) - self._offset)

    @property
    def _offset(self) -> int:
        """Where positions start: RoBERTa's lie behind the padding's."""
        roberta = self._config.get("model_type") in {"roberta", "xlm-roberta"}
        return int(self._config.get("pad_token_id", 1)) + 1 if roberta else 0

    def _known_activation(self, folder: Path) -> Callable[[Array], Array]:
        kind, activation = self._config.get("model_type"), self._config.get("hidden_act", "gelu")
        if kind not in {"bert", "roberta", "xlm-roberta"}:
            raise SentenceModelUnfit(f"{folder} holds a model of type {kind!r}; bert, roberta and xlm-roberta are read")
        if activation not in ACTIVATIONS or self._config.get("position_embedding_type", "absolute") != "absolute":
            raise SentenceModelUnfit(f"{folder}: activation {activation!r} or its kind of positions is not known here")
        return ACTIVATIONS[activation]

    def _pooled(self, ids: Sequence[list[int]]) -> Array:
        width = max(len(row) for row in ids)
        tokens, mask = np.zeros((len(ids), width), np.int64), np.zeros((len(ids), width), np.float32)
        for row, found in enumerate(ids):
            tokens[row, : len(found)], mask[row, : len(found)] = found, 1
        states = self._states(tokens, mask)
        pooled = states[:, 0] if self._first_token else (states * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]
        return np.asarray(pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12), np.float32)

    def _run(self, tokens: NDArray[np.int64], mask: Array, folder: Path) -> None:
        """Once at loading, so that unfit weights show here and not with the first text."""
        try:
            states = self._states(tokens, mask)
        except (KeyError, ValueError, IndexError) as error:
            raise SentenceModelUnfit(f"{folder}: the weights do not fit config.json: {error!r}") from error
        if states.shape[-1] != self.dimensions or not np.isfinite(states).all():
            raise SentenceModelUnfit(f"{folder}: the weights give no finite vector of {self.dimensions} numbers")

    def _states(self, tokens: NDArray[np.int64], mask: Array) -> Array:
        """[texts, tokens, dimensions] of the last layer (Devlin et al., 2019)."""
        w = self._weights
        positions = np.arange(self._offset, self._offset + tokens.shape[1])
        x = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.position_embeddings.weight"][positions]
        x = self._normalised(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        hidden = (1 - mask)[:, None, None, :] * np.float32(-1e9)
        for layer in range(int(self._config["num_hidden_layers"])):
            x = self._layer(x, hidden, f"encoder.layer.{layer}.")
        return x

    def _layer(self, x: Array, hidden: Array, at: str) -> Array:
        attended = self._linear(self._attention(x, hidden, f"{at}attention.self."), f"{at}attention.output.dense")
        x = self._normalised(x + attended, f"{at}attention.output.LayerNorm")
        wide = self._activation(self._linear(x, f"{at}intermediate.dense"))
        return self._normalised(x + self._linear(wide, f"{at}output.dense"), f"{at}output.LayerNorm")

    def _attention(self, x: Array, hidden: Array, at: str) -> Array:
        heads, (texts, length, width) = int(self._config["num_attention_heads"]), x.shape

        def split(name: str) -> Array:
            return self._linear(x, at + name).reshape(texts, length, heads, width // heads).transpose(0, 2, 1, 3)

        query, key, value = split("query"), split("key"), split("value")
        scores = query @ key.transpose(0, 1, 3, 2) / np.float32((width // heads) ** 0.5) + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        return np.asarray((scores @ value).transpose(0, 2, 1, 3).reshape(texts, length, width), np.float32)

    def _linear(self, x: Array, name: str) -> Array:
        return np.asarray(x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"], np.float32)

    def _normalised(self, x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred * centred).mean(-1, keepdims=True) + float(self._config["layer_norm_eps"]))
        weights, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return np.asarray(centred / deviation * weights + bias, np.float32)


def _of_one_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows to compute together: a short text beside a long one would cost as much as the long one."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) == BATCH or lengths[row] > 2 * lengths[rows[0]]):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _read(path: Path) -> dict[str, Any]:
    """Empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SentenceModelUnfit(f"{path} can't be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _pools_first_token(folder: Path) -> bool:
    """Older releases of sentence-transformers write one key a kind, newer ones `pooling_mode`."""
    pooling = _read(folder / "1_Pooling" / "config.json")
    kinds = {key.removeprefix("pooling_mode_") for key, on in pooling.items() if key[:13] == "pooling_mode_" and on}
    wanted = {kind.removesuffix("s").removesuffix("_token") for kind in kinds} | {
        str(pooling[key]) for key in ("pooling_mode",) if key in pooling
    }
    if wanted - {"cls", "mean"} or len(wanted) > 1:
        raise SentenceModelUnfit(f"{folder} pools by {', '.join(sorted(wanted))}: mean or cls is known here")
    return wanted == {"cls"}


def _tokenizer(folder: Path, longest: int) -> Any:
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise SentenceModelUnfit(f"{folder / 'tokenizer.json'} can't be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    return tokenizer


def _weights(folder: Path) -> dict[str, Array]:
    """Without the prefix that some checkpoints carry."""
    try:
        found = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise SentenceModelUnfit(f"{folder / 'model.safetensors'} can't be read: {error}") from error
    prefixes = ("bert.", "roberta.", "xlm-roberta.")
    plain = {next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name): w for name, w in found.items()}
    return {name: np.asarray(weight, np.float32) for name, weight in plain.items() if weight.dtype.kind == "f"}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with (folder / "model.safetensors").open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
