"""Every replica must repeat the log-probabilities that the gate saw: the adapter is there, whole, and the right one."""

from __future__ import annotations

from typing import ClassVar

from labeling.errors import Refused
from loop.outputs import Probed, Registered
from loop.probe import Probe, verify_probe
from loop.stage import StageContext
from loop.tables import Evidence


class NoEvidence(Refused):
    code: ClassVar[str] = "no_evidence"
    default_hint = "Resume the night: `nightschool night run --resume`."


async def run(context: StageContext) -> Probed:
    adapter = context.take(Registered).adapter
    async with context.clients.database.read() as session:
        evidence = await session.get(Evidence, context.night_id)
    if evidence is None or evidence.adapter != adapter:
        raise NoEvidence(f"night {context.night_id} has no evidence for {adapter}")
    probe = Probe.model_validate(evidence.probe)
    differences = {}
    for replica in context.clients.replicas:
        context.progress({"doing": f"probing {adapter} on {replica.url}"})
        differences[replica.url] = await verify_probe(replica, adapter, probe)
    return Probed(largest_difference=differences)
