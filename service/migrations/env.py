"""Run by Alembic; the connection comes from `service.migrations`."""

from __future__ import annotations

from alembic import context
from sqlmodel import SQLModel

import labeling.tables
import loop.tables
import service.tables

# Imported for what they register in SQLModel's metadata.
TABLES = (labeling.tables, loop.tables, service.tables)

connection = context.config.attributes.get("connection")
assert connection is not None, "use service.migrations.upgrade(url)"
context.configure(connection=connection, target_metadata=SQLModel.metadata, render_as_batch=True, compare_type=True)
with context.begin_transaction():
    context.run_migrations()
