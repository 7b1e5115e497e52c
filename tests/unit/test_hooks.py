"""The door for Label Studio's webhook, and what a managed Label Studio may call."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from labeling.database import Database
from labeling.label_studio import LabelStudioServer
from labeling.label_studio_webhook import HEADER, hook_path, hook_secret
from labeling.tables import ArchivedTask, ReviewItem
from service import installation
from service.commands import labels
from service.hints import Announcer, listen
from service.metrics import Metrics
from service.migrations import upgrade
from service.routes.hooks import hook_routes
from service.servers import HOOK_HOST, banned_subnets
from service.settings import load
from service.stack import Stack
from tests.running import eventually, service, settings_for

LABEL_STUDIO = LabelStudioServer("http://127.0.0.1:9", "0" * 40)


@pytest.fixture
def hints() -> list[str]:
    return []


@pytest.fixture
async def door(database: Database, hints: list[str]) -> AsyncIterator[httpx.AsyncClient]:
    routes = hook_routes(LABEL_STUDIO, ["app", "other"], hints.append, Metrics())
    async with (
        service(database, settings_for([]), extra_routes=routes) as ours,
        httpx.AsyncClient(base_url=ours.url, trust_env=False) as client,
    ):
        yield client


async def test_a_genuine_hook_is_a_hint(door: httpx.AsyncClient, hints: list[str]) -> None:
    """Whatever its body says, even none, or one that is no JSON."""
    headers = {HEADER: hook_secret(LABEL_STUDIO, "app")}
    for body in (b"", b'{"action": "ANNOTATION_CREATED"}', b"{"):
        answer = await door.post(hook_path("app"), content=body, headers=headers)
        assert (answer.status_code, answer.content) == (204, b"")
    assert hints == ["app"] * 3


@pytest.mark.parametrize(
    ("project", "headers"),
    [
        ("app", {}),
        ("app", {HEADER: ""}),
        ("app", {HEADER: "0" * 64}),
        ("app", {HEADER: "\xff"}),
        ("app", {HEADER: hook_secret(LABEL_STUDIO, "other")}),
        ("app", {HEADER: hook_secret(LabelStudioServer("http://127.0.0.1:9", "1" * 40), "app")}),
        ("app", {"Authorization": f"Bearer {hook_secret(LABEL_STUDIO, 'app')}"}),
        ("unknown", {HEADER: hook_secret(LABEL_STUDIO, "unknown")}),
    ],
)
async def test_a_forged_hook_is_refused_and_does_nothing(
    door: httpx.AsyncClient, hints: list[str], project: str, headers: dict[str, str]
) -> None:
    """401 for each, so that nothing is learnt about projects either."""
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = await door.post(hook_path(project), json={"action": "ANNOTATION_CREATED"}, headers=raw)  # type: ignore[arg-type]  # bytes are fine
    assert (answer.status_code, answer.json()["code"]) == (401, "forged_hook")
    assert hints == []


def test_the_secret_does_not_show_the_token() -> None:
    """Everybody in the Label Studio project can read its webhooks."""
    assert "0" * 8 not in hook_secret(LABEL_STUDIO, "app")
    assert hook_secret(LABEL_STUDIO, "app") == hook_secret(LabelStudioServer("http://elsewhere", "0" * 40), "app")


def test_label_studio_may_call_nothing_local_but_our_hooks() -> None:
    """Its users can make it fetch addresses: the other servers of this machine and its networks stay shut."""
    banned = [ipaddress.ip_network(subnet) for subnet in banned_subnets()]

    def is_banned(address: str) -> bool:
        return any(ipaddress.ip_address(address) in subnet for subnet in banned)

    local = ("127.0.0.1", "127.83.78.0", "127.83.78.2", "127.255.255.255", "10.1.2.3", "192.168.0.1", "169.254.169.254")
    assert all(map(is_banned, (*local, "::1", "fe80::1", "::ffff:127.0.0.1", "0.0.0.0")))
    assert not is_banned(HOOK_HOST)
    assert not is_banned("8.8.8.8")


async def test_hints_reach_the_process_that_works(postgres_database: str) -> None:
    """`serve` takes the webhook, `work` looks: many hints are few notices."""
    serving, working = Database(postgres_database), Database(postgres_database)
    heard: list[str] = []
    listening = asyncio.create_task(listen(working, heard.append))
    announcer = Announcer(serving)
    async with announcer.running(None):

        async def arrives() -> bool:  # until it listens, notices go nowhere
            announcer.hint("app")
            await asyncio.sleep(0.1)
            return "app" in heard

        await eventually(arrives)
        heard.clear()
        for _ in range(50):
            announcer.hint("app")
            announcer.hint("other")
        await eventually(lambda: set(heard) == {"app", "other"})
        await asyncio.sleep(0.5)
        assert len(heard) <= 6
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await serving.close()
    await working.close()


def installed(tmp_path: Path, **label_studio: Any) -> Path:
    """A settings file of one project, with nothing behind its addresses."""
    (tmp_path / "data").mkdir(exist_ok=True)
    given = "".join(f"{name} = {json.dumps(value)}\n" for name, value in label_studio.items())
    path = tmp_path / "nightschool.toml"
    path.write_text(
        f'data_dir = "{tmp_path / "data"}"\n[http]\nport = 0\n[label_studio]\n{given}'
        '[vllm]\nmanaged = false\n[[vllm.replicas]]\nurl = "http://127.0.0.1:9"\n[mlflow]\nurl = "http://127.0.0.1:9"\n'
        '[[projects]]\nname = "app"\nbase_dir = "/nowhere"\nbase_name = "base"\n',
        encoding="utf-8",
    )
    return path


async def test_a_managed_label_studio_finds_our_hooks_at_a_door_of_its_own(tmp_path: Path) -> None:
    """Both doors lead to one application; where Label Studio is yours, there is one."""
    settings = load(installed(tmp_path, managed=True))
    stack = Stack((), "http://127.0.0.1:9", "0" * 40, "http://127.0.0.1:9")
    front, hooks = installation.listen(settings), installation.listen_for_hooks(settings)
    assert hooks is not None
    assert installation.address(hooks).startswith(f"http://{HOOK_HOST}:")
    async with (
        installation.compose(settings, stack, None, work=True, hook_url=installation.address(hooks)) as composed,
        installation.http_server(composed, front, hooks),
        httpx.AsyncClient(trust_env=False, headers={HEADER: hook_secret(LABEL_STUDIO, "app")}) as client,
    ):
        assert composed.worker is not None
        assert composed.worker.hook_url == installation.address(hooks)
        for door in (front, hooks):
            assert (await client.post(installation.address(door) + hook_path("app"))).status_code == 204
            assert (await client.post(installation.address(door) + hook_path("no"))).status_code == 401
    url = installed(tmp_path, managed=True, webhook_url="https://nightschool.example.org")
    assert installation.listen_for_hooks(load(url)) is None


def test_archived_tasks_are_printed_whole_however_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Page by page, one JSON line each."""
    path = installed(tmp_path, managed=True)
    settings = load(path)
    upgrade(settings.database_url)
    asyncio.run(_archive(settings.database_url, 450))
    labels.archived(path, project=None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["data"]["number"] for line in lines] == list(range(450))
    assert len({line["item_id"] for line in lines}) == 450


async def _archive(url: str, count: int) -> None:
    database = Database(url)
    async with database.write() as session:
        for number in range(count):
            item = ReviewItem(
                id=f"it_{number:04}", project="app", prompt_digest=str(number), messages=[], answer="", score=0.5
            )
            session.add(item)
            await session.flush()
            task = {"data": {"number": number}, "annotations": []}
            session.add(ArchivedTask(item_id=item.id, project="app", labelling_project=1, task_id=number, task=task))
    await database.close()
