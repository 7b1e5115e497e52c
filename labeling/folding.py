"""Into which review item a prompt folds: at level `near` and `meaning` several wordings of one question are one item.

A new wording is compared with the few that an indexed key proposes, never with all: the cost of one more does not grow
with the queue. It is compared with items' first wordings only, so that no chain of small steps leads elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from labeling import lexicon
from labeling.database import Database, insert_or_nothing
from labeling.embeddings import Embedder, Vectors, embedder
from labeling.meaning import MeaningIndex, asked
from labeling.question_form import QuestionForm, question_form
from labeling.same_question import same_form
from labeling.settings import LabelingSettings
from labeling.tables import FoldProgress, ItemWording, ReviewItem

PROPOSED_AT_MOST = 32
OLDER_AT_ONCE = 200  # items a call that were there before this level was switched on
NEAR = "near-1"  # with another number, keys are made again

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """What folding knows of a prompt before it looks into the database."""

    digest: str
    form: QuestionForm | None
    vector: Vectors | None = None


class Folding:
    """One project's, by its settings. At level `identical` nothing is looked up and nothing is kept."""

    def __init__(self, project: str, settings: LabelingSettings) -> None:
        self.project = project
        self.on = settings.fold != "identical"
        self._model_dir = settings.embedding_model_dir if settings.fold == "meaning" else None
        self._similarity = settings.fold_similarity
        self._meaning: MeaningIndex | None = None
        self._read: dict[str, Prompt] = {}

    async def read(self, prompts: dict[str, Messages]) -> None:
        """Takes prompts (by digest) apart, outside any transaction and off the event loop."""
        if self.on and prompts:
            self._read = {prompt.digest: prompt for prompt in await asyncio.to_thread(self._prompts, prompts)}

    def _prompts(self, prompts: dict[str, Messages]) -> list[Prompt]:
        lexicon.load()
        forms = {digest: question_form(messages) for digest, messages in prompts.items()}
        readable = [digest for digest, form in forms.items() if form is not None]
        vectors: dict[str, Vectors] = {}
        if self._model_dir is not None:
            model = self._loaded(embedder(self._model_dir))
            found = model.embed([asked(prompts[digest]) for digest in readable])
            vectors = dict(zip(readable, found, strict=True))
        return [Prompt(digest, form, vectors.get(digest)) for digest, form in forms.items()]

    def _loaded(self, model: Embedder) -> Embedder:
        if self._meaning is None:
            self._meaning = MeaningIndex(self.project, model.name, model.dimensions, self._similarity)
        return model

    async def known(self, session: AsyncSession, digest: str) -> str:
        """The digest of the item that this wording belongs to; its own when nothing is known of it."""
        if not self.on:
            return digest
        row = await session.get(ItemWording, (self.project, digest))
        return row.item_digest if row is not None else digest

    async def place(self, session: AsyncSession, digest: str) -> str:
        """As `known`; a wording that is new here is placed, for good, with the item that asks the same."""
        if not self.on:
            return digest
        row = await session.get(ItemWording, (self.project, digest))
        if row is not None:
            return row.item_digest
        prompt = self._read.get(digest, Prompt(digest, None))
        target = await self._same(session, prompt)
        await self._remember(session, prompt, target or digest)
        return target or digest

    async def stand_alone(self, session: AsyncSession, digest: str) -> None:
        """From now on this wording has an item of its own."""
        mine = (col(ItemWording.project) == self.project) & (col(ItemWording.prompt_digest) == digest)
        await session.execute(update(ItemWording).where(mine).values(item_digest=digest))

    async def _same(self, session: AsyncSession, prompt: Prompt) -> str | None:
        if prompt.form is None:
            return None
        near = (
            select(ReviewItem.prompt_digest, ReviewItem.messages)
            .join(
                ItemWording,
                (col(ItemWording.project) == col(ReviewItem.project))
                & (col(ItemWording.item_digest) == col(ReviewItem.prompt_digest)),
            )
            .where(
                col(ItemWording.project) == self.project,
                col(ItemWording.near_key) == prompt.form.key,
                col(ReviewItem.round) == 1,
            )
            .limit(PROPOSED_AT_MOST)
        )
        for digest, messages in await session.execute(near):
            form = question_form(messages)
            if form is not None and same_form(prompt.form, form):
                return str(digest)
        if self._meaning is None or prompt.vector is None:
            return None
        return await self._meaning.same(session, prompt.form, prompt.vector)

    async def _remember(self, session: AsyncSession, prompt: Prompt, item_digest: str) -> None:
        key = prompt.form.key if prompt.form is not None else None
        row = ItemWording(
            project=self.project, prompt_digest=prompt.digest, item_digest=item_digest, near_key=key
        )
        await session.execute(insert_or_nothing(session, row))
        if self._meaning is not None and prompt.vector is not None and prompt.form is not None and item_digest == prompt.digest:
            await self._meaning.add(session, prompt.digest, prompt.form, prompt.vector)

    async def learn_older(self, database: Database) -> None:
        """Makes items known that came before this level was switched on, some at a time."""
        if not self.on:
            return
        async with database.read() as session:
            items = await self._older(session)
        if not items:
            return
        await self.read({item.prompt_digest: item.messages for item in items})
        async with database.write() as session:
            for prompt in self._read.values():
                await self._remember(session, prompt, prompt.digest)
            await session.merge(FoldProgress(project=self.project, kind=self._kind, item_id=items[-1].id))

    @property
    def _kind(self) -> str:
        return NEAR if self._meaning is None else f"{NEAR} {self._meaning.embedder}"
