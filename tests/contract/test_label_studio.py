"""What the labelling side relies on, shown on the real Label Studio and on the small one of the tests: directly, and
through the proxy of the faults.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from labeling.label_studio import ITEM_KEY, LabelStudioServer, NewTask, OfferedTask, SeenTask
from labeling.label_studio_http import LabelStudioNotFound, LabelStudioRefused, LabelStudioUnavailable
from labeling.label_studio_webhook import HEADER, PATH, is_genuine, keep_webhook
from labeling.labeling_screen import SCREEN, Opinion, as_result, read_result, task_data
from labeling.tables import ReviewItem
from service.servers import HOOK_HOST
from tests.fakes.label_studio import LabelStudioProxy, label_studio_proxy
from tests.fakes.label_studio_server import TOKEN, fake_label_studio
from tests.running import serving

WRONG = as_result(Opinion("wrong", "The right answer.", ("right", "a|b")))


@dataclass(frozen=True)
class Studio:
    url: str
    token: str


@pytest.fixture(params=[pytest.param("real", marks=pytest.mark.slow), "fake"])
def real(request: pytest.FixtureRequest) -> Studio | None:
    """None: the fake. Not async, because the real one is waited for with a loop of its own."""
    if request.param == "fake":
        return None
    found = request.getfixturevalue("label_studio")
    return Studio(found.url, found.token)


@pytest.fixture
async def studio(real: Studio | None) -> AsyncIterator[Studio]:
    if real is not None:
        yield real
        return
    async with fake_label_studio() as (url, _):
        yield Studio(url, TOKEN)


@pytest.fixture(params=["direct", "proxy"])
async def url(request: pytest.FixtureRequest, studio: Studio) -> AsyncIterator[str]:
    """`proxy`: that of the faults, without any."""
    if request.param == "direct":
        yield studio.url
        return
    async with label_studio_proxy(studio.url) as (url, _):
        yield url


@pytest.fixture
async def server(url: str, studio: Studio) -> AsyncIterator[LabelStudioServer]:
    server = LabelStudioServer(url, studio.token)
    yield server
    await server.close()


@pytest.fixture
async def proxied(studio: Studio) -> AsyncIterator[tuple[LabelStudioServer, LabelStudioProxy]]:
    async with label_studio_proxy(studio.url) as (url, proxy):
        server = LabelStudioServer(url, studio.token, timeout_seconds=1)
        yield server, proxy
        await server.close()


@pytest.fixture
async def project(server: LabelStudioServer) -> AsyncIterator[int]:
    project = await server.ensure_project("contract", unique("contract"), SCREEN, 1)
    yield project
    await server.delete_project(project)


def unique(name: str) -> str:
    return f"{name}-{secrets.token_hex(4)}"


def task(item_id: str, score: float = 0.5, **data: str) -> NewTask:
    messages = [{"role": "user", "content": "How?"}]
    item = ReviewItem(project="p", prompt_digest="d", messages=messages, answer="So.", count=1)
    return NewTask(item_id, {**task_data(item), **data}, score)


async def everything(tasks: AsyncIterator[SeenTask]) -> list[SeenTask]:
    return [task async for task in tasks]


async def test_says_its_version_and_whose_token_it_is(server: LabelStudioServer) -> None:
    """`doctor` shows all three."""
    info = await server.check()
    assert info.version.split(".")[0].isdigit()
    assert info.token_kind == "legacy"
    assert "@" in info.user


async def personal_token(server: LabelStudioServer) -> str:
    """Of a person of its own: everybody may have one only."""
    legacy = await server.add_labeller(f"{unique('personal')}@example.org", secrets.token_urlsafe(12))
    async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Token {legacy}"}) as http:
        return str((await http.post("/api/token/", json={})).json()["token"])


async def test_a_personal_token_works_like_a_legacy_one(server: LabelStudioServer) -> None:
    """It is a refresh token: sent as it is, it would be refused."""
    person = LabelStudioServer(server.url, await personal_token(server))
    assert (await person.check()).token_kind == "personal"
    project = await person.ensure_project("contract", unique("personal"), SCREEN, 1)
    await person.delete_project(project)
    await person.close()


async def test_an_expired_access_token_is_renewed(proxied: tuple[LabelStudioServer, LabelStudioProxy]) -> None:
    """Access tokens live for minutes, the service for months."""
    server, proxy = proxied
    person = LabelStudioServer(server.url, await personal_token(server))
    await person.check()
    proxy.fail("GET", "/api/version", status=401)
    assert (await person.check()).token_kind == "personal"
    assert [path for _, path in proxy.requests].count("/api/token/refresh") == 2
    await person.close()


@pytest.mark.parametrize("token", ["0" * 40, "aaaa.bbbb.cccc"])
async def test_a_wrong_token_is_refused_with_the_cure(url: str, token: str) -> None:
    """Trying again would not help, so it must not look like an outage."""
    server = LabelStudioServer(url, token)
    with pytest.raises(LabelStudioRefused) as caught:
        await server.check()
    assert not caught.value.retryable
    assert "label_studio.token" in caught.value.hint
    await server.close()


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    """Retryable, at once, and it says which address was tried."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        server = LabelStudioServer(url, "0" * 40, timeout_seconds=2)
        with pytest.raises(LabelStudioUnavailable, match=url) as caught:
            await server.check()
    assert caught.value.retryable
    await server.close()


