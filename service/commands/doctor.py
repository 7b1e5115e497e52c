"""`nightschool doctor`: each part of an installation looked at, and the cure for what is wrong with it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
from rich.console import Console
from rich.markup import escape

from labeling.database import Database
from labeling.embeddings import embedder
from labeling.errors import NightschoolError, Refused
from labeling.label_studio import LabelStudioServer
from labeling.name_recogniser import NameRecogniser
from labeling.screen_upkeep import ScreenState, look
from loop.adapter_files import base_digest
from loop.base_weights import read_weights
from loop.chat_template import chat_template
from loop.mlflow_registry import Registry
from loop.object_store import open_store
from loop.tokenizer_files import TokenizerUnfit, problems, read_tokenizer
from loop.vllm import Replica
from service.commands.local_api import Api, open_api
from service.data_dir import DataDirLock
from service.health import database_check
from service.servers import label_studio_command
from service.settings import Settings, load

ROOM_BYTES = 2_000_000_000
READY_SECONDS = 10
# A checkpoint race with two connections loses committed pages in these (sqlite.org, WAL-reset bug).
SQLITE_BROKEN = ((3, 7, 0), (3, 51, 2))
MLFLOW_DEFAULT_LOGIN = ("admin", "password1234")  # shipped until 3.16.1: CVE-2026-2635


@dataclass(frozen=True)
class Finding:
    name: str
    level: str  # ok | warning | trouble
    detail: str
    cure: str = ""


class Unhealthy(Refused):
    code = "unhealthy"
    default_hint = "The cures stand above."


def run(path: Path, *, as_json: bool) -> None:
    settings = load(path)
    findings = asyncio.run(examine(settings))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _show(findings)
    if any(finding.level == "trouble" for finding in findings):
        raise Unhealthy(f"{sum(f.level == 'trouble' for f in findings)} of {len(findings)} checks found trouble")


async def examine(settings: Settings) -> list[Finding]:
    found = [_python(), _sqlite(settings), _data_dir(settings), *_bases(settings)]
    found.append(await _try("database", lambda: _database(settings)))
    found += await _managed(settings)
    found += _missing(settings)
    for replica in settings.vllm.replicas:
        found.append(await _try(f"vllm {replica.url}", _served(settings, replica.url)))
    if settings.label_studio.url:
        found.append(await _try("label_studio", lambda: _label_studio(settings)))
    found += await labelling_screens(settings)
    if settings.mlflow.url:
        found.append(await _try("mlflow", lambda: _mlflow(settings)))
    found.append(await _try("object_store", lambda: _objects(settings)))
    for folder in dict.fromkeys(project.labeling.embedding_model_dir for project in settings.projects):
        if folder is not None:
            found.append(await _try("embedding_model", _embeds(folder)))
    for folder in dict.fromkeys(project.labeling.redaction.names_model for project in settings.projects):
        if folder is not None:
            found.append(await _try("names_model", _finds_names(folder)))
    return found


def _embeds(folder: Path) -> Callable[[], Awaitable[str]]:
    async def check() -> str:
        model = await asyncio.to_thread(embedder, folder)
        return f"{model.name}, {model.dimensions} dimensions"

    return check


def _finds_names(folder: Path) -> Callable[[], Awaitable[str]]:
    async def check() -> str:
        recogniser = NameRecogniser(folder)
        try:
            return await asyncio.to_thread(recogniser.check)
        finally:
            recogniser.close()

    return check


def _missing(settings: Settings) -> list[Finding]:
    """Without one of these the file loads, and nothing works."""
    there = {
        "vllm": settings.vllm.managed or settings.vllm.replicas,
        "label_studio": settings.label_studio.managed or settings.label_studio.url,
        "mlflow": settings.mlflow.managed or settings.mlflow.url,
    }
    cure = "Set managed = true, or say where it runs: url, and for vllm [[vllm.replicas]]."
    return [
        Finding(name, "trouble", f"[{name}] is neither managed nor has it an address", cure)
        for name, found in there.items()
        if not found
    ]


async def _try(name: str, check: Callable[[], Awaitable[str]]) -> Finding:
    try:
        return Finding(name, "ok", await check())
    except NightschoolError as error:
        return Finding(name, "trouble", str(error), error.hint)


def _python() -> Finding:
    return Finding("python", "ok", sys.version.split()[0])


def _sqlite(settings: Settings) -> Finding:
    version = sqlite3.sqlite_version
    if settings.database.url or not SQLITE_BROKEN[0] <= sqlite3.sqlite_version_info <= SQLITE_BROKEN[1]:
        return Finding("sqlite", "ok", version)
    cure = "Nightschool opens the file from one process only, which avoids it; PostgreSQL or SQLite 3.51.3 removes it."
    return Finding("sqlite", "warning", f"{version} has the WAL-reset bug", cure)


def _data_dir(settings: Settings) -> Finding:
    folder = settings.data_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return Finding(
            "data_dir", "trouble", f"{folder}: {error.strerror}", "Give data_dir a place that can be written."
        )
    if not os.access(folder, os.W_OK):
        return Finding(
            "data_dir", "trouble", f"{folder} cannot be written", "Give data_dir a place that can be written."
        )
    free = shutil.disk_usage(folder).free
    if free < ROOM_BYTES:
        return Finding(
            "data_dir", "trouble", f"{free / 1e9:.1f} GB free in {folder}", "A night needs about 2 GB: make room."
        )
    return Finding("data_dir", "ok", f"{folder}, {free / 1e9:.0f} GB free")


def _bases(settings: Settings) -> list[Finding]:
    project = settings.projects[0]
    try:
        weights = read_weights(project.base_dir)
        template = chat_template(project.base_dir, project.chat_template)
        tokenizer = read_tokenizer(project.base_dir)
        wrong = problems(tokenizer, weights.embedding_rows, None) if tokenizer else []
    except NightschoolError as error:
        return [Finding("base", "trouble", str(error), error.hint)]
    if wrong:
        return [Finding("base", "trouble", "; ".join(wrong), TokenizerUnfit.default_hint)]
    if template is None:
        cure = "Name a Jinja file in projects.chat_template."
        return [Finding("base", "trouble", f"{project.base_dir} has no chat template", cure)]
    digest = base_digest(project.base_dir)
    told = f"{project.base_dir} {digest[:19]}…, {weights.parameters:,} parameters, template {template.digest[:19]}…"
    return [Finding("base", "ok", told)]


async def _managed(settings: Settings) -> list[Finding]:
    """Of a running installation, what its /ready says; otherwise whether there is something to start."""
    names = [name for name in ("vllm", "label_studio", "mlflow") if getattr(settings, name).managed]
    holder = DataDirLock.holder(settings.data_dir)
    if not names or holder is None or not holder.serves:
        return [_installed(settings, name) for name in names]
    try:
        async with httpx.AsyncClient(timeout=READY_SECONDS, trust_env=False) as client:
            checks = (await client.get(f"{holder.url}/ready")).json()["checks"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        cure = "It may still be starting: vLLM alone takes half a minute. Its log says what it waits for."
        return [Finding("up", "trouble", f"process {holder.pid} does not answer at {holder.url}: {error}", cure)]
    return [
        Finding(check["name"], "ok" if check["ok"] else "trouble", check["detail"], check["hint"])
        for check in checks
        if check["name"].split()[0] in names
    ]


def _installed(settings: Settings, name: str) -> Finding:
    try:
        if name == "label_studio":
            label_studio_command(settings.label_studio)
        elif find_spec(name) is None:
            raise Unhealthy(f"{name} is not installed", hint="Run `make setup`, or set managed = false and a url.")
    except NightschoolError as error:
        return Finding(name, "trouble", str(error), error.hint)
    return Finding(name, "ok", "managed: started by `nightschool up`")


async def _database(settings: Settings) -> str:
    if not settings.database.url and (info := DataDirLock.holder(settings.data_dir)):
        return f"in use by process {info.pid} at {info.url}"
    database = Database(settings.database_url)
    try:
        return await database_check(database)()
    finally:
        await database.close()


def _served(settings: Settings, url: str) -> Callable[[], Awaitable[str]]:
    async def check() -> str:
        key = settings.vllm.api_key
        replica = Replica(url, api_key=key.get_secret_value() if key else None)
        try:
            names = [model.name for model in await replica.served_models()]
        finally:
            await replica.close()
        base = settings.projects[0].base_name
        if base not in names:
            raise Refused(
                f"serves {', '.join(names) or 'nothing'}, not {base!r}",
                hint="Set base_name to the name that vLLM's --served-model-name gives.",
            )
        return f"serves {', '.join(names)}"

    return check


async def _label_studio(settings: Settings) -> str:
    token = settings.label_studio.token
    assert token is not None, "the settings refuse a url without token"
    server = LabelStudioServer(
        settings.label_studio.url, token.get_secret_value(), settings.label_studio.timeout_seconds
    )
    try:
        info = await server.check()
    finally:
        await server.close()
    return f"{info.version}, {info.token_kind} token of {info.user}"


async def labelling_screens(settings: Settings) -> list[Finding]:
    """Whether what labellers see is ours and can work, asked of a process that runs, else of Label Studio itself."""
    holder = DataDirLock.holder(settings.data_dir.resolve())
    try:
        if holder is not None and holder.serves:
            async with open_api(settings) as api:
                return [await _served_screen(api, project.name) for project in settings.projects]
        if settings.label_studio.url and settings.label_studio.token:
            return await _screens_there(settings)
    except NightschoolError as error:
        return [Finding("labelling screen", "warning", f"could not be looked at: {error}", error.hint)]
    return []


async def _served_screen(api: Api, project: str) -> Finding:
    found = await api.call("GET", f"/v1/projects/{project}/labels/screen")
    return _screen_finding(project, ScreenState(found["state"]), found["detail"], found["cure"])


async def _screens_there(settings: Settings) -> list[Finding]:
    assert settings.label_studio.token is not None
    server = LabelStudioServer(settings.label_studio.url, settings.label_studio.token.get_secret_value())
    findings = []
    try:
        for project in settings.projects:
            number = await server.find_project(project.name)
            if number is not None:  # else it is made by the first push
                screen = look(await server.screen(number), None)
                findings.append(_screen_finding(project.name, screen.state, screen.detail, screen.cure))
    finally:
        await server.close()
    return findings


def _screen_finding(project: str, state: ScreenState, detail: str, cure: str) -> Finding:
    levels = {ScreenState.CHANGED: "warning", ScreenState.UNUSABLE: "trouble"}
    return Finding(f"labelling screen {project}", levels.get(state, "ok"), detail, cure)


async def _mlflow(settings: Settings) -> str:
    m = settings.mlflow
    password = m.password.get_secret_value() if m.password else ""
    if (m.username, password) == MLFLOW_DEFAULT_LOGIN:
        raise Refused(
            f"{m.url} is used with MLflow's known default password (CVE-2026-2635)",
            hint="Change the admin password in MLflow and in the settings.",
        )
    await Registry(m).check()
    return f"{m.url} answers"


async def _objects(settings: Settings) -> str:
    await open_store(settings.object_store, settings.archive_dir).check()
    return settings.object_store.kind


def _show(findings: list[Finding]) -> None:
    console = Console()
    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "trouble": "[red]trouble[/]"}
    for finding in findings:
        console.print(f"{marks[finding.level]:>16}  {finding.name}: {escape(finding.detail)}")
        if finding.cure:
            console.print(f"           cure: {escape(finding.cure)}")
