"""New labels, older ones and the base's own answers become training rows; the exam items are set apart from them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Container, Mapping, Sequence

from labeling.database import insert_or_nothing
from loop import preference_examples as preferences
from loop import training_examples as examples
from loop.adapter_files import base_digest
from loop.base_answers import base_answers
from loop.chat_template import answering_digest
from loop.contamination import clean, suite_items
from loop.delta_sources import Sources, on_hand, read_sources, redacted
from loop.digests import digest_folder, write_jsonl
from loop.fitting_rows import short_enough, short_pairs, trainable
from loop.gate_families import EARLIER
from loop.methods import (
    NEEDS_PAIRS,
    Choice,
    Method,
    Needed,
    OnHand,
    TooFew,
    choose,
    shortage,
    shows_answers,
)
from loop.outputs import Delta, SyncedLabels
from loop.preference_examples import Thumbs
from loop.scoring import ExamItem, held_out_items
from loop.settings import ProjectSettings
from loop.stage import NightEnds, StageContext
from loop.tables import LabelUse, NightState
from loop.trainers.preference_rows import PreferenceDraws, write_preferences
from loop.trainers.rows import rows_drawn


async def run(context: StageContext) -> Delta:
    project, clients = context.project, context.clients
    found = await read_sources(context)
    sources = await asyncio.to_thread(redacted, found, project.labeling.redaction)
    unread = _unread(len(found) - len(sources))
    synced = context.take(SyncedLabels).notes
    choice = _choose(project, sources, synced)
    sources = sources.for_method(choice.method, project.gate.good_answers)
    chosen, thumbs = sources.chosen, sources.thumbs
    pairs, unfit_pairs = preferences.pairs_of(chosen.trained) if choice.method in NEEDS_PAIRS else ([], ())
    replica = clients.replicas[0]
    answers = await base_answers(
        replica,
        project.base_name,
        answering_digest(project, await asyncio.to_thread(base_digest, project.base_dir)),
        project.replay,
        context.data_dir,
        whole=project.trainer.replay_loss == "ce",
        wanted=_replay_wanted(project, choice.method, len(chosen.trained), max(len(pairs), len(thumbs.rated))),
    )
    held_out = [examples.label_item(label) for label in chosen.held_out]
    good_items = [examples.good_answer_item(answer) for answer in sources.good]
    rows = [examples.label_row(label) for label in chosen.trained] + preferences.thumb_rows(thumbs)
    cleaned = clean(
        rows + examples.base_rows(answers), held_out + _held_out_file(context), good_items + suite_items(project.gate)
    )
    fit, unfit = trainable(cleaned.kept)
    kept, too_long = await short_enough(replica, project.base_name, fit, project.trainer.max_length)
    kept_ids = {row["id"] for row in kept}
    pairs = [pair for pair in pairs if preferences.label_of(pair) in kept_ids]
    pairs, long_pairs = await short_pairs(replica, project.base_name, pairs, project.trainer.max_length)
    left_out = (*cleaned.dropped, *too_long, *unfit, *unfit_pairs, *long_pairs)
    _still_enough(choice.method, project, on_hand(sources, pairs, kept_ids), chosen, (*synced, *left_out))
    new = sum(label.id in kept_ids for label in chosen.new)
    trained = [label for label in chosen.trained if label.id in kept_ids]
    bad = [item for item in thumbs.bad if item.id in kept_ids]
    exam = {**_flagged(chosen, thumbs, kept_ids), "held_out": held_out, "good_answers": good_items}
    made = preferences.as_thumbs(kept, thumbs)
    _write(context, [row for row in kept if row["id"] not in thumbs.ids], exam)
    write_preferences(context.folder, pairs, made)
    await _record_use(context, chosen, thumbs, kept_ids)
    return Delta(
        data_dir=str(context.folder),
        digest=digest_folder(context.folder),
        label_ids=tuple(label.id for label in trained),
        label_rows=new,
        replay_rows=len(trained) - new,
        base_rows=sum(row["kind"] == "replay" for row in kept),
        held_out_items=len(held_out),
        notes=(*synced, *unread, *left_out, *_held_back(chosen)),
        method=choice.method,
        method_why=choice.why,
        pairs=len(pairs),
        good_thumbs=len(made) - len(bad),
        bad_thumbs=len(bad),
    )


def _unread(rows: int) -> tuple[str, ...]:
    return (f"{rows} labels and rated answers left out: their names could not be recognised",) if rows else ()


def _choose(project: ProjectSettings, sources: Sources, synced: tuple[str, ...]) -> Choice:
    pairs, _ = preferences.pairs_of(sources.chosen.new)
    choice = choose(project.trainer.method, on_hand(sources, pairs), _needed(project))
    if isinstance(choice, TooFew):
        raise _skipped(choice, sources.chosen, synced)
    return choice


def _still_enough(
    method: Method, project: ProjectSettings, have: OnHand, chosen: examples.ChosenLabels, left_out: tuple[str, ...]
) -> None:
    """Counted again once the unfit are out: a night on what is left would be worth nothing."""
    if (missing := shortage(method, have, _needed(project))) is not None:
        raise _skipped(missing, chosen, left_out)


def _needed(project: ProjectSettings) -> Needed:
    return Needed(labels=project.min_labels, thumbs=project.trainer.min_thumbs)


def _skipped(few: TooFew, chosen: examples.ChosenLabels, left_out: tuple[str, ...]) -> NightEnds:
    held = f" ({len(chosen.held_back)} more are held back after a rejected night)" if chosen.held_back else ""
    if chosen.above_share:
        held += f" ({len(chosen.above_share)} more wait: one person alone gave them, beyond labeling.annotators)"
    reasons = f". {'; '.join(left_out[:5])}" if left_out else ""
    return NightEnds(NightState.SKIPPED, f"{few.reason}{held}{reasons}", few.hint)


def _replay_wanted(project: ProjectSettings, method: Method, labels: int, units: int) -> int:
    """The base's answers that the hungrier phase draws."""
    recipe = project.trainer
    supervised = rows_drawn(recipe, labels)[1] if shows_answers(method, corrections=labels > 0) else 0
    preferring = rows_drawn(PreferenceDraws.of(recipe), units)[1] if method != "sft" else 0
    return max(supervised, preferring)


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