async def test_a_server_that_hangs_is_given_up(proxied: tuple[LabelStudioServer, LabelStudioProxy]) -> None:
    """After timeout_seconds, also when the connection itself is fine."""
    server, proxy = proxied
    proxy.fail("GET", "/api/version", hook=lambda: asyncio.sleep(3))
    with pytest.raises(LabelStudioUnavailable, match="Timeout"):
        await asyncio.wait_for(server.check(), 2.5)


@pytest.mark.parametrize(("status", "error"), [(500, LabelStudioUnavailable), (503, LabelStudioUnavailable)])
@pytest.mark.parametrize("call", ["check", "ensure_project"])
async def test_a_server_in_trouble_is_unavailable(
    proxied: tuple[LabelStudioServer, LabelStudioProxy], status: int, error: type[Exception], call: str
) -> None:
    """Whether the SDK or we ourselves sent the request."""
    server, proxy = proxied
    proxy.fail("GET", "/api/(version|projects)", status=status)
    with pytest.raises(error, match=str(status)):
        await (server.check() if call == "check" else server.ensure_project("x", unique("x"), SCREEN, 1))


async def test_another_web_server_is_named_as_such() -> None:
    """A mistyped address often leads to some page for people: 200 or 404, in HTML."""

    async def some_page(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"<html>Welcome</html>"})

    async with serving(some_page) as url:
        server = LabelStudioServer(url, "0" * 40)
        for call in (server.check(), server.ensure_project("x", "x", SCREEN, 1), server.next_task(1)):
            with pytest.raises(LabelStudioRefused) as caught:
                await call
            assert "label_studio.url" in caught.value.hint
        await server.close()


async def test_a_project_is_made_once(server: LabelStudioServer) -> None:
    """Also by two who ask at the same time; a name that is the start of another's is not taken for it."""
    name = unique("once")
    longer = await server.ensure_project("contract", f"{name}-longer", SCREEN, 1)
    first = await asyncio.gather(*(server.ensure_project("contract", name, SCREEN, 1) for _ in range(2)))
    again = await server.ensure_project("another title", name, SCREEN, 2)
    assert {*first, again} == {again}
    assert again != longer
    for project in (again, longer):
        await server.delete_project(project)


async def test_a_creation_that_was_given_up_and_came_late_leaves_no_second_project(
    proxied: tuple[LabelStudioServer, LabelStudioProxy],
) -> None:
    """Two projects of one title confuse people; the one that has tasks is never touched."""
    server, proxy = proxied
    name = unique("late")
    late = asyncio.Event()
    proxy.fail("POST", "/api/projects", before=late.wait)
    with pytest.raises(LabelStudioUnavailable):
        await server.ensure_project("late", name, SCREEN, 1)
    made = await server.ensure_project("late", name, SCREEN, 1)
    late.set()
    while len(await server._marked_projects(name)) < 2:
        await asyncio.sleep(0.05)
    spare = max(int(project["id"]) for project in await server._marked_projects(name))
    await server.import_tasks(spare, [task("it_a")])
    assert await server.ensure_project("late", name, SCREEN, 1) == made
    assert len(await server._marked_projects(name)) == 2
    await server.delete_tasks(spare, [found.id for found in await everything(server.all_tasks(spare))])
    assert await server.ensure_project("late", name, SCREEN, 1) == made
    assert [project["id"] for project in await server._marked_projects(name)] == [made]
    await server.delete_project(made)


