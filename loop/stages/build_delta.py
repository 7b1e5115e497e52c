"""New labels, older ones and the base's own answers become training rows; the exam items are set apart from them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

from pydantic import ValidationError

from labeling.answers import calls_tools
from labeling.database import insert_or_nothing
from labeling.redaction.redactor import redactor
from labeling.settings import RedactionSettings
from labeling.tables import GoodAnswer
from loop import training_examples as examples
from loop.adapter_files import base_digest
from loop.base_answers import base_answers
from loop.chat_template import answering_digest
from loop.contamination import clean, suite_items
from loop.digests import digest_folder, write_jsonl
from loop.outputs import Delta, SyncedLabels
from loop.scoring import ExamItem, held_out_items
from loop.stage import NightEnds, StageContext
from loop.tables import LabelUse, NightState
from loop.trainers.rows import rows_drawn
from loop.trainers.spec import Row
from loop.vllm import Replica


async def run(context: StageContext) -> Delta:
    project, clients = context.project, context.clients
    async with clients.database.read() as session:
        chosen = await examples.choose_labels(
            session, project.name, project.replay.max_rows, project.labeling.annotators.share_of_delta
        )
        good = await examples.good_answers(session, project.name, project.gate.good_answers)
    before = len(chosen.trained) + len(chosen.held_out) + len(good)
    chosen, good = await asyncio.to_thread(_redacted, chosen, good, project.labeling.redaction)
    unread = _unread(before - len(chosen.trained) - len(chosen.held_out) - len(good))
    synced = context.take(SyncedLabels).notes
    _enough(len(chosen.new), chosen, project.min_labels, synced)
    replica = clients.replicas[0]
    answers = await base_answers(
        replica,
        project.base_name,
        answering_digest(project, base_digest(project.base_dir)),
        project.replay,
        context.data_dir,
        whole=project.trainer.replay_loss == "ce",
        wanted=rows_drawn(project.trainer, len(chosen.trained))[1],
    )
    rows = [examples.label_row(label) for label in chosen.trained] + examples.base_rows(answers)
    held_out = [examples.label_item(label) for label in chosen.held_out]
    good_items = [examples.good_answer_item(answer) for answer in good]
    cleaned = clean(rows, held_out + _held_out_file(context), good_items + suite_items(project.gate))
    fit, unfit = trainable(cleaned.kept)
    kept, too_long = await _short_enough(replica, project.base_name, fit, project.trainer.max_length)
    kept_ids = {row["id"] for row in kept}
    new = sum(label.id in kept_ids for label in chosen.new)
    _enough(new, chosen, project.min_labels, (*synced, *cleaned.dropped, *too_long, *unfit))
    trained = [label for label in chosen.trained if label.id in kept_ids]
    _write(context, kept, [examples.label_item(label) for label in trained], held_out, good_items)
    await _record_use(context, chosen, kept_ids)
    return Delta(
        data_dir=str(context.folder),
        digest=digest_folder(context.folder),
        label_ids=tuple(label.id for label in trained),
        label_rows=new,
        replay_rows=len(trained) - new,
        base_rows=sum(row["kind"] == "replay" for row in kept),
        held_out_items=len(held_out),
        notes=(*synced, *unread, *cleaned.dropped, *too_long, *unfit, *_held_back(chosen)),
    )


def _redacted(
    chosen: examples.ChosenLabels, good: list[GoodAnswer], settings: RedactionSettings
) -> tuple[examples.ChosenLabels, list[GoodAnswer]]:
    """What is trained on, examined and archived; changes nothing that was redacted by the same settings before."""
    by = redactor(settings)
    new, replay, held_out = (
        examples.redacted_labels(labels, by) for labels in (chosen.new, chosen.replay, chosen.held_out)
    )
    return replace(chosen, new=new, replay=replay, held_out=held_out), examples.redacted_good_answers(good, by)


def _unread(rows: int) -> tuple[str, ...]:
    return (f"{rows} labels and good answers left out: their names could not be recognised",) if rows else ()


def _enough(have: int, chosen: examples.ChosenLabels, needed: int, left_out: tuple[str, ...] = ()) -> None:
    """Counted again once the unfit are out: a night on what is left would be worth nothing."""
    if have >= needed:
        return
    held = f" ({len(chosen.held_back)} more are held back after a rejected night)" if chosen.held_back else ""
    if chosen.above_share:
        held += f" ({len(chosen.above_share)} more wait: one person alone gave them, beyond labeling.annotators)"
    reasons = f". {'; '.join(left_out[:5])}" if left_out else ""
    raise NightEnds(
        NightState.SKIPPED,
        f"{have} new labels{held}; {needed} are needed: {needed - have} more{reasons}",
        "Label more items, lower `min_labels`, or confirm held labels with `nightschool labels confirm`.",
    )


def _held_back(chosen: examples.ChosenLabels) -> tuple[str, ...]:
    held, above = len(chosen.held_back), len(chosen.above_share)
    notes = (
        held and f"{held} labels of a rejected night are held back until a person confirms them",
        above and f"{above} labels wait: one person alone gave them, beyond their share of a night",
    )
    return tuple(note for note in notes if note)


def _held_out_file(context: StageContext) -> list[ExamItem]:
    path = context.project.gate.held_out_file
    return held_out_items(path) if path else []


def _write(
    context: StageContext,
    rows: list[examples.Row],
    trained: list[ExamItem],
    held_out: list[ExamItem],
    good: list[ExamItem],
) -> None:
    write_jsonl(context.folder / "train.jsonl", rows)
    for name, items in (("trained", trained), ("held_out", held_out), ("good_answers", good)):
        write_jsonl(context.folder / f"{name}.jsonl", [json.loads(item.model_dump_json()) for item in items])


async def _short_enough(
    replica: Replica, base_name: str, rows: list[examples.Row], max_length: int
) -> tuple[list[examples.Row], tuple[str, ...]]:
    """Counts tokens with the engine's own template; a row that is too long is left out and named, never cut."""
    lengths = await replica.count_tokens(base_name, [row["messages"] for row in rows])
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= max_length]
    notes = tuple(
        f"{row['id']} left out: {length} tokens, more than max_length {max_length}"
        for row, length in zip(rows, lengths, strict=True)
        if length > max_length
    )
    return kept, notes


def trainable(rows: list[examples.Row]) -> tuple[list[examples.Row], tuple[str, ...]]:
    """One conversation that the trainer can't take (pictures, tool calls) is left out and named: it stops no night."""
    kept, unfit = [], []
    for row in rows:
        if calls_tools(row["messages"][-1]["content"]):
            # As a text they would teach the model to write calls instead of making them.
            unfit.append(f"{row['id']} left out of training: its right answer calls tools, which no row can hold")
            continue
        try:
            Row.model_validate(row)
        except ValidationError as error:
            problem = error.errors()[0]
            unfit.append(f"{row['id']} left out of training: {'.'.join(map(str, problem['loc']))}: {problem['msg']}")
        else:
            kept.append(row)
    return kept, tuple(unfit)


async def _record_use(context: StageContext, chosen: examples.ChosenLabels, kept: set[str]) -> None:
    uses = [
        LabelUse(night_id=context.night_id, label_id=label.id, item_id=label.item_id, role=role)
        for role, labels in (("new", chosen.new), ("replay", chosen.replay), ("held_out", chosen.held_out))
        for label in labels
        if role == "held_out" or label.id in kept
    ]
    async with context.clients.database.write() as session:
        await session.execute(insert_or_nothing(session, *uses))
