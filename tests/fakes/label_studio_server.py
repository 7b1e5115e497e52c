"""A small Label Studio on a real port: the paths, bodies and quirks that the product relies on, of 1.23's free edition.

For tests that need many tasks, or faults that the real one can't be brought to. It is held to the real one by the
contract suite (`tests/contract/test_label_studio.py`), which runs over both. Not here: pages for people, permissions,
and what the suite does not ask for.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Any
from xml.etree import ElementTree

from aiohttp import web

from tests.fakes.label_studio_filters import WHEN, fits
from tests.fakes.label_studio_hooks import Refused, Webhooks
from tests.fakes.label_studio_people import NEEDS_NO_TOKEN, PERSON, REFRESH, SIGN_UP, TOKEN_OF_SESSION, People

TOKEN = "f" * 40
EMAIL = "labeller@example.org"
Row = dict[str, Any]


@dataclass
class FakeLabelStudio:
    """Its state is open to tests: `tasks`, `annotations` and `projects` by id."""

    projects: dict[int, Row] = field(default_factory=dict)
    tasks: dict[int, Row] = field(default_factory=dict)
    annotations: dict[int, Row] = field(default_factory=dict)
    predictions: dict[int, Row] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.people = People(EMAIL, TOKEN)
        self._numbers = count(1)
        self._before: dict[int, int] = {}  # person -> the task that they have before them
        self.hooks = Webhooks(self._numbers)

    # projects

    async def version(self, _request: web.Request) -> Any:
        return {"release": "1.23.2", "edition": "Community"}

    async def list_projects(self, request: web.Request) -> Any:
        rows = [self._project_row(row) for row in self.projects.values()]
        page, size = int(request.query.get("page", 1)), int(request.query.get("page_size", 30))
        part = rows[(page - 1) * size : page * size]
        return {"count": len(rows), "next": "more" if page * size < len(rows) else None, "results": part}

    async def make_project(self, request: web.Request) -> Any:
        body = await request.json()
        if not 3 <= len(body.get("title", "")) <= 50:
            raise Refused(400, validation_errors={"title": ["Ensure this field has 3 to 50 characters."]})
        row = {"id": next(self._numbers), "maximum_annotations": 1, "sampling": "Sequential sampling", **body}
        self.projects[row["id"]] = row
        return web.json_response(self._project_row(row), status=201)

    async def show_project(self, request: web.Request) -> Any:
        return self._project_row(self._project(request.match_info["id"]))

    async def change_project(self, request: web.Request) -> Any:
        row = self._project(request.match_info["id"])
        row.update(await request.json())
        return self._project_row(row)

    async def delete_project(self, request: web.Request) -> Any:
        project = self._project(request.match_info["id"])["id"]
        del self.projects[project]
        for task in [task for task in self.tasks.values() if task["project"] == project]:
            self._forget(task["id"])
        return web.Response(status=204)

    def _project(self, number: Any) -> Row:
        if int(number) not in self.projects:
            raise Refused(404, detail="No Project matches the given query.")
        return self.projects[int(number)]

    def _project_row(self, row: Row) -> Row:
        return {**row, "task_number": sum(task["project"] == row["id"] for task in self.tasks.values())}

    # tasks

    async def import_tasks(self, request: web.Request) -> Any:
        project, rows = self._project(request.match_info["id"]), await request.json()
        wanted = {value[1:] for value in _values(project["label_config"]) if value.startswith("$")}
        for row in rows:
            if missing := sorted(wanted - row["data"].keys()):
                raise Refused(400, validation_errors={"data": [f'"{missing[0]}" key is expected in task data']})
        made = [self._import(project["id"], row) for row in rows]
        return web.json_response({"task_count": len(made), "task_ids": made}, status=201)

    def _import(self, project: int, row: Row) -> int:
        """Everything else in it, its number first, is of where it came from."""
        number = self.add_task(project, row["data"], row.get("meta"), row.get("predictions") or ())
        for annotation in row.get("annotations") or ():
            person = self.people.called((annotation.get("completed_by") or {}).get("email", ""))
            given = {name: annotation[name] for name in ("result", "was_cancelled", "lead_time") if name in annotation}
            self._annotate(number, person.id if person else 1, given)
        return number

    def add_task(
        self, project: int, data: Any = None, meta: Any = None, predictions: Iterable[Row] = (), **columns: Any
    ) -> int:
        """As by whoever has a token, in any form."""
        number = next(self._numbers)
        overlap = self.projects[project].get("maximum_annotations", 1)
        row = {"id": number, "project": project, "data": data or {}, "meta": meta, "overlap": overlap}
        self.tasks[number] = {**row, "updated_at": _now(), **columns}
        for prediction in predictions:
            self._predict(number, prediction)
        return number

    async def list_tasks(self, request: web.Request) -> Any:
        project = self._project(request.query["project"])["id"]
        query = json.loads(request.query.get("query", "{}"))
        conditions = query.get("filters", {}).get("items", [])
        found = [task for task in self.tasks.values() if task["project"] == project and fits(task, conditions)]
        found.sort(key=lambda task: int(task["id"]))
        part = found[: int(request.query["page_size"])]
        return {"total": len(found), "tasks": [self._task_row(task, request.query["include"]) for task in part]}

    def _task_row(self, task: Row, include: str) -> Row:
        names = set(include.split(","))
        annotations = [{k: v for k, v in row.items() if k in names} for row in self._annotations_of(task["id"])]
        row = {**task, "annotations": annotations, "predictions_score": self._score(task["id"])}
        return {name: value for name, value in row.items() if name in names}

    async def change_task(self, request: web.Request) -> Any:
        task = self._task(request.match_info["id"])
        task.update(await request.json())
        return task

    async def action(self, request: web.Request) -> Any:
        project = self._project(request.query["project"])["id"]
        chosen = (await request.json())["selectedItems"]
        every = [task["id"] for task in self.tasks.values() if task["project"] == project]
        numbers = [number for number in every if chosen["all"] or number in chosen["included"]]
        for number in numbers:
            match request.query["id"]:
                case "delete_tasks":
                    self._forget(number)
                case "delete_tasks_annotations":
                    self._drop(self.annotations, number)
                    self.tasks[number]["updated_at"] = _now()
                case "delete_tasks_predictions":
                    self._drop(self.predictions, number)
                case unknown:
                    raise Refused(400, detail=f"no action {unknown}")
        return {"processed_items": len(numbers)}

    async def next_task(self, request: web.Request) -> Any:
        """The lowest score first, of those that this person has not annotated and that want somebody yet: who has one
        before them is somebody.
        """
        project, person = self._project(request.match_info["id"])["id"], request[PERSON].id
        tasks = [task for task in self.tasks.values() if task["project"] == project]
        open_ = [
            task for task in tasks if person not in (busy := self._busy(task, person)) and len(busy) < task["overlap"]
        ]
        if not open_:
            raise Refused(404, detail=f"There are still some tasks to complete for the user {person}, or none.")
        chosen = min(open_, key=lambda task: (self._score(task["id"]) or 0.0, task["id"]))
        self._before[person] = chosen["id"]
        return chosen

    def _busy(self, task: Row, asking: int) -> list[int]:
        """Who has annotated it, and who else has it before them."""
        others = [person for person, number in self._before.items() if number == task["id"] and person != asking]
        return [*(row["completed_by"] for row in self._annotations_of(task["id"])), *others]

    def _task(self, number: Any) -> Row:
        if int(number) not in self.tasks:
            raise Refused(404, detail="No Task matches the given query.")
        return self.tasks[int(number)]

    def _forget(self, number: int) -> None:
        self.tasks.pop(number, None)
        for rows in (self.annotations, self.predictions):
            self._drop(rows, number)

    def _drop(self, rows: dict[int, Row], task: int) -> None:
        for row in [row for row in rows.values() if row["task"] == task]:
            del rows[row["id"]]

    # annotations and predictions

    async def annotate(self, request: web.Request) -> Any:
        task, person = self._task(request.match_info["id"]), request[PERSON].id
        row = self._annotate(task["id"], person, await request.json())
        if self._before.get(person) == task["id"]:
            del self._before[person]
        self._touched(task, "ANNOTATION_CREATED")
        return web.json_response(row, status=201)

    def _annotate(self, task: int, person: int, given: Row) -> Row:
        row: Row = {"id": next(self._numbers), "task": task, "completed_by": person, "was_cancelled": False}
        row |= {"lead_time": None, **given, "created_at": _now(), "updated_at": _now()}
        self.annotations[row["id"]] = row
        return row

    async def draft(self, request: web.Request) -> Any:
        """Seen by nobody but whoever types it."""
        task = self._task(request.match_info["id"])
        return web.json_response({"id": next(self._numbers), "task": task["id"], **await request.json()}, status=201)

    async def edit(self, request: web.Request) -> Any:
        row = self._annotation(request.match_info["id"])
        row |= {**await request.json(), "updated_at": _now()}
        self._touched(self.tasks[row["task"]], "ANNOTATION_UPDATED")
        return row

    async def unannotate(self, request: web.Request) -> Any:
        row = self._annotation(request.match_info["id"])
        del self.annotations[row["id"]]
        self._touched(self.tasks[row["task"]], "ANNOTATIONS_DELETED")
        return web.Response(status=204)

    def _annotation(self, number: Any) -> Row:
        if int(number) not in self.annotations:
            raise Refused(404, detail="No Annotation matches the given query.")
        return self.annotations[int(number)]

    def _annotations_of(self, task: int) -> list[Row]:
        return [row for row in self.annotations.values() if row["task"] == task]

    async def list_predictions(self, request: web.Request) -> Any:
        return [row for row in self.predictions.values() if row["task"] == int(request.query["task"])]

    async def make_prediction(self, request: web.Request) -> Any:
        body = await request.json()
        return web.json_response(self._predict(body["task"], body), status=201)

    async def change_prediction(self, request: web.Request) -> Any:
        row = self.predictions[int(request.match_info["id"])]
        row.update(await request.json())
        return row

    def _predict(self, task: int, body: Row) -> Row:
        row = {"result": [], "model_version": "", **body, "id": next(self._numbers), "task": task}
        self.predictions[row["id"]] = row
        return row

    def _score(self, task: int) -> float | None:
        scores = [row["score"] for row in self.predictions.values() if row["task"] == task]
        return sum(scores) / len(scores) if scores else None

    def _touched(self, task: Row, action: str) -> None:
        task["updated_at"] = _now()
        self.hooks.tell(task["project"], action)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._answer], client_max_size=2**26)
        app.add_routes([web.route(method, path, handler) for method, path, handler in self._routes()])
        return app

    def _routes(self) -> list[tuple[str, str, Callable[[web.Request], Any]]]:
        return [
            ("GET", "/api/version{_:/?}", self.version),
            ("GET", "/api/current-user/whoami", self.people.whoami),
            ("GET", TOKEN_OF_SESSION, self.people.token_of_session),
            ("GET", "/api/users/", self.people.listed),
            ("GET", "/api/invite", self.people.invite),
            ("GET", SIGN_UP, self.people.sign_up_page),
            ("POST", SIGN_UP, self.people.sign_up),
            ("POST", "/api/token/", self.people.make_personal),
            ("POST", REFRESH, self.people.refresh),
            ("GET", "/api/projects{_:/?}", self.list_projects),
            ("POST", "/api/projects/", self.make_project),
            ("GET", "/api/projects/{id:[0-9]+}{_:/?}", self.show_project),
            ("PATCH", "/api/projects/{id:[0-9]+}/", self.change_project),
            ("DELETE", "/api/projects/{id:[0-9]+}/", self.delete_project),
            ("POST", "/api/projects/{id:[0-9]+}/import", self.import_tasks),
            ("GET", "/api/projects/{id:[0-9]+}/next", self.next_task),
            ("GET", "/api/tasks", self.list_tasks),
            ("PATCH", "/api/tasks/{id:[0-9]+}", self.change_task),
            ("POST", "/api/tasks/{id:[0-9]+}/annotations/", self.annotate),
            ("POST", "/api/tasks/{id:[0-9]+}/drafts", self.draft),
            ("PATCH", "/api/annotations/{id:[0-9]+}/", self.edit),
            ("DELETE", "/api/annotations/{id:[0-9]+}/", self.unannotate),
            ("POST", "/api/dm/actions", self.action),
            ("GET", "/api/predictions/", self.list_predictions),
            ("POST", "/api/predictions/", self.make_prediction),
            ("PATCH", "/api/predictions/{id:[0-9]+}/", self.change_prediction),
            ("GET", "/api/webhooks/", self.hooks.listed),
            ("POST", "/api/webhooks/", self.hooks.make),
            ("PATCH", "/api/webhooks/{id:[0-9]+}/", self.hooks.change),
            ("DELETE", "/api/webhooks/{id:[0-9]+}/", self.hooks.delete),
        ]

    @web.middleware
    async def _answer(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        if (person := self.people.who_asks(request)) is not None:
            request[PERSON] = person
        elif request.path not in NEEDS_NO_TOKEN:
            return web.json_response({"detail": "Invalid token."}, status=401)
        try:
            answer = await handler(request)
        except Refused as refused:
            return web.json_response(refused.body, status=refused.status)
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)


def _now() -> str:
    return datetime.now(UTC).strftime(WHEN)


def _values(screen: str) -> list[str]:
    return [value for element in ElementTree.fromstring(screen).iter() for value in element.attrib.values()]


@asynccontextmanager
async def fake_label_studio(host: str = "127.0.0.1") -> AsyncIterator[tuple[str, FakeLabelStudio]]:
    fake = FakeLabelStudio()
    runner = web.AppRunner(fake.application())
    await runner.setup()
    site = web.TCPSite(runner, host, 0)
    await site.start()
    try:
        yield f"http://{host}:{runner.addresses[0][1]}", fake
    finally:
        await runner.cleanup()