async def test_titles_of_any_length_are_taken(server: LabelStudioServer) -> None:
    """Label Studio wants 3 to 50 characters; our project names are not bound to that."""
    for title in ("x", "long " * 30):
        await server.delete_project(await server.ensure_project(title, unique("title"), SCREEN, 1))


async def test_the_lowest_score_is_offered_first(server: LabelStudioServer, project: int) -> None:
    """The free edition's only queue order, and what the review queue is built on."""
    await server.import_tasks(project, [task(f"it_{score}", score) for score in (0.9, 0.1, 0.5, 0.3)])
    assert await offered(server, project) == ["it_0.1", "it_0.3", "it_0.5", "it_0.9"]


async def test_a_task_with_another_score_moves_in_the_queue(server: LabelStudioServer, project: int) -> None:
    """More users flag the same problem after it was pushed."""
    await server.import_tasks(project, [task("it_a", 0.2), task("it_b", 0.6)])
    found = await server.find_tasks(project, ["it_b"])
    await server.rescore(found["it_b"][0].id, 0.1)
    assert (await next_task(server, project)).item_id == "it_b"
    assert (await server.find_tasks(project, ["it_b"]))["it_b"][0].score == pytest.approx(0.1)


async def test_a_task_that_lost_its_score_gets_one_again(server: LabelStudioServer, project: int) -> None:
    """Somebody chose "delete predictions" in Label Studio."""
    await server.import_tasks(project, [task("it_a", 0.2)])
    found = (await server.find_tasks(project, ["it_a"]))["it_a"][0]
    body = {"selectedItems": {"all": True}}
    await server.request("POST", f"/api/dm/actions?id=delete_tasks_predictions&project={project}", "x", json=body)
    assert (await server.find_tasks(project, ["it_a"]))["it_a"][0].score is None
    await server.rescore(found.id, 0.3)
    assert (await server.find_tasks(project, ["it_a"]))["it_a"][0].score == pytest.approx(0.3)


async def test_two_people_at_once_get_the_two_best(server: LabelStudioServer, project: int, url: str) -> None:
    """What one has before them is not offered to the other; a task that moved up comes first for whoever is next."""
    await server.import_tasks(project, [task(f"it_{score}", score) for score in (0.9, 0.1, 0.5, 0.3)])
    email = f"{unique('second')}@example.org"
    second = LabelStudioServer(url, await server.add_labeller(email, secrets.token_urlsafe(12)))
    first_offer, second_offer = await next_task(server, project), await next_task(second, project)
    assert [first_offer.item_id, second_offer.item_id] == ["it_0.1", "it_0.3"]
    await server.rescore((await server.find_tasks(project, ["it_0.9"]))["it_0.9"][0].id, 0.2)
    await second.annotate(second_offer.id, WRONG)
    assert (await next_task(second, project)).item_id == "it_0.9"
    await second.close()


async def offered(server: LabelStudioServer, project: int) -> list[str | None]:
    order = []
    while (offer := await server.next_task(project)) is not None:
        order.append(offer.item_id)
        await server.annotate(offer.id, WRONG)
    return order


async def next_task(server: LabelStudioServer, project: int) -> OfferedTask:
    offer = await server.next_task(project)
    assert offer is not None
    return offer


async def test_tasks_are_found_by_our_item(server: LabelStudioServer, project: int) -> None:
    """More items than fit into one query; ids that only begin alike are not confused; unknown ones are left out."""
    items = [f"it_{number}" for number in range(1, 121)]
    await server.import_tasks(project, [task(item_id) for item_id in items])
    found = await server.find_tasks(project, [*items, "it_", "it_999"])
    assert sorted(found) == sorted(items)
    assert all(len(tasks) == 1 and tasks[0].shown == task("x").shown for tasks in found.values())


