"""Who reported: told apart within a project, and known to nobody. Only the pseudonym is ever stored.

It is a keyed hash under the project's salt. The salt is a row, because several processes share one database; deleting
that row makes every pseudonym of the project meaningless for good.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable

from sqlmodel import col, select

from labeling.database import Database, insert_or_nothing
from labeling.tables import ReporterSalt

PREFIX = "rp_"


class Reporters:
    """`load` comes first; after it nothing here needs the database."""

    def __init__(self) -> None:
        self._salts: dict[str, bytes] = {}

    async def load(self, database: Database, projects: Iterable[str]) -> None:
        """Makes the salts that are missing; of two processes that do so at once, the first one's stands."""
        names = sorted(set(projects))
        async with database.write() as session:
            made = [ReporterSalt(project=name, salt=secrets.token_hex(32)) for name in names]
            if made:
                await session.execute(insert_or_nothing(session, *made))
            rows = await session.execute(select(ReporterSalt).where(col(ReporterSalt.project).in_(names)))
            self._salts = {row.project: bytes.fromhex(row.salt) for row in rows.scalars()}

    def pseudonym(self, project: str, reporter: str | None) -> str | None:
        """The same for the same reporter of one project; of two projects, never."""
        if reporter is None:
            return None
        digest = hmac.new(self._salts[project], reporter.encode(), hashlib.sha256)
        return PREFIX + digest.hexdigest()[:32]
