"""The newest feedback folded, tasks pushed, annotations pulled: the night sees what people wrote until now."""

from __future__ import annotations

from sqlalchemy import func
from sqlmodel import col, select

from labeling.feedback import fold
from labeling.label_studio_http import LabelStudioUnavailable
from labeling.pull import pull
from labeling.push import push
from labeling.tables import Label, LabelState
from loop.outputs import SyncedLabels
from loop.stage import StageContext
from loop.training_examples import choose_labels


async def run(context: StageContext) -> SyncedLabels:
    clients, project = context.clients, context.project
    await fold(clients.database, project.name, project.labeling)
    notes: tuple[str, ...] = ()
    try:
        await push(clients.database, clients.label_studio, project.name, project.labeling)
        await pull(clients.database, clients.label_studio, project.name, project.labeling, sweep=True)
    except LabelStudioUnavailable as error:
        context.log.warning("label_studio_down", reason=str(error), consequence="labels as they came back before")
        notes = (f"Label Studio could not be read ({error}): only labels that had come back before count",)
    async with clients.database.read() as session:
        counts = dict(
            (
                await session.execute(
                    select(col(Label.state), func.count())
                    .where(col(Label.project) == project.name)
                    .group_by(col(Label.state))
                )
            ).all()
        )
        chosen = await choose_labels(
            session, project.name, project.replay.max_rows, project.labeling.annotators.share_of_delta
        )
    return SyncedLabels(
        accepted=counts.get(LabelState.ACCEPTED, 0),
        disputed=counts.get(LabelState.DISPUTED, 0),
        refused=counts.get(LabelState.REFUSED, 0),
        not_in_current=len(chosen.new),
        notes=notes,
    )
