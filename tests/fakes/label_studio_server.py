"""A small Label Studio on a real port: the paths, bodies and quirks that the product relies on, of 1.23's free edition.

For tests that need many tasks, or faults that the real one can't be brought to. What it says of itself is held to the
real one by the contract suite, which runs over both. Not here: pages, sign-up, permissions, drafts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Any
from xml.etree import ElementTree

from aiohttp import ClientError, ClientSession, ClientTimeout, web

TOKEN = "f" * 40
EMAIL = "labeller@example.org"
WHEN = "%Y-%m-%dT%H:%M:%S.%fZ"
Row = dict[str, Any]


class Refused(Exception):
    def __init__(self, status: int, **body: Any) -> None:
        super().__init__(str(body))
        self.status, self.body = status, body


@dataclass
class FakeLabelStudio:
    """Its state is open to tests: `tasks`, `annotations` and `projects` by id."""

    projects: dict[int, Row] = field(default_factory=dict)
    tasks: dict[int, Row] = field(default_factory=dict)
    annotations: dict[int, Row] = field(default_factory=dict)
    predictions: dict[int, Row] = field(default_factory=dict)
    webhooks: dict[int, Row] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = count(1)
        self._calls: set[asyncio.Task[None]] = set()

    # projects

    async def version(self, _request: web.Request) -> Any:
        return {"release": "1.23.2", "edition": "Community"}

    async def whoami(self, _request: web.Request) -> Any:
        return {"id": 1, "email": EMAIL, "username": EMAIL}

    async def users(self, _request: web.Request) -> Any:
        return [{"id": 1, "email": EMAIL}]

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
        made = [self.add_task(project["id"], **row) for row in rows]
        return web.json_response({"task_count": len(made), "task_ids": made}, status=201)

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
        found = [task for task in self.tasks.values() if task["project"] == project and _fits(task, conditions)]
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
        self._project(request.query["project"])
        assert request.query["id"] == "delete_tasks"
        chosen = (await request.json())["selectedItems"]["included"]
        for number in chosen:
            self._forget(number)
        return {"processed_items": len(chosen)}

    async def next_task(self, request: web.Request) -> Any:
        """The lowest score first, of those that this user has not annotated and that want somebody yet."""
        project = self._project(request.match_info["id"])["id"]
        open_ = [
            task
            for task in self.tasks.values()
            if task["project"] == project and len(self._annotations_of(task["id"])) < task["overlap"]
            if not any(row["completed_by"] == 1 for row in self._annotations_of(task["id"]))
        ]
        if not open_:
            raise Refused(404, detail="There are still some tasks to complete for the user 1, or none.")
        return min(open_, key=lambda task: (self._score(task["id"]) or 0.0, task["id"]))

    def _task(self, number: Any) -> Row:
        if int(number) not in self.tasks:
            raise Refused(404, detail="No Task matches the given query.")
        return self.tasks[int(number)]

    def _forget(self, number: int) -> None:
        self.tasks.pop(number, None)
        for rows in (self.annotations, self.predictions):
            for row in [row for row in rows.values() if row["task"] == number]:
                del rows[row["id"]]

    # annotations and predictions

    async def annotate(self, request: web.Request) -> Any:
        task, body = self._task(request.match_info["id"]), await request.json()
        row = {"id": next(self._numbers), "task": task["id"], "completed_by": 1, "was_cancelled": False}
        row |= {"lead_time": None, **body, "created_at": _now(), "updated_at": _now()}
        self.annotations[row["id"]] = row
        self._touched(task, "ANNOTATION_CREATED")
        return web.json_response(row, status=201)

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

    # webhooks: one try each, and nobody waits for it

    async def list_webhooks(self, request: web.Request) -> Any:
        return [row for row in self.webhooks.values() if row["project"] == int(request.query["project"])]

    async def make_webhook(self, request: web.Request) -> Any:
        row = {**await request.json(), "id": next(self._numbers)}
        self.webhooks[row["id"]] = row
        return web.json_response(row, status=201)

    async def change_webhook(self, request: web.Request) -> Any:
        row = self.webhooks[int(request.match_info["id"])]
        row.update(await request.json())
        return row

    async def delete_webhook(self, request: web.Request) -> Any:
        if self.webhooks.pop(int(request.match_info["id"]), None) is None:
            raise Refused(404, detail="No Webhook matches the given query.")
        return web.Response(status=204)

    def _touched(self, task: Row, action: str) -> None:
        task["updated_at"] = _now()
        for hook in self.webhooks.values():
            if hook["project"] == task["project"] and hook["is_active"] and action in hook["actions"]:
                call = asyncio.create_task(_tell(hook, action))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._answer], client_max_size=2**26)
        app.add_routes([web.route(method, path, handler) for method, path, handler in self._routes()])
        return app

    def _routes(self) -> list[tuple[str, str, Callable[[web.Request], Any]]]:
        return [
            ("GET", "/api/version{_:/?}", self.version),
            ("GET", "/api/current-user/whoami", self.whoami),
            ("GET", "/api/users/", self.users),
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
            ("PATCH", "/api/annotations/{id:[0-9]+}/", self.edit),
            ("DELETE", "/api/annotations/{id:[0-9]+}/", self.unannotate),
            ("POST", "/api/dm/actions", self.action),
            ("GET", "/api/predictions/", self.list_predictions),
            ("POST", "/api/predictions/", self.make_prediction),
            ("PATCH", "/api/predictions/{id:[0-9]+}/", self.change_prediction),
            ("GET", "/api/webhooks/", self.list_webhooks),
            ("POST", "/api/webhooks/", self.make_webhook),
            ("PATCH", "/api/webhooks/{id:[0-9]+}/", self.change_webhook),
            ("DELETE", "/api/webhooks/{id:[0-9]+}/", self.delete_webhook),
        ]

    @web.middleware
    async def _answer(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        if request.headers.get("Authorization") != f"Token {TOKEN}":
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


def _fits(task: Row, conditions: Iterable[Row]) -> bool:
    return all(_OPERATORS[one["operator"]](_field(task, one["filter"]), one["value"]) for one in conditions)


def _field(task: Row, name: str) -> Any:
    value: Any = task
    for part in name.removeprefix("filter:tasks:").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _greater(value: Any, than: Any) -> bool:
    """Times are compared as such. One without microseconds is an error here as it is there."""
    if isinstance(than, int):
        return bool(value > than)
    limit = datetime.strptime(than, WHEN)
    try:
        return datetime.strptime(value, WHEN) > limit
    except (TypeError, ValueError):  # a test's strange task
        return False


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "greater": _greater,
    "in_list": lambda value, among: value in among,
}


async def _tell(hook: Row, action: str) -> None:
    try:
        async with ClientSession(timeout=ClientTimeout(total=1)) as client:
            await client.post(hook["url"], json={"action": action}, headers=hook["headers"])
    except (ClientError, TimeoutError):
        return  # it has one try


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
