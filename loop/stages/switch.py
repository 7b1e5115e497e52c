"""The alias moves: one transaction in our own table, then the gateway, then MLflow's aliases, which only follow."""

from __future__ import annotations

from loop.outputs import Registered, Switched
from loop.serving import follow, switch_to
from loop.stage import StageContext
from loop.stages.probe import NoEvidence
from loop.tables import Evidence


async def run(context: StageContext) -> Switched:
    """ServedMeanwhile when what serves is no longer what the evidence compared with."""
    approval = context.approval
    assert approval is not None, "a promotion starts with an approval"
    clients, project = context.clients, context.project
    async with clients.database.read() as session:
        evidence = await session.get(Evidence, context.night_id)
    if evidence is None:
        raise NoEvidence(f"night {context.night_id} has no evidence")
    promotion = await switch_to(
        clients,
        project,
        context.take(Registered).adapter,
        expected=evidence.current,
        by=approval.by,
        why=approval.why,
        night_id=context.night_id,
        promotes=True,
    )
    await follow(clients, project)
    return Switched(from_adapter=promotion.from_adapter, to_adapter=promotion.to_adapter, promotion_id=promotion.id)
