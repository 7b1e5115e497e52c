"""Items out to the real Label Studio and labels back, through every interruption that we know of."""

from __future__ import annotations

import asyncio
import secrets
from datetime import timedelta

import pytest
from sqlalchemy import update

from labeling.database import now
from labeling.label_studio import LabelStudioServer
from labeling.label_studio_http import LabelStudioUnavailable
from labeling.labeling_screen import Opinion, as_result, task_data
from labeling.pull import pull
from labeling.settings import LabelingSettings
from labeling.tables import Annotation, GoodAnswer, ItemState, LabellingProject, LabelState, ReviewItem, Verdict
from tests.fakes.label_studio import LabelStudioProxy
from tests.integration.labelling.desk import NO_SWEEP, WRONG, Desk, MakeDesk, both
from tests.running import rows

# out


async def test_labellers_get_the_best_item_first(desk: Desk) -> None:
    """Whatever order the items came in."""
    items = await desk.flagged(0.2, 0.9, 0.5)
    assert (await desk.push()).sent == 3
    order = []
    while (offer := await desk.server.next_task(await desk.server_project())) is not None:
        order.append(offer.item_id)
        await desk.server.annotate(offer.id, as_result(WRONG))
    assert order == [items[1].id, items[2].id, items[0].id]


async def test_pushing_twice_is_pushing_once(desk: Desk) -> None:
    """The worker pushes every few seconds."""
    (item,) = await desk.flagged(0.5)
    assert (await desk.push()).sent == 1
    assert (await desk.push()).sent == 0
    assert [task.item_id for task in await desk.tasks()] == [item.id]
    stored = await desk.item(item)
    assert (stored.state, stored.task_id) == (ItemState.PUSHED, await desk.task_of(item))
    assert stored.pushed_at is not None


@both
async def test_two_pushes_at_once_send_each_item_once(desk: Desk) -> None:
    """A night's first stage and the worker's own round may meet; no task is left twice, none is lost."""
    items = await desk.flagged(*(number / 100 for number in range(60)))
    await asyncio.gather(desk.push(), desk.push(), desk.push())
    tasks = await desk.tasks()
    assert sorted(str(task.item_id) for task in tasks) == sorted(item.id for item in items)
    for task in tasks:
        row = await desk.item(next(item for item in items if item.id == task.item_id))
        assert (row.task_id, row.state) == (task.id, ItemState.PUSHED)


@both
async def test_killed_between_import_and_our_own_row(
    desk: Desk, faulty: tuple[LabelStudioServer, LabelStudioProxy]
) -> None:
    """The tasks are there, our database doesn't know: they are found again, not sent again."""
    server, proxy = faulty
    items = await desk.flagged(0.5, 0.7)
    await desk.push()
    before = {task.id for task in await desk.tasks()}
    for item in items:
        await desk.change(item, state=ItemState.OPEN, task_id=None, pushed_at=None)
    report = await desk.push(server)
    assert (report.sent, report.found_again) == (0, 2)
    assert not [path for method, path in proxy.requests if method == "POST"]
    assert {task.id for task in await desk.tasks()} == before
    assert (await desk.item(items[0])).state is ItemState.PUSHED


