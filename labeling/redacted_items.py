"""Review items against today's redaction settings: before their tasks go out, and when a labeller's text comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import structlog
from sqlalchemy import update
from sqlmodel import col

from labeling.database import Database
from labeling.labeling_screen import Opinion
from labeling.name_recogniser import NamesNotRead
from labeling.redaction.redactor import redactor
from labeling.settings import RedactionSettings
from labeling.tables import ItemState, ReviewItem

log = structlog.get_logger(__name__)
_TEXTS = ("messages", "answer", "prefilled", "other_answer", "reasons", "redacted")


async def bring_up_to_date(
    database: Database, items: Sequence[ReviewItem], settings: RedactionSettings
) -> list[ReviewItem]:
    """Items folded before redaction was on, or before a pattern was added, are redacted now, here and in the database.

    What the present settings have replaced already they leave as it is. Gives those that may be shown: all but the
    ones whose names can't be recognised now.
    """
    changed, fit = await asyncio.to_thread(_redact_all, items, settings)
    for item in changed:
        texts = {name: getattr(item, name) for name in _TEXTS}
        async with database.write() as session:
            open_still = (col(ReviewItem.id) == item.id) & (col(ReviewItem.state) == ItemState.OPEN)
            await session.execute(update(ReviewItem).where(open_still).values(**texts))
    return fit


def _redact_all(items: Sequence[ReviewItem], settings: RedactionSettings) -> tuple[list[ReviewItem], list[ReviewItem]]:
    changed, fit = [], []
    for item in items:
        try:
            if _redact(item, settings):
                changed.append(item)
            fit.append(item)
        except NamesNotRead as error:
            log.warning("names_not_recognised", project=item.project, item=item.id, reason=str(error))
    return changed, fit


def _redact(item: ReviewItem, settings: RedactionSettings) -> bool:
    """Whether anything was left to replace."""
    others = [item.prefilled or "", item.other_answer or "", *item.reasons]
    redacted = redactor(settings).open().exchange(item.messages, item.answer, others)
    if not redacted.counts:
        return False
    prefilled, other_answer, *reasons = redacted.others
    item.messages, item.answer, item.prefilled = redacted.messages, redacted.answer, prefilled or None
    item.other_answer = None if item.other_answer is None else other_answer
    item.reasons = list(reasons)
    item.redacted = {
        kind: item.redacted.get(kind, 0) + redacted.counts.get(kind, 0) for kind in {*item.redacted, *redacted.counts}
    }
    return True


def redacted_opinions(
    said: Mapping[int, tuple[ReviewItem, Opinion]], settings: RedactionSettings
) -> dict[int, Opinion]:
    """Less those whose names can't be recognised now. `said`: by annotation."""
    found = {}
    for annotation, (item, opinion) in said.items():
        try:
            # A gold question and its right answer are the operator's own words.
            found[annotation] = redacted_opinion(opinion, item, settings) if item.gold_id is None else opinion
        except NamesNotRead as error:
            log.warning("names_not_recognised", project=item.project, annotation=annotation, reason=str(error))
    return found


def redacted_opinion(opinion: Opinion, item: ReviewItem, settings: RedactionSettings) -> Opinion:
    """What a labeller wrote; the placeholders that the item showed keep their meaning, new values get new ones."""
    redaction = redactor(settings).open(item.messages, item.answer, item.prefilled, item.other_answer)
    redacted = redaction.exchange([], opinion.correction or "", opinion.must_contain)
    return Opinion(opinion.verdict, redacted.answer or None, tuple(redacted.others))
