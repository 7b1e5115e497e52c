"""`python -m loop.trainers.audit SPEC`: the tokenizer at work, before anything is trained on what it makes of the rows.

Uses the trainer's own functions, in the trainer's own environment; writes `audit.json` beside the spec.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from labeling.errors import InvalidInput
from loop.base_weights import read_weights
from loop.digests import write_durably
from loop.preflight.child_results import Audit, Rendered, audit_path
from loop.trainers.child import live, load_tokenizer, stop_ids
from loop.trainers.preference_rows import preference_rows
from loop.trainers.progress import Channel
from loop.trainers.rows import Example, UnfitTemplate, tokenise
from loop.trainers.spec import Row, TrainSpec, read_rows

ROWS_AUDITED = 2000  # spread over all: the trainer itself looks at each
ROWS_RENDERED = 3  # that engines must repeat
ROWS_NAMED = 3
BATCHES_LOOKED_AT = 64
HELLO = {"role": "user", "content": "Hello, what is 12 + 30?"}
PROBES: tuple[tuple[tuple[dict[str, str], ...], bool], ...] = (
    ((HELLO,), False),
    ((HELLO, {"role": "assistant", "content": "42. Also «naïve» — 日本\n\n- one"}), True),
    (({"role": "system", "content": "Be brief."}, HELLO), False),
    ((HELLO, {"role": "assistant", "content": "42."}, {"role": "user", "content": "Sure?"}), False),
)

Trained = Callable[[Sequence[Example], int], list[list[int]]]


class EndNotLearnt(InvalidInput):
    code = "end_not_learnt"
    default_hint = "The model would never stop: use a template that ends answers with a token at which vLLM stops."


class TokensBeyondEmbedding(InvalidInput):
    code = "tokens_beyond_embedding"
    default_hint = "Take the tokenizer that came with these weights: `nightschool model fetch`."


def main() -> int:
    return live("Audit the tokenizer that a spec would train with.", audit)


def audit(spec: TrainSpec, folder: Path, channel: Channel) -> None:
    tokenizer = load_tokenizer(spec)
    if not tokenizer.chat_template:
        raise UnfitTemplate(
            f"the tokenizer of {spec.base_dir} has no chat template",
            hint="Name a Jinja file in projects.chat_template, the one that your apps' vLLM uses.",
        )
    stops = stop_ids(spec.base_dir, tokenizer)
    within_embedding(tokenizer, stops, read_weights(spec.base_dir).embedding_rows)
    rows = _spread(_rows(spec))
    whole = [same_bytes(row, tokenizer) for row in rows]
    examples = list(tokenise(rows, tokenizer, stops, spec.lengths.max_length))
    end_is_learnt(examples, stops, tokenizer.pad_token_id or 0, trained_tokens)
    found = Audit(
        rows=len(rows),
        stop_ids=tuple(sorted(stops)),
        rendered=tuple(rendered(tokenizer, rows)),
        differences=tuple(_trimmed(whole)),
        warnings=tuple(_special_texts(rows, tokenizer)),
    )
    write_durably(audit_path(folder), found.model_dump_json(indent=1).encode())


def _rows(spec: TrainSpec) -> list[Row]:
    """All that is trained on: labels and replay, pairs from both sides, thumbs."""
    rows = read_rows(spec.data_dir, may_be_none=spec.method != "sft")
    if spec.method != "sft":
        rows += preference_rows(spec.data_dir)
    return rows


def within_embedding(tokenizer: Any, stops: frozenset[int], embedding_rows: int | None) -> None:
    """Of the tokenizer as it was loaded: transformers adds tokens that only tokenizer_config.json names."""
    if embedding_rows is None:
        return
    beyond = {text: number for text, number in tokenizer.get_vocab().items() if number >= embedding_rows}
    if beyond:
        shown = ", ".join(f"{text!r} ({number})" for text, number in sorted(beyond.items(), key=lambda one: one[1])[:3])
        raise TokensBeyondEmbedding(
            f"{len(beyond)} of {len(tokenizer)} tokens have no row in the embedding of {embedding_rows}: {shown}"
        )
    ids = stops | {tokenizer.pad_token_id, tokenizer.bos_token_id} - {None}
    if odd := [number for number in ids if not 0 <= number < embedding_rows]:
        raise TokensBeyondEmbedding(f"special id {odd[0]} has no row in the embedding of {embedding_rows}")


def same_bytes(row: Row, tokenizer: Any) -> bool:
    """UnfitTemplate unless prompt + answer, byte for byte, are the beginning of the conversation as it is rendered.

    False where the template trims the answer, which some do.
    """
    messages = [message.model_dump() for message in row.messages]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
    answer = row.messages[-1].content
    if not whole.startswith(prompt):
        place = next((n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
        raise UnfitTemplate(
            f"row {row.id}: the template renders an answered prompt otherwise, from character {place} on: "
            f"{prompt[place : place + 40]!r} becomes {whole[place : place + 40]!r}"
        )
    if whole[len(prompt) :].startswith(answer):
        return True
    if not whole[len(prompt) :].startswith(answer.strip()):
        raise UnfitTemplate(
            f"row {row.id}: the template changes the answer {answer[:40]!r} into "
            f"{whole[len(prompt) : len(prompt) + 40]!r}"
        )
    return False


def end_is_learnt(examples: Sequence[Example], stops: frozenset[int], pad_id: int, trained: Trained) -> None:
    """The loss is on each answer, whole and alone, and its last token ends it: also where padding is the same token."""
    if not stops:
        raise EndNotLearnt("no file of the base names a token that ends an answer")
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    for one in by_length[:: max(1, len(by_length) // BATCHES_LOOKED_AT)]:
        pair = (one, by_length[-1])  # padded as much as any can be
        for example, tokens in zip(pair, trained(pair, pad_id), strict=True):
            answer = list(example.tokens[example.answer_start :])
            if answer[-1] not in stops or tokens[: len(answer)] != answer:
                raise EndNotLearnt(
                    f"row {example.id}: the loss leaves out tokens of the answer, or its end ({answer[-1]})"
                )
            if len(tokens) > len(answer):
                raise EndNotLearnt(f"row {example.id}: the loss covers padding behind the answer")


def trained_tokens(examples: Sequence[Example], pad_id: int) -> list[list[int]]:
    """Of each row the tokens that the trainer's own batch puts the loss on."""
    from loop.trainers.batches import Batches

    (part,) = Batches(examples, pad_id, hold=False)(range(len(examples)))
    row_of = part.at // part.input_ids.shape[1]
    return [part.targets[row_of == row].tolist() for row in range(len(examples))]


