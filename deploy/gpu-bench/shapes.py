"""Random models of real shapes, and rows of exact lengths to train them on. No downloads.

python shapes.py {8b|1b|135m|tiny} FOLDER
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5, "tie_word_embeddings": True,
    },
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024,
    },
}  # fmt: skip
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
TEMPLATE = (
    "{% for m in messages %}#{{ m.role[0] }}{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}#a{% endif %}"
)
WORDS = (
    "the",
    "order",
    "parcel",
    "invoice",
    "refund",
    "late",
    "open",
    "close",
    "early",
    "new",
    "login",
    "paid",
    "lost",
)


def make_model(shape: str, folder: Path) -> float:
    """A folder that any trainer loads; seconds it took. Weights are drawn on the GPU where there is one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    since = time.monotonic()
    if (folder / "config.json").exists():
        return 0.0
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="bfloat16"
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    _tokenizer().save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="2GB")
    return time.monotonic() - since


def _tokenizer() -> Any:
    """A token a character: rows get exactly the length that is asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([], trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, **names)


def chat_lengths(count: int, seed: int = 0) -> list[int]:
    """Short chats: 60 to 400 tokens, half of them below 140: many short ones and a few long, as at a support desk."""
    chance = random.Random(seed)  # noqa: S311 - lengths, no secret
    return [min(max(round(math.exp(chance.gauss(math.log(140), 0.55))), 60), 400) for _ in range(count)]


def write_rows(folder: Path, lengths: list[int], *, prompt_share: float = 0.3, replay_share: float = 0.0) -> None:
    """train.jsonl with one row for each length, template included."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(1)  # noqa: S311 - words, no secret
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            kind = "replay" if number % 5 < 5 * replay_share else "label"
            messages = _messages(chance, length, prompt_share)
            file.write(json.dumps({"id": f"row-{number}", "kind": kind, "messages": messages}) + "\n")


def write_preferences(folder: Path, lengths: list[int], *, thumbs: bool, prompt_share: float = 0.3) -> None:
    """pairs.jsonl, with either answer a row of the length asked for, or thumbs.jsonl, every other one up."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(2)  # noqa: S311 - words, no secret
    with (folder / ("thumbs.jsonl" if thumbs else "pairs.jsonl")).open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            messages = _messages(chance, length, prompt_share)
            *prompt, answer = messages
            other = _text(chance, len(answer["content"]))
            pair = {"prompt": prompt, "chosen": answer["content"], "rejected": other}
            unit = {"messages": messages, "good": number % 2 == 0} if thumbs else pair
            file.write(json.dumps({"id": f"unit-{number}", **unit}) + "\n")


def _messages(chance: random.Random, length: int, prompt_share: float) -> list[dict[str, str]]:
    told = length - 6  # two characters before each message, one token after it
    asked = max(int(told * prompt_share), 1)
    texts = (("user", _text(chance, asked)), ("assistant", _text(chance, told - asked)))
    return [{"role": role, "content": content} for role, content in texts]


def _text(chance: random.Random, size: int) -> str:
    text = ""
    while len(text) < size:
        text += chance.choice(WORDS) + "-"
    return text[: size - 1] + "."


if __name__ == "__main__":
    sys.stdout.write(f"{make_model(sys.argv[1], Path(sys.argv[2])):.1f} s\n")
