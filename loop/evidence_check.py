"""Whether a night's candidate may be promoted: evidence of these very bytes, passed, against what serves now."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

from sqlalchemy.ext.asyncio import AsyncSession

from labeling.database import now
from labeling.errors import NotFound, Refused
from loop.evidence import is_genuine
from loop.settings import ApprovalSettings
from loop.tables import Adapter, Evidence, Night, NightState, Serving

PROMOTABLE = (NightState.AWAITING_APPROVAL, NightState.ROLLED_BACK)


class NotPromotable(Refused):
    code: ClassVar[str] = "not_promotable"
    default_hint = "What serves stays. `nightschool night show` tells what the night decided and what can be done."


class NoSuchNight(NotFound):
    code: ClassVar[str] = "unknown_night"
    default_hint = "`nightschool night show` without an id shows the newest."


async def require_promotable(session: AsyncSession, night_id: str) -> Evidence:
    """NotPromotable with the first thing that is wrong; call it in the transaction that moves the night."""
    night = await session.get(Night, night_id)
    if night is None:
        raise NoSuchNight(f"no night {night_id!r}")
    if night.state not in PROMOTABLE:
        raise NotPromotable(f"night {night.id} is {night.state}: only one that awaits approval can be promoted")
    evidence = await session.get(Evidence, night.id)
    if evidence is None:
        raise NotPromotable(f"night {night.id} has no evidence")
    if not evidence.passed:
        raise NotPromotable(f"{evidence.adapter} did not pass the gate: {evidence.decision}")
    if not is_genuine(evidence):
        raise NotPromotable(f"the evidence of night {night.id} is not what was measured: its hash does not match")
    adapter = await session.get(Adapter, evidence.adapter)
    if adapter is None or adapter.digest != evidence.adapter_digest:
        raise NotPromotable(f"{evidence.adapter} is not the adapter that was examined")
    if stale := await why_stale(session, night, evidence):
        raise NotPromotable(f"{evidence.adapter} was {stale}", hint="Run a new night: it compares with what serves.")
    return evidence


async def why_stale(session: AsyncSession, night: Night, evidence: Evidence) -> str | None:
    """Evidence against what serves no more says nothing about what would be lost now."""
    serving = await session.get(Serving, night.project)
    current = serving.current if serving else "nothing"
    if current == evidence.current:
        return None
    return f"examined against {evidence.current}, but {current} serves now"


def why_too_old(evidence: Evidence, approval: ApprovalSettings) -> str | None:
    if now() - evidence.created_at <= timedelta(hours=approval.expires_hours):
        return None
    return f"nobody decided within {approval.expires_hours:g} hours"
