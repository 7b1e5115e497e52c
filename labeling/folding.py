"""Into which review item a prompt folds: at level `near`, several wordings of one question are one item.

A new wording is compared with the few that an indexed key proposes, never with all: the cost of one more does not grow
with the queue. It is compared with items' own prompts only, so that no chain of small steps leads elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling import lexicon
from labeling.database import Database, insert_or_nothing
from labeling.question_form import QuestionForm, question_form
from labeling.same_question import same_form
from labeling.settings import LabelingSettings
from labeling.tables import FoldProgress, ItemWording, ReviewItem

Messages = Sequence[dict[str, Any]]
PROPOSED_AT_MOST = 16
OLDER_AT_ONCE = 200  # items in a transaction
OLDER_A_CALL = 2_000
NEAR = "near 1"  # another number makes the keys of all items again


@dataclass(frozen=True)
class Prompt:
    """What is known of a prompt before the database is asked; `form` is None where only identical ones fold."""

    digest: str
    form: QuestionForm | None


class Folding:
    """One project's, for one run of `fold`. At level `identical` nothing is looked up and nothing is kept."""

    def __init__(self, project: str, settings: LabelingSettings) -> None:
        self.project = project
        self.on = settings.fold != "identical"
        self._prompts: dict[str, Prompt] = {}

    async def read(self, prompts: Mapping[str, Messages]) -> None:
        """Takes prompts, by digest, apart: outside of any transaction and beside the event loop."""
        if self.on:
            self._prompts = await asyncio.to_thread(self._read, prompts)

    def _read(self, prompts: Mapping[str, Messages]) -> dict[str, Prompt]:
        lexicon.load()
        return {digest: Prompt(digest, question_form(messages)) for digest, messages in prompts.items()}

    async def known(self, session: AsyncSession, digest: str) -> str:
        """The digest under which this wording's item stands; its own when nothing is known of it."""
        row = await session.get(ItemWording, (self.project, digest)) if self.on else None
        return digest if row is None else row.item_digest

    async def place(self, session: AsyncSession, digest: str) -> str:
        """As `known`; a wording that is new here gets its place, for good, beside one that asks the same."""
        if not self.on:
            return digest
        row = await session.get(ItemWording, (self.project, digest))
        if row is not None:
            return row.item_digest
        prompt = self._prompts.get(digest) or Prompt(digest, None)
        target = digest if await self._has_item(session, digest) else await self._same(session, prompt) or digest
        await session.execute(insert_or_nothing(session, self._row(prompt, target)))
        return target

    async def stand_alone(self, session: AsyncSession, digest: str) -> None:
        """From now on this wording has an item of its own."""
        mine = (col(ItemWording.project) == self.project) & (col(ItemWording.prompt_digest) == digest)
        await session.execute(update(ItemWording).where(mine).values(item_digest=digest))

    async def learn_older(self, database: Database) -> None:
        """Makes items known that came before this level was switched on, `OLDER_A_CALL` of them."""
        for _ in range(OLDER_A_CALL // OLDER_AT_ONCE if self.on else 0):
            async with database.read() as session:
                items = await self._older(session)
                known = await self._known_of(session, [item.prompt_digest for item in items])
            if not items:
                return
            await self.read({item.prompt_digest: item.messages for item in items if item.prompt_digest not in known})
            async with database.write() as session:
                if self._prompts:
                    rows = [self._row(prompt, prompt.digest) for prompt in self._prompts.values()]
                    await session.execute(insert_or_nothing(session, *rows))
                await session.merge(FoldProgress(project=self.project, kind=NEAR, item_id=items[-1].id))

    async def _known_of(self, session: AsyncSession, digests: Sequence[str]) -> set[str]:
        mine = (col(ItemWording.project) == self.project) & col(ItemWording.prompt_digest).in_(digests)
        return set((await session.execute(select(ItemWording.prompt_digest).where(mine))).scalars())

    async def _older(self, session: AsyncSession) -> list[ReviewItem]:
        done = await session.get(FoldProgress, (self.project, NEAR))
        items = (
            select(ReviewItem)
            .where(col(ReviewItem.project) == self.project, col(ReviewItem.id) > (done.item_id if done else ""))
            .order_by(col(ReviewItem.id))
            .limit(OLDER_AT_ONCE)
        )
        return list((await session.execute(items)).scalars())

    async def _has_item(self, session: AsyncSession, digest: str) -> bool:
        mine = (col(ReviewItem.project) == self.project) & (col(ReviewItem.prompt_digest) == digest)
        return (await session.execute(select(ReviewItem.id).where(mine).limit(1))).first() is not None

    async def _same(self, session: AsyncSession, prompt: Prompt) -> str | None:
        if prompt.form is None:
            return None
        for item in await self._proposed(session, prompt.form.key):
            form = question_form(item.messages)
            if form is not None and same_form(prompt.form, form):
                return item.prompt_digest
        return None

    async def _proposed(self, session: AsyncSession, key: int) -> list[ReviewItem]:
        """Items whose own prompt has this key: a handful, and one mostly.

        In two steps, each of one index: of a join, a planner without statistics may read all items in their order.
        """
        own = col(ItemWording.item_digest) == col(ItemWording.prompt_digest)
        wordings = (
            select(ItemWording.prompt_digest)
            .where(col(ItemWording.project) == self.project, col(ItemWording.near_key) == key, own)
            .limit(PROPOSED_AT_MOST)
        )
        digests = list((await session.execute(wordings)).scalars())
        if not digests:
            return []
        mine = (col(ReviewItem.project) == self.project) & col(ReviewItem.prompt_digest).in_(digests)
        items = (await session.execute(select(ReviewItem).where(mine, col(ReviewItem.round) == 1))).scalars()
        return sorted(items, key=lambda item: item.id)

    def _row(self, prompt: Prompt, item_digest: str) -> ItemWording:
        key = prompt.form.key if prompt.form else None
        return ItemWording(project=self.project, prompt_digest=prompt.digest, item_digest=item_digest, near_key=key)
