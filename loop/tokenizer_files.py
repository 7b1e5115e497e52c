"""A base's tokenizer as files: does it fit the weights, and do its files agree with each other? No torch, no vendor.

What only the tokenizer at work can show (`loop.trainers.audit`) is looked at in the trainer's own environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from labeling.errors import InvalidInput
from loop.adapter_files import read_base_config

NAMES_SHOWN = 3
SPECIAL = ("bos", "eos", "pad", "unk")
Ids = tuple[int, ...]


class TokenizerUnfit(InvalidInput):
    code: ClassVar[str] = "tokenizer_unfit"
    default_hint = "Put the tokenizer's files back as they came with these weights: `nightschool model fetch`."


@dataclass(frozen=True)
class AddedToken:
    text: str
    special: bool


@dataclass(frozen=True)
class TokenizerFiles:
    """`ids` has every token of tokenizer.json; `special` says by kind and file which ids are named there."""

    ids: Mapping[str, int]
    added: Mapping[int, AddedToken]
    declared: Mapping[int, AddedToken]  # tokenizer_config.json's added_tokens_decoder
    special: Mapping[str, Mapping[str, Ids]]
    unknown: Mapping[str, str]  # kind -> a token that tokenizer_config.json names and tokenizer.json lacks


def read_tokenizer(folder: Path) -> TokenizerFiles | None:
    """None where there is no tokenizer.json, but a file that it can be made of. TokenizerUnfit: it is no tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
            return None
        raise TokenizerUnfit(f"{folder} holds no tokenizer: neither tokenizer.json nor tokenizer.model")
    content = _json(path)
    try:
        ids = _vocabulary(content["model"]["vocab"])
        added = {int(one["id"]): AddedToken(one["content"], bool(one["special"])) for one in content["added_tokens"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenizerUnfit(f"{path} is not a tokenizer: {type(error).__name__} {error}") from error
    ids |= {token.text: number for number, token in added.items()}
    config = _json(folder / "tokenizer_config.json", missing_ok=True)
    named = {kind: _name(config.get(f"{kind}_token")) for kind in SPECIAL}
    return TokenizerFiles(
        ids=ids,
        added=added,
        declared=_declared(folder, config.get("added_tokens_decoder") or {}),
        special=_special(folder, ids, named),
        unknown={kind: name for kind, name in named.items() if name and name not in ids},
    )


def problems(tokenizer: TokenizerFiles, embedding_rows: int | None, vocab_size: int | None) -> list[str]:
    """What would break training or serving; each names the tokens."""
    return [
        *_beyond(tokenizer, embedding_rows),
        *_sizes(embedding_rows, vocab_size),
        *_shared_ids(tokenizer),
        *_disagreeing(tokenizer),
        *[
            f"tokenizer_config.json names {name!r} as {kind}, which tokenizer.json does not hold"
            for kind, name in tokenizer.unknown.items()
        ],
        *([] if any(tokenizer.special["eos"].values()) else ["no file names an end-of-sequence token"]),
    ]


def harmless(tokenizer: TokenizerFiles, embedding_rows: int | None) -> list[str]:
    """Differences that are known to do no harm, and why."""
    told = [_differing(tokenizer, kind) for kind in SPECIAL]
    pads, ends = tokenizer.special["pad"], tokenizer.special["eos"]
    pad = _of_tokenizer(pads)
    if not any(pads.values()):
        told.append("no pad token: rows are padded with id 0, and what is padded is left out by place, not by id")
    elif pad and pad == _of_tokenizer(ends):
        told.append("pad and eos are one token: what is padded is left out by place, so that the eos stays in the loss")
    if embedding_rows is not None and embedding_rows > (most := max(tokenizer.ids.values(), default=-1) + 1):
        told.append(f"{embedding_rows - most} rows of the embedding have no token: spare ones")
    differing = [
        number
        for number, token in tokenizer.declared.items()
        if number in tokenizer.added and token.special != tokenizer.added[number].special
    ]
    if differing:
        told.append(
            f"{len(differing)} added tokens are special in one of the tokenizer's files only, as id {differing[0]}"
        )
    return [line for line in told if line]


def _beyond(tokenizer: TokenizerFiles, rows: int | None) -> list[str]:
    """Also ids that only a configuration names: padding with one would read outside the embedding."""
    if rows is None:
        return []
    words = {**{number: text for text, number in tokenizer.ids.items()}}
    words |= {number: token.text for number, token in tokenizer.declared.items()}
    told = []
    if beyond := sorted(number for number in words if not 0 <= number < rows):
        shown = ", ".join(f"{number} {words[number]!r}" for number in beyond[:NAMES_SHOWN])
        more = ", ..." if len(beyond) > NAMES_SHOWN else ""
        told.append(f"{len(beyond)} tokens have no row in the embedding, which has {rows}: {shown}{more}")
    for kind, places in tokenizer.special.items():
        for place, numbers in places.items():
            told += [
                f"{place}: {kind}_token_id {number} has no row in the embedding, which has {rows}"
                for number in numbers
                if not 0 <= number < rows and number not in beyond
            ]
    return told


def _sizes(rows: int | None, vocab_size: int | None) -> list[str]:
    if rows is None or vocab_size is None or rows == vocab_size:
        return []
    return [f"config.json says vocab_size {vocab_size}; the embedding has {rows} rows"]


def _shared_ids(tokenizer: TokenizerFiles) -> list[str]:
    words: dict[int, str] = {}
    for text, number in tokenizer.ids.items():
        if number in words:
            return [f"tokens {words[number]!r} and {text!r} of tokenizer.json share id {number}"]
        words[number] = text
    return []


def _disagreeing(tokenizer: TokenizerFiles) -> list[str]:
    """tokenizer.json and tokenizer_config.json of different models: the usual sign of a folder put together by hand."""
    words = {number: text for text, number in tokenizer.ids.items()}
    wrong = [
        f"id {number} is {token.text!r} in tokenizer_config.json and {words[number]!r} in tokenizer.json"
        for number, token in sorted(tokenizer.declared.items())
        if number in words and words[number] != token.text
    ]
    moved = [
        f"{token.text!r} is id {number} in tokenizer_config.json and id {tokenizer.ids[token.text]} in tokenizer.json"
        for number, token in sorted(tokenizer.declared.items())
        if number not in words and token.text in tokenizer.ids
    ]
    return [*wrong, *moved][:NAMES_SHOWN]


WHY_HARMLESS = {
    "bos": "a chat template writes its own beginning",
    "eos": "engine and trainer stop at any of them",
    "pad": "what is padded is left out by place",
    "unk": "nothing generates it",
}


def _differing(tokenizer: TokenizerFiles, kind: str) -> str:
    places = {place: numbers for place, numbers in tokenizer.special[kind].items() if numbers}
    if len(set(places.values())) < 2:
        return ""
    said = ", ".join(f"{' and '.join(map(str, numbers))} in {place}" for place, numbers in places.items())
    return f"{kind} is {said}: harmless, {WHY_HARMLESS[kind]}"


def _of_tokenizer(places: Mapping[str, Ids]) -> Ids:
    return places.get("tokenizer_config.json") or next((ids for ids in places.values() if ids), ())


def _special(folder: Path, ids: Mapping[str, int], named: Mapping[str, str]) -> dict[str, dict[str, Ids]]:
    """By kind and file; empty where the file names none."""
    base, generation = read_base_config(folder), _json(folder / "generation_config.json", missing_ok=True)
    return {
        kind: {
            "config.json": _numbers(base.get(f"{kind}_token_id")),
            "generation_config.json": _numbers(generation.get(f"{kind}_token_id")),
            "tokenizer_config.json": (ids[name],) if name in ids else (),
        }
        for kind, name in named.items()
    }


def _numbers(value: Any) -> Ids:
    """Of one id or several; -1 is an old way to say none."""
    listed = value if isinstance(value, list) else [value]
    return tuple(sorted(number for number in listed if type(number) is int and number >= 0))


def _name(value: Any) -> str:
    """A token's text: plain, or as an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _declared(folder: Path, listed: Any) -> dict[int, AddedToken]:
    try:
        return {int(n): AddedToken(one["content"], bool(one.get("special"))) for n, one in listed.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenizerUnfit(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is broken: {error}") from error


def _vocabulary(listed: Any) -> dict[str, int]:
    """{token: id}, or a unigram model's [[token, score], ...]."""
    if isinstance(listed, dict):
        return {str(text): int(number) for text, number in listed.items()}
    return {str(text): number for number, (text, _) in enumerate(listed)}


def _json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TokenizerUnfit(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise TokenizerUnfit(f"{path} is not an object")
    return found