def _flagged(chosen: examples.ChosenLabels, thumbs: Thumbs, kept: Container[str]) -> dict[str, list[ExamItem]]:
    """What was complained of: what this night is to mend, and what the serving adapter has mended already."""
    new = [examples.label_item(label) for label in chosen.new if label.id in kept]
    earlier = [examples.label_item(label) for label in chosen.earlier]
    for thumb in thumbs.bad:
        if thumb.id in kept:
            (earlier if thumb.id in thumbs.used else new).append(preferences.thumb_item(thumb))
    return {"trained": new, EARLIER: earlier}


def _write(context: StageContext, rows: list[examples.Row], exam: Mapping[str, Sequence[ExamItem]]) -> None:
    write_jsonl(context.folder / "train.jsonl", rows)
    for name, items in exam.items():
        write_jsonl(context.folder / f"{name}.jsonl", [json.loads(item.model_dump_json()) for item in items])


async def _record_use(
    context: StageContext, chosen: examples.ChosenLabels, thumbs: Thumbs, kept: Container[str]
) -> None:
    uses = [
        LabelUse(night_id=context.night_id, label_id=label.id, item_id=label.item_id, role=role)
        for role, labels in (("new", chosen.new), ("replay", chosen.replay), ("held_out", chosen.held_out))
        for label in labels
        if role == "held_out" or label.id in kept
    ]
    uses += preferences.thumb_uses(context.night_id, thumbs, kept)
    async with context.clients.database.write() as session:
        await session.execute(insert_or_nothing(session, *uses))
