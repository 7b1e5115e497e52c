"""Which errors of a database mean "not now", for callers that then wait and try again."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from labeling.database import DatabaseUnavailable, translated


class DriverError(Exception):
    """As asyncpg's: with the SQLSTATE."""

    def __init__(self, sqlstate: str | None) -> None:
        super().__init__("from the driver")
        self.sqlstate = sqlstate


@pytest.mark.parametrize("state", ["57P03", "53100", "53300", "25006", "08006", "3D000", "28P01", "40P01"])
def test_down_full_or_read_only_is_unavailable(state: str) -> None:
    """SQLAlchemy wraps them as plain DBAPIError, so only the SQLSTATE tells."""
    with pytest.raises(DatabaseUnavailable), translated():
        raise DBAPIError("select 1", {}, DriverError(state))


def test_no_free_connection_is_unavailable() -> None:
    """The pool's own patience ran out."""
    with pytest.raises(DatabaseUnavailable), translated():
        raise PoolTimeout


@pytest.mark.parametrize("state", ["22021", "42P01", None])
def test_a_mistake_of_ours_stays_what_it_is(state: str | None) -> None:
    """Retrying a statement that can't work would hide it."""
    with pytest.raises(DBAPIError), translated():
        raise DBAPIError("select 1", {}, DriverError(state))
    with pytest.raises(IntegrityError), translated():
        raise IntegrityError("insert", {}, DriverError("23505"))