async def test_killed_and_flagged_again_before_the_next_push(desk: Desk) -> None:
    """The task that is found again shows an older answer than its item has now."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    await desk.change(item, state=ItemState.OPEN, task_id=None, pushed_at=None, answer="31 days.")
    report = await desk.push()
    assert (report.sent, report.removed) == (1, 1)
    offer = await desk.server.next_task(await desk.server_project())
    assert offer is not None
    assert (offer.data["flagged_answer"], len(await desk.tasks())) == ("31 days.", 1)


@pytest.mark.parametrize("fault", ["500 after the commit", "timeout after the commit", "500 before"])
async def test_an_import_without_a_good_answer(
    desk: Desk, faulty: tuple[LabelStudioServer, LabelStudioProxy], fault: str
) -> None:
    """It fails as retryable; the next push makes it right, whether the server had committed or not."""
    server, proxy = faulty
    items = await desk.flagged(0.5, 0.7)
    if fault == "timeout after the commit":
        proxy.fail("POST", "/import", hook=lambda: asyncio.sleep(3))
    else:
        proxy.fail("POST", "/import", status=500, forwarded=fault == "500 after the commit")
    with pytest.raises(LabelStudioUnavailable):
        await desk.push(server)
    assert (await desk.item(items[0])).state is ItemState.OPEN
    await desk.push(server)
    assert sorted(str(task.item_id) for task in await desk.tasks()) == sorted(item.id for item in items)
    assert (await desk.item(items[0])).state is ItemState.PUSHED


@both
async def test_an_answer_that_changed_while_it_was_sent(
    desk: Desk, faulty: tuple[LabelStudioServer, LabelStudioProxy]
) -> None:
    """A flag of a newer answer arrives in between: the labeller must be shown what the label will say was shown."""
    server, proxy = faulty
    (item,) = await desk.flagged(0.5)

    async def flagged_again() -> None:
        await desk.change(item, answer="31 days.")

    proxy.fail("POST", "/import", hook=flagged_again)
    await desk.push(server)
    await desk.push(server)
    offer = await desk.server.next_task(await desk.server_project())
    assert offer is not None
    assert (offer.data["flagged_answer"], len(await desk.tasks())) == ("31 days.", 1)


async def test_a_withdrawn_item_leaves_label_studio(desk: Desk) -> None:
    """Also when it was withdrawn while nobody had recorded its task."""
    gone, lost, stays = await desk.flagged(0.5, 0.6, 0.7)
    await desk.push()
    await desk.change(gone, state=ItemState.WITHDRAWN)
    await desk.change(lost, state=ItemState.WITHDRAWN, task_id=None)
    assert (await desk.push()).removed == 1
    await desk.pull(sweep=True)
    assert [task.item_id for task in await desk.tasks()] == [stays.id]
    assert (await desk.item(gone)).task_id is None


async def test_no_more_than_max_open_tasks_and_the_best_of_them(make_desk: MakeDesk) -> None:
    """The next ones follow when some are labelled."""
    desk = make_desk(max_open_tasks=2)
    low, middle, high = await desk.flagged(0.1, 0.5, 0.9)
    await desk.push()
    assert {task.item_id for task in await desk.tasks()} == {middle.id, high.id}
    await desk.annotate(high, WRONG)
    await desk.pull()
    await desk.push()
    assert (await desk.item(low)).state is ItemState.PUSHED


async def test_one_task_that_label_studio_refuses_holds_up_no_other(
    desk: Desk, faulty: tuple[LabelStudioServer, LabelStudioProxy]
) -> None:
    """It is named with the reason; the others are there."""
    server, proxy = faulty
    first, second = await desk.flagged(0.9, 0.5)
    for _ in range(2):  # the batch, then the first item alone
        proxy.fail("POST", "/import", status=400, forwarded=False)
    report = await desk.push(server)
    assert list(report.refused) == [first.id]
    assert "broken by the test" in report.refused[first.id]
    assert (await desk.item(second)).state is ItemState.PUSHED
    assert (await desk.item(first)).state is ItemState.OPEN


async def test_text_that_no_database_stores_is_sent_all_the_same(desk: Desk) -> None:
    """NUL, a lone surrogate, content in parts, a missing role: an app's conversations are not ours to choose."""
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
    (item,) = await desk.flagged(0.5, answer="a\0b")
    await desk.change(item, messages=[{"role": "user", "content": parts}, {"content": None}])
    await desk.push()
    offer = await desk.server.next_task(await desk.server_project())
    assert offer is not None
    assert offer.data["conversation"] == "USER\nsee\n[image_url]\n\nUSER\n"
    assert offer.data["flagged_answer"] == "a\ufffdb"


