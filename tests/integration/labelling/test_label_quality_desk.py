"""Overlap, gold questions and the labelling screen on the real Label Studio; the screen in a real browser."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from playwright.async_api import Page, async_playwright

from labeling.gold import add_gold, gold_questions, parse_gold
from labeling.label_studio import LabelStudioServer, NewTask
from labeling.labeling_screen import SCREEN, Opinion, as_result
from labeling.labelling_projects import labelling_project
from labeling.screen_upkeep import OURS, Screen, ScreenState, digest, keep_screen
from labeling.tables import ItemState, Label, LabelState, ReviewItem, Verdict
from loop.night_view import project_view
from tests.integration.labelling.desk import WRONG, Desk, MakeDesk
from tests.running import rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync")
GOOD = Opinion("good", None)


@dataclass
class Person:
    email: str
    password: str
    server: LabelStudioServer

    async def offered(self, desk: Desk) -> str | None:
        task = await self.server.next_task(await desk.server_project())
        return task.item_id if task else None


@pytest.fixture
async def people(server: LabelStudioServer) -> AsyncIterator[list[Person]]:
    """Three, besides the token's own user."""
    made = []
    for name in ("ann", "bob", "cid"):
        email, password = f"{name}-{secrets.token_hex(4)}@example.org", secrets.token_urlsafe(12)
        token = await server.add_labeller(email, password)
        made.append(Person(email, password, LabelStudioServer(server.url, token)))
    yield made
    for person in made:
        await person.server.close()


async def test_an_item_is_offered_until_enough_people_agree(make_desk: MakeDesk, people: list[Person]) -> None:
    """To a second person by the settings, to a third by their dispute, and to nobody once it is settled."""
    desk, (ann, bob, cid) = make_desk(overlap={"share": 1.0}), people
    first, item = await desk.flagged(0.9, 0.1)
    await desk.push()
    await desk.annotate(first, WRONG, by=cid.server)
    await desk.annotate(item, WRONG, by=ann.server)
    await desk.pull()
    assert await ann.offered(desk), "the other item waits for a second person"
    assert (await desk.item(item)).state is ItemState.PUSHED
    await desk.annotate(first, WRONG, by=ann.server)
    await desk.annotate(item, GOOD, by=bob.server)
    await desk.pull()
    assert (await desk.item(first)).state is ItemState.LABELLED
    assert [await person.offered(desk) for person in (ann, bob, cid)] == [None, None, item.id]
    await desk.annotate(item, WRONG, by=cid.server)
    await desk.pull()
    assert await desk.ready() == ["14 days.", "14 days."]
    label = await desk.label(item)
    assert label is not None
    assert (label.overlap, len(label.annotators)) == (2, 3)
    assert await desk.server.next_task(await desk.server_project()) is None


async def test_an_offer_that_was_changed_by_hand_is_put_right(make_desk: MakeDesk, people: list[Person]) -> None:
    """Label Studio's own setting of annotations a task resets that of every task."""
    desk, (ann, bob, _) = make_desk(overlap={"share": 1.0}), people
    (item,) = await desk.flagged(0.9)
    await desk.push()
    (task,) = await desk.tasks()
    await desk.server.offer_to(task, 1)
    await desk.annotate(item, WRONG, by=ann.server)
    assert await bob.offered(desk) is None
    await desk.pull(sweep=True)
    assert await bob.offered(desk) == item.id


async def test_gold_questions_are_tasks_like_others_and_no_labels(make_desk: MakeDesk, people: list[Person]) -> None:
    """Pushed beside users' items, answered, scored; users' items are counted without them."""
    desk, (ann, *_) = make_desk(gold={"share": 0.5}), people
    body = {"question": "The capital of France?", "answer": "Lyon.", "verdict": "wrong", "must_contain": ["Paris"]}
    await add_gold(desk.database, desk.project, parse_gold([body]))
    items = await desk.flagged(0.9, 0.5)
    assert (await desk.push()).sent == 4
    assert (await desk.push()).sent == 0
    gold = [one for one in await rows(desk.database, ReviewItem) if one.gold_id]
    assert len(gold) == 2
    for one in (*items, *gold):
        await desk.annotate(one, WRONG, by=ann.server)
    report = await desk.pull(sweep=True)
    assert report.labels == {"accepted": 2}
    assert {label.item_id for label in await rows(desk.database, Label)} == {item.id for item in items}
    assert (await project_view(desk.database, desk.project))["items"] == {"labelled": 2}
    assert (await desk.pull(sweep=True)).annotations == 0
    desk.settings = desk.settings.model_copy(update={"archive_after_days": 0})
    await desk.pull(sweep=True)
    assert await desk.tasks() == []
    (question,) = await gold_questions(desk.database, desk.project)
    assert (question["asked"], question["answers"], question["right"]) == (2, 1, 0)


# the screen


async def keep(desk: Desk, **how: Any) -> Screen:
    row = await labelling_project(desk.database, desk.server, desk.project, desk.settings)
    return await keep_screen(desk.database, desk.server, row, **how)