async def test_every_task_is_listed_once_whatever_their_number(server: LabelStudioServer, project: int) -> None:
    """Over several pages, while tasks on the first are deleted."""
    items = [f"it_{number}" for number in range(450)]
    await server.import_tasks(project, [task(item_id) for item_id in items])
    seen = []
    async for found in server.all_tasks(project):
        seen.append(found.item_id)
        if len(seen) == 1:
            await server.delete_tasks(project, [found.id])
    assert sorted(filter(None, seen)) == sorted(items)


async def test_deleting_twice_is_fine(server: LabelStudioServer, project: int) -> None:
    """A killed clean-up is simply done again."""
    await server.import_tasks(project, [task("it_a"), task("it_b")])
    doomed = (await server.find_tasks(project, ["it_a"]))["it_a"][0].id
    for _ in range(2):
        await server.delete_tasks(project, [doomed])
    assert [found.item_id for found in await everything(server.all_tasks(project))] == ["it_b"]


async def test_changes_are_seen_whatever_their_kind(server: LabelStudioServer, project: int) -> None:
    """Annotated, edited, skipped, and an annotation deleted: each makes its task appear since then."""
    await server.import_tasks(project, [task(item_id) for item_id in ("it_a", "it_b", "it_c")])
    ids = {found.item_id: found.id for found in await everything(server.all_tasks(project))}
    first = await server.annotate(ids["it_a"], WRONG, lead_seconds=4.5)
    seen = await since_last(server, project)
    (annotation,) = seen["it_a"].annotations
    assert annotation.id == first
    assert annotation.created_at is not None
    assert read_result(annotation.result) == Opinion("wrong", "The right answer.", ("right", "a|b"))
    assert (annotation.cancelled, annotation.lead_seconds, "@" in annotation.annotator) == (False, 4.5, True)

    await server.annotate(ids["it_b"], [], cancelled=True)
    await server.edit_annotation(first, as_result(Opinion("good", None)))
    later = await changed_after(server, project, seen["it_a"].updated_at)
    assert read_result(later["it_a"].annotations[0].result).verdict == "good"
    assert later["it_a"].annotations[0].created_at == annotation.created_at
    assert later["it_b"].annotations[0].cancelled
    assert "it_c" not in later

    newest = max(found.updated_at for found in later.values())
    await server.delete_annotation(first)
    assert (await changed_after(server, project, newest))["it_a"].annotations == ()


async def test_a_draft_is_no_annotation(server: LabelStudioServer, project: int) -> None:
    """What somebody has typed and not submitted."""
    await server.import_tasks(project, [task("it_a")])
    offer = await next_task(server, project)
    body = {"result": WRONG, "lead_time": 1}
    await server.request("POST", f"/api/tasks/{offer.id}/drafts", "leaving a draft", json=body)
    (seen,) = await everything(server.changed_tasks(project, None))
    assert seen.annotations == ()


async def test_a_change_dates_the_task_after_the_annotation(server: LabelStudioServer, project: int) -> None:
    """By that we tell a deleted annotation from a server that was restored from an older backup."""
    await server.import_tasks(project, [task("it_a")])
    offer = await next_task(server, project)
    annotation = await server.annotate(offer.id, WRONG)
    await server.edit_annotation(annotation, as_result(Opinion("good", None)))
    (seen,) = await everything(server.changed_tasks(project, None))
    assert seen.updated_at >= seen.annotations[0].updated_at
    body = {"selectedItems": {"all": True}}
    await server.request("POST", f"/api/dm/actions?id=delete_tasks_annotations&project={project}", "x", json=body)
    (after,) = await everything(server.changed_tasks(project, None))
    assert after.annotations == ()
    assert after.updated_at >= seen.annotations[0].updated_at


async def test_a_whole_task_can_be_imported_again(server: LabelStudioServer, project: int) -> None:
    """The archive is good for something: data, annotations and who made them."""
    await server.import_tasks(project, [task("it_a", conversation="USER\nWhy?")])
    offer = await next_task(server, project)
    await server.annotate(offer.id, WRONG)
    (whole,) = await server.whole_tasks(project, [offer.id])
    await server.delete_tasks(project, [offer.id])
    assert await server.whole_tasks(project, [offer.id]) == []
    await server.request("POST", f"/api/projects/{project}/import", "importing again", json=[whole])
    (seen,) = await everything(server.changed_tasks(project, None))
    assert read_result(seen.annotations[0].result) == Opinion("wrong", "The right answer.", ("right", "a|b"))
    assert seen.annotations[0].annotator == (await server.check()).user