@both
async def test_a_deleted_label_studio_project_is_made_again(desk: Desk) -> None:
    """What was labelled stays labelled; what was not is sent again."""
    done, waiting = await desk.flagged(0.9, 0.5)
    await desk.push()
    await desk.annotate(done, WRONG)
    await desk.pull()
    await desk.server.delete_project(await desk.server_project())
    assert (await desk.pull()).replaced
    assert (await desk.push()).sent == 1
    assert [task.item_id for task in await desk.tasks()] == [waiting.id]
    await desk.pull(sweep=True)
    assert await desk.ready() == ["14 days."]


@both
async def test_deleted_tasks_are_sent_again_unless_labelled(desk: Desk) -> None:
    """Somebody tidied up in Label Studio, or a backup was restored."""
    done, waiting = await desk.flagged(0.9, 0.5)
    await desk.push()
    await desk.annotate(done, WRONG)
    await desk.pull()
    project = await desk.server_project()
    await desk.server.delete_tasks(project, [task.id for task in await desk.tasks()])
    assert (await desk.pull(sweep=True)).reopened == 1
    await desk.push()
    assert [task.item_id for task in await desk.tasks()] == [waiting.id]
    assert await desk.ready() == ["14 days."]


async def test_an_item_flagged_more_often_moves_up(desk: Desk) -> None:
    """Its task exists already: the sweep moves it."""
    late, early = await desk.flagged(0.2, 0.6)
    await desk.push()
    await desk.change(late, score=0.95)
    await desk.pull(sweep=True)
    offer = await desk.server.next_task(await desk.server_project())
    assert offer is not None
    assert offer.item_id == late.id != early.id


# back


@both
async def test_a_correction_becomes_a_label(desk: Desk) -> None:
    """With all that a night needs, and exactly what the labeller was shown."""
    (item,) = await desk.flagged(0.5, held_out=True)
    await desk.push()
    await desk.annotate(item, WRONG)
    assert (await desk.pull()).labels == {"accepted": 1}
    label = await desk.label(item)
    assert label is not None
    assert (label.state, label.verdict, label.held_out) == (LabelState.ACCEPTED, Verdict.WRONG, True)
    assert (label.messages, label.flagged_answer, label.correction) == (item.messages, "30 days.", "14 days.")
    assert label.must_contain == ["14 days|two weeks"]
    assert label.annotators == [(await desk.server.check()).user]
    assert (await desk.item(item)).state is ItemState.LABELLED


@both
async def test_pulling_again_changes_nothing(desk: Desk) -> None:
    """A label that seems edited would be trained again."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    await desk.annotate(item, WRONG)
    await desk.pull()
    before = await desk.label(item)
    for sweep in (False, True):
        report = await desk.pull(sweep=sweep)
        assert (report.annotations, report.labels) == (0, {})
    assert await desk.label(item) == before


@both
async def test_pulls_at_the_same_time_store_each_annotation_once(desk: Desk) -> None:
    """A webhook's look, a poll and a night's first stage may meet."""
    items = await desk.flagged(*(number / 10 for number in range(10)))
    await desk.push()
    for item in items:
        await desk.annotate(item, WRONG)
    await asyncio.gather(*(desk.pull() for _ in range(4)))
    assert sorted(row.item_id for row in await rows(desk.database, Annotation)) == sorted(item.id for item in items)
    assert await desk.ready() == ["14 days."] * 10


@both
async def test_an_edited_annotation_edits_the_label(desk: Desk) -> None:
    """And the label's time says so."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    annotation = await desk.annotate(item, WRONG)
    await desk.pull()
    before = await desk.label(item)
    await desk.server.edit_annotation(annotation, as_result(Opinion("wrong", "Two weeks.")))
    await desk.pull()
    after = await desk.label(item)
    assert before is not None
    assert after is not None
    assert (after.id, after.correction, after.must_contain) == (before.id, "Two weeks.", [])
    assert after.updated_at > before.updated_at
    assert after.accepted_at == before.accepted_at


