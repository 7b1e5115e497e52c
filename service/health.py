"""Whether this process can work: the database, every replica, and the checks that its composition adds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass

from sqlalchemy import text

from labeling.database import Database
from labeling.errors import NightschoolError, Unavailable

TIMEOUT_SECONDS = 3.0

# Returns a word on what it found; raises a NightschoolError with the cure when its system is down.
Check = Callable[[], Awaitable[str]]


class CheckTimedOut(Unavailable):
    code = "check_timed_out"


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Readiness:
    ready: bool
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, object]:
        return {"ready": self.ready, "checks": [asdict(finding) for finding in self.findings]}


async def readiness(database: Check, replicas: Mapping[str, Check], others: Mapping[str, Check]) -> Readiness:
    """Ready with the database and one replica; the others are told, and stop nothing that is served."""
    checks = {"database": database, **replicas, **others}
    found = await asyncio.gather(*(_run(name, check) for name, check in checks.items()))
    ok = {finding.name for finding in found if finding.ok}
    return Readiness("database" in ok and any(name in ok for name in replicas), tuple(found))


def database_check(database: Database) -> Check:
    async def check() -> str:
        async with database.read() as session:
            await session.execute(text("SELECT 1"))
        return "answers"

    return check


async def _run(name: str, check: Check) -> Finding:
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return Finding(name, True, await check())
    except TimeoutError:
        return _down(name, CheckTimedOut(f"no answer within {TIMEOUT_SECONDS:g} s"))
    except NightschoolError as error:
        return _down(name, error)


def _down(name: str, error: NightschoolError) -> Finding:
    return Finding(name, False, str(error), error.hint)