async def test_the_webhook_is_registered_once_and_tells_of_every_annotation(
    server: LabelStudioServer, project: int
) -> None:
    """With its secret, and without what was annotated."""
    calls: list[tuple[str, str, Any]] = []
    async with serving(hearing(calls), HOOK_HOST) as ours:
        for _ in range(2):
            assert await keep_webhook(server, project, "a b/c", ours)
        await server.import_tasks(project, [task("it_a")])
        offer = await next_task(server, project)
        annotation = await server.annotate(offer.id, WRONG)
        await server.edit_annotation(annotation, as_result(Opinion("good", None)))
        await server.delete_annotation(annotation)
        async with asyncio.timeout(10):
            while len(calls) < 3:
                await asyncio.sleep(0.05)
        actions = [body["action"] for _, _, body in calls]
        assert actions == ["ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"]
        assert {path for path, _, _ in calls} == {f"{PATH}/a%20b%2Fc"}
        assert all(is_genuine(server, "a b/c", secret) for _, secret, _ in calls)
        assert not any(is_genuine(server, "another", secret) for _, secret, _ in calls)
        assert all(set(body) == {"action"} for _, _, body in calls)


async def test_the_webhook_moves_and_goes_with_us(server: LabelStudioServer, project: int) -> None:
    """Another address after a restart, a person who switched it off, and an installation without one."""
    hooks = {"params": {"project": project}}
    await keep_webhook(server, project, "p", f"http://{HOOK_HOST}:7000")
    (first,) = await server.request("GET", "/api/webhooks/", "x", **hooks)
    await server.request("PATCH", f"/api/webhooks/{first['id']}/", "x", json={"is_active": False, "url": first["url"]})
    await keep_webhook(server, project, "p", f"http://{HOOK_HOST}:7001/")
    (second,) = await server.request("GET", "/api/webhooks/", "x", **hooks)
    assert (second["id"], second["url"], second["is_active"]) == (
        first["id"],
        f"http://{HOOK_HOST}:7001{PATH}/p",
        True,
    )
    body = {"project": project, "url": "http://8.8.8.8/theirs"}
    await server.request("POST", "/api/webhooks/", "somebody else's", json=body)
    assert not await keep_webhook(server, project, "p", "")
    (left,) = await server.request("GET", "/api/webhooks/", "x", **hooks)
    assert left["url"] == "http://8.8.8.8/theirs"


@pytest.mark.parametrize("address", ["http://127.0.0.1:7000", "http://10.0.0.1", "http://[::1]:7000", "http://nodot"])
async def test_a_webhook_that_label_studio_refuses_is_no_error(
    server: LabelStudioServer, project: int, address: str
) -> None:
    """Polling goes on. A managed Label Studio can call nothing of this machine but our hooks."""
    version = (await server.check()).version
    if tuple(map(int, version.split(".")[:2])) < (1, 23):
        pytest.skip(f"Label Studio {version} takes any address")
    assert not await keep_webhook(server, project, "p", address)
    assert await server.request("GET", "/api/webhooks/", "x", params={"project": project}) == []