@pytest.mark.parametrize("sweep", [False, True])
async def test_a_deleted_annotation_withdraws_the_label(desk: Desk, sweep: bool) -> None:
    """And the item is open to labellers again; a new annotation brings the label back."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    annotation = await desk.annotate(item, WRONG)
    await desk.pull()
    await desk.server.delete_annotation(annotation)
    await desk.pull(sweep=sweep)
    label = await desk.label(item)
    assert label is not None
    assert label.state is LabelState.WITHDRAWN
    assert (await desk.item(item)).state is ItemState.PUSHED
    assert await desk.ready() == []
    await desk.annotate(item, Opinion("wrong", "15 days."))
    await desk.pull()
    assert await desk.ready() == ["15 days."]


async def test_the_sweep_finds_what_the_watermark_hides(desk: Desk) -> None:
    """A server restored from a backup has changes from before our watermark."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    await desk.pull()
    await desk.annotate(item, WRONG)
    async with desk.database.write() as session:
        await session.execute(update(LabellingProject).values(watermark=now() + timedelta(hours=1)))
    assert (await desk.pull()).annotations == 0
    assert (await desk.pull(sweep=True)).annotations == 1
    assert await desk.ready() == ["14 days."]


async def test_a_change_committed_late_is_not_missed(desk: Desk) -> None:
    """Its time is a little before the newest that we have seen."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    await desk.annotate(item, WRONG)
    await desk.pull()
    later = await desk.annotate(item, WRONG)
    async with desk.database.write() as session:
        await session.execute(update(LabellingProject).values(watermark=now() + timedelta(seconds=30)))
    await desk.pull()
    assert later in [row.annotation_id for row in await rows(desk.database, Annotation)]


async def test_the_sweep_comes_by_itself(make_desk: MakeDesk) -> None:
    """Every sweep_seconds, and at the first pull."""
    desk = make_desk(sweep_seconds=1)
    assert [(await desk.pull()).swept, (await desk.pull()).swept] == [True, False]
    await asyncio.sleep(1.1)
    assert (await desk.pull()).swept


async def test_a_skipped_task_is_no_label(desk: Desk) -> None:
    """Until the same labeller comes back to it."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    await desk.server.annotate(await desk.task_of(item), as_result(WRONG), cancelled=True)
    await desk.pull()
    assert await desk.label(item) is None
    assert (await desk.item(item)).state is ItemState.PUSHED
    await desk.annotate(item, WRONG)
    await desk.pull()
    assert await desk.ready() == ["14 days."]


@both
async def test_two_people_must_agree(make_desk: MakeDesk) -> None:
    """One is too few; two who differ are a dispute; when one gives in, the label is accepted."""
    desk = make_desk(annotations_per_item=2)
    (item,) = await desk.flagged(0.5)
    await desk.push()
    await desk.annotate(item, WRONG)
    await desk.pull()
    assert await desk.label(item) is None

    email = f"{secrets.token_hex(4)}@example.org"
    second = LabelStudioServer(desk.server.url, await desk.server.add_labeller(email, secrets.token_hex(8)))
    annotation = await desk.annotate(item, Opinion("wrong", "16 days."), by=second)
    await desk.pull()
    label = await desk.label(item)
    assert label is not None
    assert (label.state, (await desk.item(item)).state) == (LabelState.DISPUTED, ItemState.DISPUTED)
    assert email in str(label.reason)
    assert "16 days." in str(label.reason)
    assert await desk.ready() == []

    await second.edit_annotation(annotation, as_result(Opinion("wrong", " 14  days. ")))
    await desk.pull()
    label = await desk.label(item)
    assert label is not None
    assert label.state is LabelState.ACCEPTED
    assert len(label.annotators) == 2
    await second.close()