def rendered(tokenizer: Any, rows: Sequence[Row]) -> list[Rendered]:
    """Fixed conversations, less those that the template refuses (some know no system role), and some of the night's."""
    found = []
    own = [(tuple(message.model_dump() for message in row.messages), True) for row in rows[:ROWS_RENDERED]]
    for messages, answered in (*PROBES, *own):
        try:
            tokens = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=not answered, tokenize=True, return_dict=True
            )["input_ids"]
        except Exception:  # noqa: BLE001, S112 - a template raises what it likes
            continue
        found.append(Rendered(messages=messages, answered=answered, tokens=tuple(tokens)))
    return found


def _spread(rows: list[Row]) -> list[Row]:
    return rows[:: max(1, -(-len(rows) // ROWS_AUDITED))]


def _trimmed(whole: Sequence[bool]) -> list[str]:
    trimmed = whole.count(False)
    return [f"the template trims spaces around {trimmed} of {len(whole)} answers"] if trimmed else []


def _special_texts(rows: Sequence[Row], tokenizer: Any) -> list[str]:
    """Text that becomes a control token: an answer with <|im_end|> in it would teach the model to stop there."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = [text for text in {*tokenizer.all_special_tokens, *added} if text.strip()]
    hits = {
        row.id: text for row in rows for text in special if any(text in message.content for message in row.messages)
    }
    if not hits:
        return []
    named = ", ".join(f"{name} ({text})" for name, text in list(hits.items())[:ROWS_NAMED])
    return [f"{len(hits)} rows hold the text of a control token, which trains as that token: {named}"]


if __name__ == "__main__":
    sys.exit(main())
