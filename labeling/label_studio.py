"""The boundary to Label Studio (free edition, 1.20 and later): projects, tasks, annotations and labellers.

The SDK builds the requests. Tokens, time limits and errors are ours: the SDK refreshes tokens with blocking calls,
repeats a request that may already have committed, and its project pager ends in an error.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import structlog
from label_studio_sdk.base_client import AsyncLabelStudioBase
from label_studio_sdk.core.api_error import ApiError
from label_studio_sdk.core.parse_error import ParsingError

from labeling.label_studio_http import (
    LabelStudioBroke,
    LabelStudioNotFound,
    LabelStudioRefused,
    LabelStudioUnavailable,
    TokenAuth,
    error_of,
    json_of,
)

log = structlog.get_logger(__name__)
ITEM_KEY = "nightschool_item"
MARKER = "nightschool project: "
# With it the free edition offers the task of the lowest prediction score first; other orders are a paid feature.
LOWEST_SCORE_FIRST = "Uncertainty sampling"
SCORED_BY = "nightschool"
TITLE_LIMIT = 50
IDS_PER_QUERY = 50  # they travel in the URL: about 2 kB
TASKS_PER_PAGE = 200
# Field names apply to the tasks and to the annotations in them; `data` stays out, it can be large.
_LIGHT = "id,meta,updated_at,predictions_score,overlap,annotations"
_FULL = f"{_LIGHT},result,completed_by,was_cancelled,lead_time,created_at"
_WHOLE = f"{_FULL},data"


@dataclass(frozen=True)
class ServerInfo:
    version: str
    token_kind: str  # "legacy" or "personal"
    user: str


@dataclass(frozen=True)
class NewTask:
    """`score` decides the order: the lowest is offered first."""

    item_id: str
    data: dict[str, Any]
    score: float

    @property
    def shown(self) -> str:
        """Digest of what the labeller sees: a task found again may show an older answer."""
        text = json.dumps(self.data, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SeenAnnotation:
    """In light listings only `id` and `updated_at` are true."""

    id: int
    updated_at: datetime
    created_at: datetime | None = None
    annotator: str = ""
    result: list[dict[str, Any]] = field(default_factory=list)
    cancelled: bool = False
    lead_seconds: float | None = None


@dataclass(frozen=True)
class SeenTask:
    """`item_id` is None for tasks that somebody else put into the project."""

    id: int
    item_id: str | None
    shown: str
    updated_at: datetime
    score: float | None
    annotations: tuple[SeenAnnotation, ...]
    overlap: int = 1  # to how many people it is offered


@dataclass(frozen=True)
class OfferedTask:
    id: int
    item_id: str | None
    data: dict[str, Any]


class LabelStudioServer:
    """Construction makes no request. One object a token: what it annotates is its user's work."""

    def __init__(self, url: str, token: str, timeout_seconds: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self._auth = TokenAuth(self.url, token)
        self._http = httpx.AsyncClient(base_url=self.url, auth=self._auth, timeout=timeout_seconds)
        # The SDK writes an Authorization header of its own first; TokenAuth replaces it.
        self._sdk = AsyncLabelStudioBase(
            base_url=self.url, api_key="replaced", httpx_client=self._http, timeout=timeout_seconds, max_retries=0
        )
        self._users: dict[int, str] = {}
        self._projects: dict[str, int] = {}
        self._strange: set[tuple[int, Any]] = set()
        self._making = asyncio.Lock()

    async def close(self) -> None:
        await self._http.aclose()

    async def check(self) -> ServerInfo:
        with _translated(f"asking {self.url} for its version"):
            version = await self._sdk.versions.get()
            user = await self._sdk.users.whoami()
        return ServerInfo(str(version.release), self._auth.kind, str(user.email))

    def derived_secret(self, purpose: str) -> str:
        """The same in every process that has the same token; it does not reveal the token."""
        return hmac.new(self._auth.token.encode(), purpose.encode(), hashlib.sha256).hexdigest()

    # projects

    def remembered_project(self, our_project: str) -> int | None:
        """Where `ensure_project` last found it: a poll asks for nothing but the changes."""
        return self._projects.get(our_project)

    def forget_project(self, our_project: str) -> None:
        self._projects.pop(our_project, None)

    async def ensure_project(self, title: str, our_project: str, label_config: str, people_per_task: int) -> int:
        """The id of the project that carries our marker; made when missing, once even if two ask at the same time."""
        settings: dict[str, Any] = {"sampling": LOWEST_SCORE_FIRST, "maximum_annotations": people_per_task}
        async with self._making:
            found = await self._marked_projects(our_project)
            if not found:
                with _translated(f"making the Label Studio project {title!r}"):
                    await self._sdk.projects.create(
                        title=title[:TITLE_LIMIT].ljust(3, "."),
                        description=MARKER + our_project,
                        label_config=label_config,
                        **settings,
                    )
                found = await self._marked_projects(our_project)
        kept, *others = sorted(found, key=lambda project: int(project["id"]))
        await self._delete_empty([int(project["id"]) for project in others], our_project)
        if any(kept[name] != value for name, value in settings.items()):
            with _translated(f"updating Label Studio project {kept['id']}"):
                await self._sdk.projects.update(id=kept["id"], **settings)
        self._projects[our_project] = int(kept["id"])
        return int(kept["id"])

    async def _delete_empty(self, projects: Sequence[int], our_project: str) -> None:
        """Spare ones, from a creation that was given up and committed late, or from two processes at once.

        All choose the lowest number, so nobody works in these. One with tasks is a person's to decide about.
        """
        for project_id in projects:
            try:
                row = await self._get(
                    f"/api/projects/{project_id}", {}, f"looking at Label Studio project {project_id}"
                )
                if row["task_number"]:
                    log.warning(
                        "spare_labelling_project",
                        project=our_project,
                        spare=project_id,
                        tasks=row["task_number"],
                        cure="Nothing reads it: delete it, or take the marker out of its description.",
                    )
                    continue
                await self.delete_project(project_id)
            except LabelStudioNotFound:  # another process was first
                continue
            log.info("spare_labelling_project_deleted", project=our_project, spare=project_id)

    async def _marked_projects(self, our_project: str) -> list[dict[str, Any]]:
        params: dict[str, Any] = {"include": "id,description,sampling,maximum_annotations", "page_size": 100, "page": 1}
        found: list[dict[str, Any]] = []
        while True:
            answer = await self._get("/api/projects", params, "listing the Label Studio projects")
            found += [row for row in answer["results"] if _marks(row["description"], our_project)]
            if not answer["next"]:
                return found
            params["page"] += 1

    async def screen(self, project_id: int) -> str:
        """Its label config, as it stands there."""
        row = await self._get(f"/api/projects/{project_id}", {}, f"reading Label Studio project {project_id}")
        return str(row["label_config"])

    async def set_screen(self, project_id: int, label_config: str) -> None:
        """Refused where annotations exist that it could not show; ours never takes a control away."""
        with _translated(f"giving Label Studio project {project_id} its labelling screen"):
            await self._sdk.projects.update(id=project_id, label_config=label_config)

    async def find_project(self, our_project: str) -> int | None:
        """The id of the project that carries our marker."""
        return min((int(row["id"]) for row in await self._marked_projects(our_project)), default=None)

    async def delete_project(self, project_id: int) -> None:
        with _translated(f"deleting Label Studio project {project_id}"):
            await self._sdk.projects.delete(id=project_id)

    # tasks

    async def find_tasks(self, project_id: int, item_ids: Collection[str]) -> dict[str, list[SeenTask]]:
        """Item id -> its tasks, lowest id first. More than one is a race that the caller clears up."""
        wanted = sorted(item_ids)
        found: dict[str, list[SeenTask]] = {}
        for start in range(0, len(wanted), IDS_PER_QUERY):
            part = wanted[start : start + IDS_PER_QUERY]
            condition = _condition(f"data.{ITEM_KEY}", "in_list", "String", part)
            async for task in self._tasks(project_id, [condition], _LIGHT):
                if task.item_id is not None:  # made by hand from an export of ours: nobody's duplicate
                    found.setdefault(task.item_id, []).append(task)
        return found

    async def import_tasks(self, project_id: int, tasks: Sequence[NewTask]) -> None:
        """Not idempotent, and a timeout may have committed: `find_tasks` before and after."""
        rows: list[dict[str, Any]] = [
            {
                "data": _data(task),
                "meta": _meta(task),
                "predictions": [{"score": task.score, "model_version": SCORED_BY, "result": []}],
            }
            for task in tasks
        ]
        with _translated(f"importing {len(rows)} tasks into Label Studio project {project_id}"):
            await self._sdk.projects.import_tasks(id=project_id, request=rows, return_task_ids=True)

    async def delete_tasks(self, project_id: int, task_ids: Collection[int]) -> None:
        """With their annotations. Tasks that are gone already are fine."""
        if not task_ids:
            return
        body = {"selectedItems": {"all": False, "included": sorted(task_ids)}}
        await self._post(
            f"/api/dm/actions?id=delete_tasks&project={project_id}", body, f"deleting tasks of project {project_id}"
        )

    async def changed_tasks(self, project_id: int, since: datetime | None) -> AsyncIterator[SeenTask]:
        """Tasks made, annotated, edited, skipped or rid of an annotation after `since`, by the server's clock."""
        conditions = [] if since is None else [_condition("updated_at", "greater", "Datetime", server_time(since))]
        async for task in self._tasks(project_id, conditions, _FULL):
            yield task

    async def all_tasks(self, project_id: int) -> AsyncIterator[SeenTask]:
        """Ids and times only."""
        async for task in self._tasks(project_id, [], _LIGHT):
            yield task

    async def tasks_by_id(self, project_id: int, task_ids: Collection[int]) -> AsyncIterator[SeenTask]:
        wanted = sorted(task_ids)
        for start in range(0, len(wanted), IDS_PER_QUERY):
            part = wanted[start : start + IDS_PER_QUERY]
            async for task in self._tasks(project_id, [_condition("id", "in_list", "Number", part)], _FULL):
                yield task

    async def whole_tasks(self, project_id: int, task_ids: Collection[int]) -> list[dict[str, Any]]:
        """As Label Studio imports them again, annotators by name. At most `IDS_PER_QUERY` at a time."""
        condition = _condition("id", "in_list", "Number", sorted(task_ids))
        rows = await self._page(project_id, [condition], _WHOLE, 0, IDS_PER_QUERY)
        for row in rows:
            for annotation in row["annotations"]:
                annotation["completed_by"] = {"email": await self._user_name(annotation["completed_by"])}
        return rows

    async def rescore(self, task_id: int, score: float) -> None:
        """Moves a task in the queue; one that somebody rid of its score gets one again."""
        with _translated(f"moving task {task_id} in Label Studio's queue"):
            predictions = await self._sdk.predictions.list(task=task_id)
            for prediction in predictions:
                await self._sdk.predictions.update(id=prediction.id, score=score)
            if not predictions:
                await self._sdk.predictions.create(task=task_id, result=[], score=score, model_version=SCORED_BY)

    async def show(self, task_id: int, task: NewTask) -> None:
        """Other data on a task that is there already."""
        body = {"data": _data(task), "meta": _meta(task)}
        await self._patch(f"/api/tasks/{task_id}", body, f"renewing the data of task {task_id}")

    async def offer_to(self, task: SeenTask, people: int) -> None:
        """To so many different people in all; `task` read in full. The server counts only when somebody submits."""
        spoken = {annotation.annotator for annotation in task.annotations if not annotation.cancelled}
        body = {"overlap": people, "is_labeled": len(spoken) >= people}
        await self._patch(f"/api/tasks/{task.id}", body, f"offering task {task.id} to {people} people")

    async def _tasks(self, project_id: int, conditions: list[dict[str, Any]], include: str) -> AsyncIterator[SeenTask]:
        """Pages by id, not by number: tasks deleted meanwhile can't shift others past us.

        A single task can make the server answer 500 to every list that it is in (an annotation that holds half a
        surrogate pair does): the pages shrink around it, and it is passed over by name.
        """
        last, size = 0, TASKS_PER_PAGE
        while True:
            try:
                rows = await self._page(project_id, conditions, include, last, size)
            except LabelStudioBroke as error:
                if size > 1:
                    size = max(1, size // 6)
                    continue
                rows = await self._page(project_id, conditions, "id", last, 1)
                if not rows:
                    return
                last, size = rows[0]["id"], TASKS_PER_PAGE
                log.warning(
                    "task_unreadable", project=project_id, task=last, reason=str(error), cure="Delete that task."
                )
                continue
            for row in rows:
                if (task := await self._readable(project_id, row)) is not None:
                    yield task
            if len(rows) < size:
                return
            last = rows[-1]["id"]

    async def _page(
        self, project_id: int, conditions: list[dict[str, Any]], include: str, after: int, size: int
    ) -> list[dict[str, Any]]:
        items = [*conditions, _condition("id", "greater", "Number", after)]
        query = {"filters": {"conjunction": "and", "items": items}, "ordering": ["tasks:id"]}
        params = {"project": project_id, "fields": "all", "include": include, "page_size": size}
        page = await self._get(
            "/api/tasks", {**params, "query": json.dumps(query)}, f"listing tasks of project {project_id}"
        )
        return list(page["tasks"])

    async def _readable(self, project_id: int, row: dict[str, Any]) -> SeenTask | None:
        """None for one of an unknown form, from another tool or release: named once, and left alone."""
        try:
            return await self._seen_task(row)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            task = row.get("id") if isinstance(row, dict) else None
            if (project_id, task) not in self._strange:
                self._strange.add((project_id, task))
                log.warning(
                    "task_of_unknown_form",
                    project=project_id,
                    task=task,
                    reason=f"{type(error).__name__}: {error}",
                    cure="It is left alone; delete it in Label Studio if nobody needs it.",
                )
            return None

    async def _seen_task(self, row: dict[str, Any]) -> SeenTask:
        """`meta` is anybody's: only what we write there ourselves makes a task ours."""
        meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
        item_id, shown = meta.get(ITEM_KEY), meta.get("shown")
        return SeenTask(
            id=row["id"],
            item_id=item_id if isinstance(item_id, str) and item_id.isprintable() else None,
            shown=shown if isinstance(shown, str) else "",
            updated_at=_time(row["updated_at"]),
            score=row.get("predictions_score"),
            annotations=tuple([await self._seen_annotation(annotation) for annotation in row["annotations"]]),
            overlap=row.get("overlap") or 1,
        )

    async def _seen_annotation(self, row: dict[str, Any]) -> SeenAnnotation:
        return SeenAnnotation(
            id=row["id"],
            updated_at=_time(row["updated_at"]),
            annotator=await self._user_name(row["completed_by"]) if "completed_by" in row else "",
            result=row.get("result") or [],
            cancelled=bool(row.get("was_cancelled")),
            lead_seconds=row.get("lead_time"),
            created_at=_time(row["created_at"]) if "created_at" in row else None,
        )

    # people

    async def next_task(self, project_id: int) -> OfferedTask | None:
        """What this token's user would be shown next."""
        try:
            row = await self._get(f"/api/projects/{project_id}/next", {}, f"the next task of project {project_id}")
        except LabelStudioNotFound as error:
            if "Project" in str(error):
                raise
            return None
        return OfferedTask(row["id"], row["data"].get(ITEM_KEY), row["data"])

    async def annotate(
        self, task_id: int, result: list[dict[str, Any]], *, lead_seconds: float = 1.0, cancelled: bool = False
    ) -> int:
        """As this token's user; `cancelled` is the screen's "skip"."""
        with _translated(f"annotating task {task_id}"):
            made = await self._sdk.annotations.create(
                id=task_id, result=result, lead_time=lead_seconds, was_cancelled=cancelled
            )
        return int(made.id)

    async def edit_annotation(self, annotation_id: int, result: list[dict[str, Any]]) -> None:
        with _translated(f"editing annotation {annotation_id}"):
            await self._sdk.annotations.update(id=annotation_id, result=result)

    async def delete_annotation(self, annotation_id: int) -> None:
        with _translated(f"deleting annotation {annotation_id}"):
            await self._sdk.annotations.delete(id=annotation_id)

    async def add_labeller(self, email: str, password: str) -> str:
        """Signs a person up through the organisation's invitation, as its page does; returns the legacy token.

        A user made by POST /api/users belongs to no organisation and sees nothing, hence the form.
        """
        link = (await self._get("/api/invite", {}, "asking for the invitation link"))["invite_url"]
        doing = f"signing {email} up"
        with _translated(doing):
            async with httpx.AsyncClient(base_url=self.url, timeout=self._http.timeout) as browser:
                page = await browser.get(link)
                secret = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)
                form = {"csrfmiddlewaretoken": secret[1] if secret else "", "email": email, "password": password}
                signed_up = await browser.post(link, data=form, headers={"Referer": f"{self.url}{link}"})
                if signed_up.status_code != httpx.codes.FOUND:
                    raise LabelStudioRefused(f"{email} could not be signed up", hint=_SIGN_UP_HINT)
                return str(json_of(await browser.get("/api/current-user/token"), doing)["token"])

    async def _user_name(self, completed_by: Any) -> str:
        """The e-mail address, or "user 7" for one who left."""
        if isinstance(completed_by, dict):
            return str(completed_by["email"])
        if completed_by not in self._users:
            users = await self._get("/api/users/", {}, "listing the labellers")
            self._users = {user["id"]: user["email"] for user in users}
        return self._users.setdefault(completed_by, f"user {completed_by}")

    # plain requests, for what the SDK lacks or gets wrong

    async def request(self, method: str, path: str, doing: str, **content: Any) -> Any:
        """`content`: `params` or `json`, as httpx takes them."""
        with _translated(doing):
            return json_of(await self._http.request(method, path, **content), doing)

    async def _get(self, path: str, params: dict[str, Any], doing: str) -> Any:
        return await self.request("GET", path, doing, params=params)

    async def _patch(self, path: str, body: dict[str, Any], doing: str) -> Any:
        return await self.request("PATCH", path, doing, json=body)

    async def _post(self, path: str, body: dict[str, Any], doing: str) -> Any:
        return await self.request("POST", path, doing, json=body)


_SIGN_UP_HINT = "The address may be taken already; the password needs at least eight characters."


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except httpx.InvalidURL as error:
        raise LabelStudioRefused(f"{doing}: {error}", hint="Correct label_studio.url.") from error
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise LabelStudioUnavailable(f"{doing}: {type(error).__name__} {error}".rstrip()) from error
    except ParsingError as error:
        raise LabelStudioRefused(f"{doing}: an answer of another form") from error
    except ApiError as error:
        raise error_of(doing, error.status_code or 0, error.body) from error


def _data(task: NewTask) -> dict[str, Any]:
    return {**task.data, ITEM_KEY: task.item_id}


def _meta(task: NewTask) -> dict[str, Any]:
    return {ITEM_KEY: task.item_id, "shown": task.shown}


def _marks(description: str | None, our_project: str) -> bool:
    return (MARKER + our_project) in (description or "").splitlines()


def _condition(name: str, operator: str, kind: str, value: Any) -> dict[str, Any]:
    return {"filter": f"filter:tasks:{name}", "operator": operator, "type": kind, "value": value}


def server_time(moment: datetime) -> str:
    """With microseconds: without them the server answers 500."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _time(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