async def test_an_earlier_screen_is_replaced_and_nothing_is_lost(desk: Desk) -> None:
    """After an upgrade: annotations stay, and the tasks that wait get what the new screen shows."""
    done, waiting = await desk.flagged(0.9, 0.5)
    await desk.push()
    await desk.annotate(done, WRONG)
    former, project = SCREEN.replace("Conversation", "Talk"), await desk.server_project()
    await desk.server.set_screen(project, former)
    task = (await desk.server.find_tasks(project, [waiting.id]))[waiting.id][0]
    await desk.server.show(task.id, NewTask(waiting.id, {"conversation": "as an earlier release sent it"}, 0.5))
    row = await labelling_project(desk.database, desk.server, desk.project, desk.settings)
    row.screen = digest(former)
    assert (await keep_screen(desk.database, desk.server, row)).state is ScreenState.UPDATED
    assert digest(await desk.server.screen(project)) == OURS
    offer = await desk.server.next_task(project)
    assert offer is not None
    assert (offer.item_id, offer.data["flagged_answer"]) == (waiting.id, "30 days.")
    assert offer.data["verdicts"]
    await desk.pull(sweep=True)
    assert await desk.ready() == ["14 days."]


async def test_a_screen_changed_by_hand_is_kept_while_it_can_work(desk: Desk) -> None:
    """And said so; without the controls it needs, that is said as trouble, and ours can be put back."""
    (item,) = await desk.flagged(0.9)
    await desk.push()
    project = await desk.server_project()
    theirs = SCREEN.replace("Conversation", "What was said")
    await desk.server.set_screen(project, theirs)
    assert (await keep(desk)).state is ScreenState.CHANGED
    await desk.pull(sweep=True)
    assert digest(await desk.server.screen(project)) == digest(theirs)
    broken = SCREEN.replace('name="correction"', 'name="better"')
    await desk.server.set_screen(project, broken)
    found = await keep(desk)
    assert (found.state, found.missing) == (ScreenState.UNUSABLE, ("TextArea 'correction'",))
    assert "--restore" in found.cure
    assert (await keep(desk, restore=True)).state is ScreenState.UPDATED
    assert (await keep(desk)).state is ScreenState.OURS
    assert (await desk.item(item)).state is ItemState.PUSHED


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    if CHROMIUM is None:
        pytest.skip("NOT TESTED IN A BROWSER: no chromium on this machine")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield await browser.new_page()
        await browser.close()


async def test_labelling_needs_no_mouse(desk: Desk, people: list[Person], page: Page) -> None:
    """A correction, a right answer and a choice between two, with the keys that the screen names."""
    wrong, good = await desk.flagged(0.9, 0.5, reasons=["outdated"])
    (pair,) = await desk.flagged(0.1, answer="Lyon.", other_answer="Paris.")
    await desk.push()
    await _log_in(page, people[0])
    await page.goto(f"{desk.server.url}/projects/{await desk.server_project()}/data?labeling=1")
    await _see(page, "outdated", "How long? (0.9)", "30 days.")
    assert not await page.get_by_text("Second answer").is_visible()
    await page.keyboard.press("1")
    while await page.evaluate("document.activeElement.name") != "correction":
        await page.keyboard.press("Tab")
    await page.keyboard.press("Control+A")
    await page.keyboard.type("14 days.")
    await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("Control+Enter")
    await _see(page, "How long? (0.5)")
    await page.keyboard.press("2")
    await page.keyboard.press("Control+Enter")
    await _see(page, "Second answer", "Lyon.", "Paris.")
    await page.keyboard.press("3")
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.name") == "correction", "one Tab from task to task"
    await page.keyboard.type("Vichy.")
    await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("Control+Enter")
    await page.get_by_text("Vichy.").wait_for(state="hidden")
    await desk.pull()
    labels = [await desk.label(item) for item in (wrong, good, pair)]
    assert [(one.state, one.verdict, one.correction) for one in labels if one] == [
        (LabelState.ACCEPTED, Verdict.WRONG, "14 days."),
        (LabelState.ACCEPTED, Verdict.GOOD, None),
        (LabelState.ACCEPTED, Verdict.WRONG, "Vichy."),
    ]


async def _log_in(page: Page, person: Person) -> None:
    await page.goto(f"{person.server.url}/user/login/")
    await page.fill("#email", person.email)
    await page.fill("#password", person.password)
    async with page.expect_navigation():
        await page.press("#password", "Enter")


async def _see(page: Page, *texts: str) -> None:
    for text in texts:
        await page.get_by_text(text).first.wait_for(timeout=60_000)


async def test_what_anybody_may_write_over_the_api_is_read_alike(desk: Desk) -> None:
    """The names of the choices are the API's, too: "first" and "second" as shown in that task."""
    (pair,) = await desk.flagged(0.5, answer="Lyon.", other_answer="Paris.")
    await desk.push()
    offer = await desk.server.next_task(await desk.server_project())
    assert offer is not None
    await desk.server.annotate(offer.id, as_result(Opinion("second", None)))
    await desk.pull()
    label = await desk.label(pair)
    assert label is not None
    assert (label.correction, label.rejected) == (offer.data["other_answer"], [offer.data["flagged_answer"]])