async def test_fewer_people_asked_for_later(make_desk: MakeDesk) -> None:
    """Items that wait for a second person are settled by the next sweep."""
    desk = make_desk(annotations_per_item=2)
    (item,) = await desk.flagged(0.5)
    await desk.push()
    await desk.annotate(item, WRONG)
    await desk.pull()
    desk.settings = LabelingSettings(annotations_per_item=1, sweep_seconds=NO_SWEEP)
    async with desk.database.write() as session:  # long ago
        await session.execute(update(LabellingProject).values(watermark=now() + timedelta(hours=1)))
    await desk.pull(sweep=True)
    assert await desk.ready() == ["14 days."]


@both
async def test_a_wrong_flag_makes_a_good_answer(desk: Desk) -> None:
    """It must stay good from now on; when the verdict changes, it no longer counts as good."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    annotation = await desk.annotate(item, Opinion("good", "30 days."))
    await desk.pull()
    (good,) = await rows(desk.database, GoodAnswer)
    assert (good.answer, good.messages, good.prompt_digest) == ("30 days.", item.messages, item.prompt_digest)
    assert await desk.ready() == []
    await desk.server.edit_annotation(annotation, as_result(WRONG))
    await desk.pull()
    assert await rows(desk.database, GoodAnswer) == []
    assert await desk.ready() == ["14 days."]


async def test_a_bad_correction_is_refused_with_its_reason(desk: Desk) -> None:
    """It is never trained on, and the labeller can mend it."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    annotation = await desk.annotate(item, Opinion("wrong", "30 days."))
    await desk.pull()
    label = await desk.label(item)
    assert label is not None
    assert label.state is LabelState.REFUSED
    assert "unchanged" in str(label.reason)
    assert await desk.ready() == []
    await desk.server.edit_annotation(annotation, as_result(WRONG))
    await desk.pull()
    assert await desk.ready() == ["14 days."]


async def test_nothing_is_stored_of_a_withdrawn_item(desk: Desk) -> None:
    """Its person asked to be forgotten; an annotation may still be on its way."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    await desk.annotate(item, WRONG)
    await desk.change(item, state=ItemState.WITHDRAWN)
    await desk.pull(sweep=True)
    assert await rows(desk.database, Annotation) == []
    assert await desk.label(item) is None
    assert await desk.tasks() == []


async def test_tasks_of_others_are_left_alone(desk: Desk) -> None:
    """Somebody imported tasks of their own into our project."""
    (item,) = await desk.flagged(0.5)
    await desk.push()
    project = await desk.server_project()
    data = task_data(item)
    await desk.server._post(f"/api/projects/{project}/import", [{"data": data}], "importing by hand")  # type: ignore[arg-type]  # a list of tasks
    for task in await desk.tasks():
        await desk.server.annotate(task.id, as_result(WRONG))
    await desk.pull(sweep=True)
    assert len(await desk.tasks()) == 2
    assert [row.item_id for row in await rows(desk.database, Annotation)] == [item.id]


async def test_a_server_that_is_down_changes_nothing(desk: Desk) -> None:
    """Both ways fail as retryable; when it is back, everything goes on."""
    (item,) = await desk.flagged(0.5)
    dead = LabelStudioServer("http://127.0.0.1:9", "0" * 40, timeout_seconds=1)
    with pytest.raises(LabelStudioUnavailable):
        await desk.push(dead)
    with pytest.raises(LabelStudioUnavailable):
        await pull(desk.database, dead, desk.project, desk.settings)
    await dead.close()
    assert (await desk.item(item)).state is ItemState.OPEN
    assert (await desk.push()).sent == 1


async def test_the_last_round_of_a_problem_counts(desk: Desk) -> None:
    """Flagged again after its label: two labels of one prompt would contradict each other."""
    (first,) = await desk.flagged(0.5)
    async with desk.database.write() as session:
        again = ReviewItem(
            project=desk.project, prompt_digest=first.prompt_digest, round=2, messages=first.messages, answer="13 days."
        )
        session.add(again)
    await desk.push()
    await desk.annotate(again, Opinion("wrong", "15 days."))
    await desk.pull()
    await desk.annotate(first, WRONG)
    await desk.pull()
    assert await desk.ready() == ["15 days."]