def hearing(calls: list[tuple[str, str, Any]]) -> Any:
    async def hear(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        secret = dict(scope["headers"]).get(HEADER.lower().encode(), b"").decode()
        calls.append((scope["raw_path"].decode(), secret, json.loads(body)))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return hear


async def since_last(server: LabelStudioServer, project: int) -> dict[str | None, SeenTask]:
    return await changed_after(server, project, datetime.now(UTC) - timedelta(hours=1))


async def changed_after(server: LabelStudioServer, project: int, moment: datetime) -> dict[str | None, SeenTask]:
    return {found.item_id: found for found in await everything(server.changed_tasks(project, moment))}


async def test_a_whole_second_is_a_moment_too(server: LabelStudioServer, project: int) -> None:
    """Label Studio answers 500 to a time without microseconds, which is how Python writes a whole second."""
    await server.import_tasks(project, [task("it_a")])
    whole = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
    assert set(await changed_after(server, project, whole)) == {"it_a"}
    assert await changed_after(server, project, whole + timedelta(days=1)) == {}


ODD = {
    "html": '<img src=x onerror="alert(1)"><script>alert(1)</script> &amp; {{7*7}} $flagged_answer',
    "emoji and scripts": "🙂👩‍👩‍👧 ñ \u202eright-to-left\u202c 日本語 \u00a0",
    "lines": "a\n\n\tb\r\nc  d ",
    "100 kB": "Ein langer Text. " * 6_000,
    "json": '{"a": "\\n", "b": [null]}',
}


@pytest.mark.parametrize("kind", ODD)
async def test_any_text_comes_back_as_it_was(server: LabelStudioServer, project: int, kind: str) -> None:
    """What the labeller sees is what was asked; what they write is what is trained."""
    text = ODD[kind]
    await server.import_tasks(project, [task("it_a", conversation=text, flagged_answer=text, draft=text)])
    offer = await next_task(server, project)
    assert (offer.data["conversation"], offer.data[ITEM_KEY]) == (text, "it_a")
    await server.annotate(offer.id, as_result(Opinion("wrong", text)))
    seen = await since_last(server, project)
    assert read_result(seen["it_a"].annotations[0].result).correction == text.strip()


async def test_a_second_labeller_has_a_name_and_a_token_of_their_own(server: LabelStudioServer, url: str) -> None:
    """Two people must be told apart; a task for two is offered to both and to each once."""
    project = await server.ensure_project("contract", unique("two"), SCREEN, 2)
    await server.import_tasks(project, [task("it_a")])
    email = f"{unique('second')}@example.org"
    second = LabelStudioServer(url, await server.add_labeller(email, secrets.token_urlsafe(12)))
    for person in (server, second):
        assert await offered(person, project) == ["it_a"]
    (seen,) = await everything(server.changed_tasks(project, None))
    assert sorted(annotation.annotator for annotation in seen.annotations) == sorted(
        [email, (await server.check()).user]
    )
    await server.delete_project(project)
    await second.close()


async def test_an_address_that_is_taken_is_refused(server: LabelStudioServer) -> None:
    """Instead of answering with somebody's token."""
    with pytest.raises(LabelStudioRefused, match="could not be signed up"):
        await server.add_labeller((await server.check()).user, secrets.token_urlsafe(12))


async def test_a_deleted_project_is_not_found(server: LabelStudioServer) -> None:
    """Distinct from an outage: it has to be made again."""
    project = await server.ensure_project("contract", unique("gone"), SCREEN, 1)
    await server.delete_project(project)
    with pytest.raises(LabelStudioNotFound):
        await everything(server.all_tasks(project))
    with pytest.raises(LabelStudioNotFound):
        await server.next_task(project)


async def test_a_bad_task_is_refused_with_label_studios_reason(server: LabelStudioServer, project: int) -> None:
    """So that the one bad task can be named."""
    with pytest.raises(LabelStudioRefused, match="key is expected in task data"):
        await server.import_tasks(project, [NewTask("it_a", {"why": "only this"}, 0.5)])


async def test_a_task_that_breaks_the_server_is_passed_over(server: LabelStudioServer, project: int) -> None:
    """Half a surrogate pair in an annotation: Label Studio stores it and answers 500 to every list with that task."""
    await server.import_tasks(project, [task(f"it_{number}") for number in range(9)])
    ids = {found.item_id: found.id for found in await everything(server.all_tasks(project))}
    await server.annotate(ids["it_8"], WRONG)
    body = b'{"lead_time":1,"result":[{"from_name":"correction","to_name":"answer","type":"textarea",'
    body += b'"value":{"text":["half a pair \\ud83d"]}}]}'
    async with httpx.AsyncClient(base_url=server.url, auth=server._auth, timeout=30) as person:
        await person.post(
            f"/api/tasks/{ids['it_4']}/annotations/", content=body, headers={"Content-Type": "application/json"}
        )
    seen = await since_last(server, project)
    assert {f"it_{number}" for number in range(9)} - set(seen) <= {"it_4"}
    assert read_result(seen["it_8"].annotations[0].result).verdict == "wrong"
