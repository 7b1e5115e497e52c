"""How far a prompt is from everything labelled: 1 less the cosine to the nearest of the newest labelled prompts.

A bounded sample, held in memory: looking one prompt up costs the same behind a thousand labels and behind a million.
What is older than the sample and asked again was not cured by its label; treating it as new is right.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from sqlmodel import col, select

from labeling.database import Database
from labeling.embeddings import Embedder, Vectors
from labeling.tables import Label, LabelState
from labeling.wording import text_parts

SAMPLE = 4096
READ_AT_ONCE = 256
VECTORS_KEPT = 4096
CHARACTERS = 2000  # of the end of a conversation: what was asked last decides what it is about
OVERLAP = timedelta(seconds=60)  # a label that was slow to commit appears behind the newest one


def asked_text(messages: Sequence[dict[str, Any]]) -> str:
    """What the user said, the last at the end."""
    said = [_text(message.get("content")) for message in messages if message.get("role") == "user"]
    return "\n".join(text for text in said if text)[-CHARACTERS:]


def _text(content: Any) -> str:
    parts = text_parts(content)
    return content if isinstance(content, str) else " ".join(parts or ())


class LabelledIndex:
    """Vectors of labelled prompts, each under the id of its item. Not for two threads at once."""

    def __init__(self, embedder: Embedder, sample: int = SAMPLE) -> None:
        self.embedder = embedder
        self._rows = np.zeros((sample, embedder.dimensions), np.float32)
        self._place: OrderedDict[str, int] = OrderedDict()  # item id -> row, the oldest first
        self._free = list(range(sample))[::-1]  # the lowest is taken first: rows from `_unused` on were never taken
        self._unused = 0
        self._known: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._place

    def add(self, item_ids: Sequence[str], texts: Sequence[str]) -> None:
        for item_id, vector in zip(item_ids, self.vectors(texts), strict=True):
            self.remove(item_id)
            if not self._free:
                _, oldest = self._place.popitem(last=False)
                self._free.append(oldest)
            row = self._free.pop()
            self._unused = max(self._unused, row + 1)
            self._rows[row] = vector
            self._place[item_id] = row

    def remove(self, item_id: str) -> None:
        row = self._place.pop(item_id, None)
        if row is not None:
            self._rows[row] = 0.0  # no cosine but 0 to anything
            self._free.append(row)

    def novelty(self, texts: Sequence[str]) -> list[float]:
        if not texts:
            return []
        if not self._place:
            return [1.0] * len(texts)
        nearest = (self.vectors(texts) @ self._rows[: self._unused].T).max(axis=1)
        return [round(float(value), 4) for value in np.clip(1.0 - nearest, 0.0, 1.0)]

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Kept for a while: the same open items are looked at again and again."""
        missing = list(dict.fromkeys(text for text in texts if text not in self._known))
        fresh = dict(zip(missing, self.embedder.embed(missing), strict=True)) if missing else {}
        found = np.zeros((len(texts), self.embedder.dimensions), np.float32)
        for row, text in enumerate(texts):
            found[row] = self._known[text] if text in self._known else fresh[text]
        self._known.update(fresh)
        while len(self._known) > VECTORS_KEPT:
            self._known.popitem(last=False)
        return found


class LabelledPrompts:
    """One project's index, brought up to its labels at each look."""

    def __init__(self, project: str, embedder: Embedder) -> None:
        self.project = project
        self.index = LabelledIndex(embedder)
        self.changed_at: datetime | None = None  # when the newest label that is known was given, or taken back
        self._seen: dict[str, datetime] = {}  # of the newest labels, by item
        self._lock = asyncio.Lock()

    async def refresh(self, database: Database) -> bool:
        """Whether anything changed."""
        async with self._lock:
            changed = False
            while labels := await self._changed(database):
                await asyncio.to_thread(self._take, labels)
                changed = True
                if len(labels) < READ_AT_ONCE:
                    break
            return changed

    async def novelty(self, texts: Sequence[str]) -> list[float]:
        async with self._lock:
            return await asyncio.to_thread(self.index.novelty, texts)

    async def _changed(self, database: Database) -> list[Label]:
        """The next ones, oldest first; at the start only those that fit into the sample."""
        ours = select(Label).where(col(Label.project) == self.project)
        async with database.read() as session:
            if self.changed_at is None:
                newest = ours.order_by(col(Label.updated_at).desc()).limit(SAMPLE)
                return list((await session.execute(newest)).scalars())[::-1]
            since = ours.where(col(Label.updated_at) > self.changed_at - OVERLAP)
            some = since.order_by(col(Label.updated_at)).limit(READ_AT_ONCE + len(self._seen))
            rows = (await session.execute(some)).scalars()
            return [label for label in rows if self._seen.get(label.item_id) != label.updated_at][:READ_AT_ONCE]

    def _take(self, labels: Sequence[Label]) -> None:
        accepted = [label for label in labels if label.state is LabelState.ACCEPTED]
        self.index.add([label.item_id for label in accepted], [asked_text(label.messages) for label in accepted])
        for label in labels:
            if label.state is not LabelState.ACCEPTED:
                self.index.remove(label.item_id)
            self._seen[label.item_id] = label.updated_at
        newest = max(label.updated_at for label in labels)
        self.changed_at = max(newest, self.changed_at or newest)
        self._seen = {item: at for item, at in self._seen.items() if at > self.changed_at - 2 * OVERLAP}


_PROMPTS: WeakKeyDictionary[Database, dict[tuple[str, str], LabelledPrompts]] = WeakKeyDictionary()


def labelled_prompts(database: Database, project: str, embedder: Embedder) -> LabelledPrompts:
    """Of this process: read once, kept as long as its database is open."""
    known = _PROMPTS.setdefault(database, {})
    return known.setdefault((project, embedder.name), LabelledPrompts(project, embedder))
