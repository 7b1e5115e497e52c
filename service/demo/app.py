"""The app of the demo: asks through the unchanged `openai` client, flags what is wrong, rates what is right."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import openai

from service.demo.api import Nightschool
from service.demo.company import Question

CONCURRENCY = 32
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Asked:
    question: Question
    answer: str
    completion_id: str

    @property
    def right(self) -> bool:
        return self.question.is_right(self.answer)


@dataclass
class App:
    """`project` is the model name that the app asks for; it never changes."""

    client: openai.AsyncOpenAI
    feedback: Nightschool
    project: str

    async def ask(self, question: Question) -> Asked:
        answer = await self.client.chat.completions.create(
            model=self.project,
            messages=[{"role": "user", "content": question.text}],
            max_tokens=ANSWER_TOKENS,
            temperature=0,
        )
        return Asked(question, answer.choices[0].message.content or "", answer.id)

    async def ask_all(self, questions: list[Question], progress: Callable[[int], None]) -> list[Asked]:
        slots = asyncio.Semaphore(CONCURRENCY)
        done = 0

        async def one(question: Question) -> Asked:
            nonlocal done
            async with slots:
                asked = await self.ask(question)
            done += 1
            progress(done)
            return asked

        return list(await asyncio.gather(*(one(question) for question in questions)))

    async def flag(self, asked: Asked, comment: str) -> float:
        """Gives the moment (monotonic) at which the 202 came."""
        body = {"exchange_id": asked.completion_id, "kind": "flag", "reasons": ["wrong_fact"], "comment": comment}
        await self.feedback.call("POST", "/v1/feedback", {**body, "reporter": "demo-user", "severity": 0.7})
        return time.monotonic()

    async def rate_up(self, asked: Asked) -> None:
        tags = {"must_contain": asked.question.must_contain}
        body = {"exchange_id": asked.completion_id, "kind": "rating", "value": 1, "tags": tags}
        await self.feedback.call("POST", "/v1/feedback", body)


@dataclass
class Traffic:
    """Requests that keep flowing: every failure counts, and the first right answer to `watched` is timed."""

    app: App
    questions: list[Question]
    watched: Question | None = None
    requests: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    first_right_at: float | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _stopping: bool = False

    def start(self, workers: int = 3) -> None:
        self._tasks = [asyncio.create_task(self._flow(self.questions[index::workers])) for index in range(workers)]
        if self.watched is not None:
            self._tasks.append(asyncio.create_task(self._watch(self.watched)))

    async def stop(self) -> None:
        """Lets the requests in flight end, so that their failures count too."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _flow(self, questions: list[Question]) -> None:
        for question in itertools.cycle(questions):
            if self._stopping:
                return
            await self._one(question)

    async def _watch(self, question: Question) -> None:
        while not self._stopping:
            asked = await self._one(question)
            if asked is not None and asked.right and self.first_right_at is None:
                self.first_right_at = time.monotonic()

    async def _one(self, question: Question) -> Asked | None:
        self.requests += 1
        try:
            return await self.app.ask(question)
        except openai.OpenAIError as error:
            self.failed += 1
            self.failures.append(str(error)[:200])
            await asyncio.sleep(0.2)
            return None
