"""Checks an adapter's files before any engine sees them, digests them and the base, installs them. No torch.

vLLM accepts shapes of another base in silence, and one NaN poisons the whole server until its restart: what this check
lets through must be safe to load.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, ClassVar

import numpy as np

from labeling.errors import Conflict
from loop.digests import canonical_json, digest_file, digest_json, sync_folder
from loop.plain_lora import AdapterRejected, BaseMissing, expected_shapes, scaling, servable
from loop.tensor_file import BadTensorFile, Tensor, TensorFile, open_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALLOWED = frozenset({CONFIG, WEIGHTS})
MAX_CONFIG_BYTES = 1_000_000
LARGEST = 65504.0  # what float16 holds: above, an engine of that dtype would read infinity
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}@v[1-9][0-9]{0,8}")
TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(0|[1-9][0-9]{0,4})\.(?:self_attn|mlp)\.([a-z]+_proj)\.lora_([AB])\.weight"
)
# What changes from run to run or from release to release without changing what the adapter does.
NOT_DIGESTED = frozenset({"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"})
BASE_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)


class AdapterNameTaken(Conflict):
    code: ClassVar[str] = "adapter_name_taken"
    default_hint = "An adapter's name stands for one content for ever: register the new one as a new version."


@dataclass(frozen=True)
class AdapterFiles:
    """`effect_norm` is the sum over modules of scaling x |A| x |B|: 0 means that nothing can change in any answer."""

    digest: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    tensors: int
    size_bytes: int
    effect_norm: float


def read_base_config(folder: Path) -> dict[str, Any]:
    """config.json of a base; its text part where the model is multimodal."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return dict(config.get("text_config", config))
    except OSError as error:
        raise BaseMissing(f"{folder} holds no readable config.json: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise BaseMissing(f"{folder}/config.json is not a model's configuration: {error}") from error


def base_digest(folder: Path) -> str:
    """Of everything that decides the base's answers: configuration, weights, tokenizer and chat template."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise BaseMissing(f"{folder} is no base model: config.json or *.safetensors is missing")
    files = [folder / name for name in BASE_FILES if (folder / name).is_file()] + weights
    return digest_json({file.name: _file_digest(*_stamp(file)) for file in files})


def check(
    folder: Path,
    base_config: dict[str, Any],
    *,
    max_rank: int,
    target_modules: Sequence[str],
    base_name: str | None = None,
) -> AdapterFiles:
    """AdapterRejected unless the folder holds exactly a plain LoRA of this base, every value finite."""
    _only_allowed_files(folder)
    config = _config(folder)
    rank, modules = servable(config, max_rank, target_modules)
    if base_name is not None and config.get("base_model_name_or_path") != base_name:
        raise AdapterRejected(
            f"made for base {config.get('base_model_name_or_path')!r}; this project's is {base_name!r}"
        )
    expected = dict(expected_shapes(base_config, modules, rank))
    try:
        with open_tensors(folder / WEIGHTS) as file:
            _same_shapes(file, expected)
            norm = _effect_norm(file, scaling(config, rank))
            digest = _digest(config, file)
    except BadTensorFile as error:
        raise AdapterRejected(str(error)) from error
    size = sum((folder / name).stat().st_size for name in ALLOWED)
    return AdapterFiles(digest, rank, float(config["lora_alpha"]), modules, len(expected), size, norm)


def adapter_digest(folder: Path) -> str:
    """The digest alone, of files that `check` has passed: equal digests are equal adapters."""
    _only_allowed_files(folder)
    try:
        with open_tensors(folder / WEIGHTS) as file:
            return _digest(_config(folder), file)
    except BadTensorFile as error:
        raise AdapterRejected(str(error)) from error


def install(folder: Path, adapters_dir: Path, name: str, *, digest: str) -> Path:
    """A durable copy at `adapters_dir/name`, whole or not there; a name with other bytes is never overwritten."""
    if not NAME.fullmatch(name):
        raise AdapterRejected(f"{name!r} is no adapter name", hint="Names look like support-bot@v2.")
    target = adapters_dir / name
    if not target.exists():
        adapters_dir.mkdir(parents=True, exist_ok=True)
        temporary = adapters_dir / f".{name}.{secrets.token_hex(4)}"
        try:
            _copy(folder, temporary)
            _rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    found = adapter_digest(target)
    if found != digest:
        raise AdapterNameTaken(f"{target} holds {found[:19]}…, not {digest[:19]}…")
    return target


def _copy(folder: Path, to: Path) -> None:
    to.mkdir()
    for name in sorted(ALLOWED):
        with (folder / name).open("rb") as source, (to / name).open("wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
    sync_folder(to)


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # another process was first: its copy is compared like any other
            raise
    sync_folder(target.parent)


def _only_allowed_files(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        raise AdapterRejected(f"{folder} is not a folder")
    found = {entry.name: S_ISREG(entry.stat(follow_symlinks=False).st_mode) for entry in os.scandir(folder)}
    odd = sorted(name for name, plain in found.items() if name not in ALLOWED or not plain)
    if odd:
        raise AdapterRejected(
            f"{odd[0]!r} may not be in an adapter folder: only the plain files {CONFIG} and {WEIGHTS}"
        )
    missing = sorted(ALLOWED - found.keys())
    if missing:
        raise AdapterRejected(f"{missing[0]} is missing in {folder}")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterRejected(f"{CONFIG} has {path.stat().st_size} bytes, {MAX_CONFIG_BYTES} at most")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterRejected(f"{CONFIG} is not an object")
    return config


def _same_shapes(file: TensorFile, expected: dict[str, tuple[int, int]]) -> None:
    for name, tensor in file.tensors.items():
        if name not in expected:
            raise AdapterRejected(f"tensor {name[:200]!r} {_why_unknown(name)}")
        if tensor.shape != expected[name]:
            raise AdapterRejected(
                f"tensor {name!r} has shape {list(tensor.shape)}, this base needs {list(expected[name])}: "
                "made for another base or rank"
            )
    missing = sorted(expected.keys() - file.tensors.keys())
    if missing:
        raise AdapterRejected(f"tensor {missing[0]!r} and {len(missing) - 1} others are missing")


def _why_unknown(name: str) -> str:
    return "is of a layer or module that this base does not have" if TENSOR.fullmatch(name) else "is no LoRA tensor"


def _effect_norm(file: TensorFile, scaling: float) -> float:
    """AdapterRejected at the first value that is not finite or too large."""
    norms = {tensor.name: _norm(file, tensor) for tensor in file.tensors.values()}
    pairs = ((norm, norms[name.replace(".lora_A.", ".lora_B.")]) for name, norm in norms.items() if ".lora_A." in name)
    return float(sum(scaling * a * b for a, b in pairs))


def _norm(file: TensorFile, tensor: Tensor) -> float:
    values = file.values(tensor)
    if not np.isfinite(values).all():
        raise AdapterRejected(f"tensor {tensor.name!r} holds NaN or infinity: one request to it poisons the engine")
    if np.abs(values).max(initial=0.0) > LARGEST:
        raise AdapterRejected(f"tensor {tensor.name!r} holds a value above {LARGEST:.0f}")
    return float(np.linalg.norm(values.astype(np.float64)))


def _digest(config: dict[str, Any], file: TensorFile) -> str:
    """Canonical: keys and sets in order (PEFT writes target_modules in any), no paths, tensors by name."""
    kept = {key: value for key, value in config.items() if key not in NOT_DIGESTED}
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"] = sorted(map(str, kept["target_modules"]))
    digest = hashlib.sha256(canonical_json(kept))
    for tensor in file.tensors.values():
        digest.update(canonical_json([tensor.name, tensor.dtype, tensor.shape]))
        digest.update(file.raw(tensor))
    return f"sha256:{digest.hexdigest()}"


def file_digest(path: Path) -> str:
    """Of a file that is read once, however often it is asked for."""
    return _file_digest(*_stamp(path))


def _stamp(file: Path) -> tuple[Path, int, int]:
    stat = file.stat()
    return file.resolve(), stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Read again only when size or time have changed."""
    return digest_file(path)
