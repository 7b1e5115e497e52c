"""What every route that takes feedback does: who sends it, for which project, stored once or only rehearsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from litestar import Request

from labeling.errors import InvalidInput, NightschoolError
from labeling.feedback_body import FeedbackBody, InvalidFeedback
from labeling.new_feedback import NewFeedback, new_feedback
from labeling.reporters import Reporters
from service.auth import Caller, KeyRing, Scope
from service.feedback_form import Line, TooManyRows, decompressed
from service.idempotency import Answer, Once
from service.ingest import IngestWriter, Submission, accepted, receipt
from service.problems import problem_of

MISTAKES_TOLD = 1_000  # of one request: its answer must not be a thousand times its question


class NothingAccepted(InvalidInput):
    """None of many: `mistakes` are the results of the lines."""

    code = "invalid_feedback"
    default_hint = "Correct the lines listed under errors; /schema has the form."

    def __init__(self, results: list[dict[str, Any]]) -> None:
        super().__init__(f"none of {len(results)} feedback can be accepted")
        self.mistakes = results


@dataclass(frozen=True)
class Sent:
    """One request as it came, decompressed."""

    caller: Caller
    raw: bytes
    once: Once | None


@dataclass(frozen=True)
class FeedbackDesk:
    ingest: IngestWriter
    keys: KeyRing
    reporters: Reporters
    projects: tuple[str, ...]
    max_body_bytes: int

    async def received(self, request: Request[Any, Any, Any], form: str) -> Sent:
        """`form`: of `Once.of`."""
        headers = request.headers
        caller = self.keys.authenticate(headers.get("authorization"))
        caller.require(Scope.FEEDBACK)
        raw = decompressed(await request.body(), headers.get("content-encoding", ""), self.max_body_bytes)
        return Sent(caller, raw, Once.of(caller.key_id, headers.get("idempotency-key"), form, raw))

    async def take(self, sent: Sent, body: FeedbackBody) -> Answer:
        return await self.store(sent, self.row(sent, body))

    async def store(self, sent: Sent, row: NewFeedback) -> Answer:
        return await self.ingest.submit(Submission([row], sent.once, len(sent.raw), accepted))

    async def rehearse(self, sent: Sent, body: FeedbackBody) -> Answer:
        """Checked like any other, linked to what is there by now, and not stored."""
        (linked,) = await self.ingest.rehearse([self.row(sent, body)])
        return Answer(200, {"dry_run": True, "linked": linked})

    async def take_many(self, sent: Sent, lines: Sequence[Line]) -> Answer:
        """Each line for itself: those without a mistake are stored, together, whatever the others are."""
        rows, results = self._checked(sent, lines)

        def answer(linked: Sequence[NewFeedback]) -> Answer:
            return _of_many(results, [receipt(row) for row in linked])

        return await self.ingest.submit(Submission(rows, sent.once, len(sent.raw), answer))

    async def rehearse_many(self, sent: Sent, lines: Sequence[Line]) -> Answer:
        rows, results = self._checked(sent, lines)
        linked = await self.ingest.rehearse(rows)
        told = _of_many(results, [{"linked": one} for one in linked])
        return Answer(200, {"dry_run": True, **told.body})

    def row(self, sent: Sent, body: FeedbackBody) -> NewFeedback:
        project = self.project_of(sent.caller, body.project)
        return new_feedback(body, project, sent.caller.key_id, self.reporters)

    def project_of(self, caller: Caller, named: str | None) -> str:
        """The key's; else the body's; else the only one there is."""
        if named is not None:
            if named not in self.projects:
                raise InvalidFeedback([{"field": "project", "message": f"no project {named!r}"}])
            caller.require(Scope.FEEDBACK, named)
            return named
        only = self.projects[0] if len(self.projects) == 1 else None
        if (project := caller.project or only) is None:
            message = f"this API key belongs to no project: name one of {', '.join(self.projects)}"
            raise InvalidFeedback([{"field": "project", "message": message}])
        if project not in self.projects:
            message = f"this API key's project {project!r} is not configured any more"
            raise InvalidFeedback([{"field": "project", "message": message}])
        return project

    def _checked(self, sent: Sent, lines: Sequence[Line]) -> tuple[list[NewFeedback], list[dict[str, Any]]]:
        """The rows, and a result for each line: a number alone where its row is still to be stored."""
        rows: list[NewFeedback] = []
        results: list[dict[str, Any]] = []
        told = 0
        for line in lines:
            result: dict[str, Any] = {"line": line.number}
            try:
                rows.append(self.row(sent, _body(line)))
            except NightschoolError as error:
                problem = problem_of(error)
                mistakes = problem.get("errors", [])[: max(0, MISTAKES_TOLD - told)]
                told += max(1, len(mistakes))
                names = ("status", "code", "detail") if told <= MISTAKES_TOLD else ("status", "code")
                result |= {name: problem[name] for name in names} | ({"errors": mistakes} if mistakes else {})
            results.append(result)
        if not rows:
            raise NothingAccepted(results)
        if len(rows) > self.ingest.limit:
            raise TooManyRows(f"the body holds {len(rows)} feedback, and {self.ingest.limit} may wait at a time")
        return rows, results


def _body(line: Line) -> FeedbackBody:
    if line.mistake is not None:
        raise line.mistake
    assert line.body is not None
    return line.body


def _of_many(results: list[dict[str, Any]], told: list[dict[str, Any]]) -> Answer:
    """202 where every line was accepted, 207 where some were not."""
    waiting = iter(told)
    filled = [result if "code" in result else {**result, **next(waiting)} for result in results]
    refused = len(results) - len(told)
    return Answer(207 if refused else 202, {"accepted": len(told), "refused": refused, "results": filled})
