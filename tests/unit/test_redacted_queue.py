"""Redaction on the way of a feedback: into the queue, to Label Studio, back from a labeller, into training."""

from __future__ import annotations

from typing import Any

import pytest
from sqlmodel import col, select

from labeling.crew import Crew
from labeling.database import Database, new_id, now
from labeling.feedback import fold
from labeling.labeling_screen import Opinion, task_data
from labeling.new_tasks import as_task, shown_comments
from labeling.redacted_items import bring_up_to_date, redacted_opinion
from labeling.redaction.redactor import Redactor
from labeling.redaction.tally import REPLACED
from labeling.settings import LabelingSettings, RedactionSettings
from labeling.settling import settle
from labeling.tables import (
    Annotation,
    Exchange,
    Feedback,
    FeedbackKind,
    GoodAnswer,
    ItemMember,
    ItemState,
    Label,
    LabelState,
    ReviewItem,
    Verdict,
)
from loop.training_examples import label_item, label_row, redacted_good_answers, redacted_labels
from service.metrics import Metrics
from tests.running import PROJECT, rows
from tests.unit.test_feedback import exchange, feedback, store

SETTINGS = LabelingSettings(held_out_share=0)
OFF = LabelingSettings(held_out_share=0, redaction=RedactionSettings(enabled=False))
MAIL, OTHER_MAIL, CARD = "ann@shop.example", "bob@shop.example", "4111 1111 1111 1111"


async def one_item(database: Database, settings: LabelingSettings = SETTINGS) -> ReviewItem:
    await fold(database, PROJECT, settings)
    found: list[ReviewItem] = await rows(database, ReviewItem)
    (item,) = found
    return item


async def flagged(database: Database, text: str, answer: str, **columns: Any) -> None:
    known = exchange(text, answer)
    await store(database, known, feedback(known, **columns))


async def test_an_item_holds_nothing_personal(database: Database) -> None:
    """Prompt, answer, offered correction, reasons and comments, with one placeholder a value; not the exchange."""
    await flagged(
        database,
        f"Write to {MAIL}",
        f"To {OTHER_MAIL}?",
        kind=FeedbackKind.CORRECTION,
        value=f"Written to {MAIL.upper()}.",
        comment=f"I am {MAIL}, card {CARD}",
        reasons=[f"not {OTHER_MAIL}"],
    )
    item = await one_item(database)
    assert item.messages == [{"role": "user", "content": "Write to <EMAIL_1>"}]
    assert (item.answer, item.prefilled, item.reasons) == ("To <EMAIL_2>?", "Written to <EMAIL_1>.", ["not <EMAIL_2>"])
    assert item.redacted == {"email": 5, "card": 1}
    said = await shown_comments(database, [item.id])
    assert said[item.id] == ["I am <EMAIL_1>, card <CARD_1>"]
    shown = "".join(map(str, task_data(item, said[item.id]).values()))
    assert MAIL not in shown
    assert (await rows(database, Exchange))[0].messages[0]["content"] == f"Write to {MAIL}"


@pytest.mark.parametrize("text", [f"data: mail {MAIL}", f"data:text/plain,{MAIL}", f"data:a/b;base64,QUJD,{MAIL}"])
async def test_prose_that_begins_as_a_data_url_is_read(database: Database, text: str) -> None:
    await flagged(database, text, "Yes.")
    assert MAIL not in str((await one_item(database)).messages)


async def test_prompts_that_differ_in_a_value_only_are_one(database: Database) -> None:
    """They train the same text; two items would be two labels for it."""
    await flagged(database, f"Is {MAIL} a customer?", "Yes")
    await flagged(database, f"is {OTHER_MAIL} a customer?", f"{OTHER_MAIL} is")
    item = await one_item(database)
    assert (item.count, item.answer) == (2, "<EMAIL_1> is")


async def test_without_redaction_they_are_two(database: Database) -> None:
    await flagged(database, f"Is {MAIL} a customer?", "Yes")
    await flagged(database, f"is {OTHER_MAIL} a customer?", "Yes")
    await fold(database, PROJECT, OFF)
    assert len(await rows(database, ReviewItem)) == 2


async def test_comments_alone_are_redacted(database: Database) -> None:
    await flagged(database, "When?", "Never")
    await flagged(database, "When?", "Never", kind=FeedbackKind.COMMENT, comment=f"ask {MAIL}")
    item = await one_item(database)
    assert await shown_comments(database, [item.id]) == {item.id: ["ask <EMAIL_1>"]}
    assert {member.comment for member in await rows(database, ItemMember)} == {None, "ask <EMAIL_1>"}


async def test_good_answers_are_redacted(database: Database) -> None:
    """Words that must stand in a right answer too."""
    columns = {"kind": FeedbackKind.RATING, "value": 1.0, "tags": {"must_contain": f"{MAIL}\nsent"}}
    await flagged(database, f"Write to {MAIL}", f"sent to {MAIL}", **columns)
    await fold(database, PROJECT, SETTINGS)
    (good,) = await rows(database, GoodAnswer)
    assert good.messages == [{"role": "user", "content": "Write to <EMAIL_1>"}]
    assert (good.answer, good.must_contain) == ("sent to <EMAIL_1>", ["<EMAIL_1>", "sent"])


async def test_a_good_answer_with_a_value_of_its_own_is_not_kept(database: Database) -> None:
    """No model can be asked to say <EMAIL_1> where the prompt has none; a public value is kept as it is."""
    for text in ("Where do I write?", "Where to?"):
        await flagged(database, text, f"To {MAIL}", kind=FeedbackKind.RATING, value=1.0)
    await fold(database, PROJECT, SETTINGS)
    assert await rows(database, GoodAnswer) == []
    public = LabelingSettings(redaction=RedactionSettings(keep=(MAIL,)))
    await flagged(database, "Whom do I ask?", f"Ask {MAIL}", kind=FeedbackKind.RATING, value=1.0)
    await fold(database, PROJECT, public)
    assert [good.answer for good in await rows(database, GoodAnswer)] == [f"Ask {MAIL}"]


async def test_what_was_replaced_is_counted(database: Database) -> None:
    """Once a feedback, in the process's metrics, by project and kind."""
    project = new_id("counted")  # the tally is the process's
    message = [{"role": "user", "content": f"{MAIL} and {CARD}"}]
    await store(database, feedback(project=project, messages=message, answer=f"{MAIL}?"))
    for _ in range(2):
        await fold(database, project, SETTINGS)
    assert {kind: places for (of, kind), places in REPLACED.items() if of == project} == {"email": 2, "card": 1}
    text = Metrics().render()[0].decode()
    assert f'nightschool_redacted_total{{kind="email",project="{project}"}} 2.0' in text


async def test_items_from_before_are_redacted_before_they_go_out(database: Database) -> None:
    """Redaction was switched on, or a pattern added, after the item was made."""
    await flagged(database, f"Write to {MAIL}", f"To {MAIL}?", kind=FeedbackKind.CORRECTION, value=f"{MAIL}!")
    item = await one_item(database, OFF)
    assert item.answer == f"To {MAIL}?"
    await bring_up_to_date(database, [item], SETTINGS.redaction)
    assert as_task(item, ()).data["flagged_answer"] == "To <EMAIL_1>?"
    (stored,) = await rows(database, ReviewItem)
    assert stored.messages[0]["content"] == "Write to <EMAIL_1>"
    assert (stored.answer, stored.prefilled, stored.redacted) == ("To <EMAIL_1>?", "<EMAIL_1>!", {"email": 3})
    again = RedactionSettings.model_validate({"patterns": [{"name": "verb", "regex": "Write"}]})
    await bring_up_to_date(database, [stored], again)
    assert stored.messages[0]["content"] == "<VERB_1> to <EMAIL_1>"
    assert stored.redacted == {"email": 3, "verb": 1}


def test_labellers_texts_are_redacted() -> None:
    """Placeholders that were shown keep their meaning; a new value gets a new one, in all that one person wrote."""
    item = ReviewItem(
        project="p",
        prompt_digest="d",
        messages=[{"role": "user", "content": "Write to <EMAIL_1>"}],
        answer="To <EMAIL_2>?",
    )
    opinion = Opinion("wrong", f"To <EMAIL_1> and {MAIL}.", ("<EMAIL_1>", MAIL))
    found = redacted_opinion(opinion, item, RedactionSettings())
    assert found == Opinion("wrong", "To <EMAIL_1> and <EMAIL_3>.", ("<EMAIL_1>", "<EMAIL_3>"))
    untouched = Opinion("good", None, ())
    assert redacted_opinion(untouched, item, RedactionSettings()) == untouched


@pytest.mark.parametrize(
    ("correction", "state"),
    [("Written to <EMAIL_1>.", LabelState.ACCEPTED), ("Call <PHONE_1>.", LabelState.REFUSED)],
)
async def test_a_correction_that_no_prompt_explains_is_refused(
    database: Database, correction: str, state: LabelState
) -> None:
    """Trained, it would teach the model to say the placeholder; the reason names the cure."""
    await flagged(database, f"Write to {MAIL}", "No")
    item = await one_item(database)
    annotation = Annotation(
        labelling_project=1, annotation_id=1, item_id=item.id, annotator="ann", updated_at=now(), verdict="wrong"
    )
    annotation.correction = correction
    async with database.write() as session:
        session.add(annotation)
        stored = (await session.execute(select(ReviewItem).where(col(ReviewItem.id) == item.id))).scalar_one()
        stored.state = ItemState.PUSHED
        label = await settle(session, stored, LabelingSettings(), Crew())
    assert label is not None
    assert label.state is state
    assert (label.reason is None) == (state is LabelState.ACCEPTED)
    if label.reason:
        assert "<PHONE_1>" in label.reason
        assert "keep" in label.reason


def label(**columns: Any) -> Label:
    known = {"item_id": "it", "project": "p", "state": LabelState.ACCEPTED, "verdict": Verdict.WRONG}
    return Label(**{**known, "messages": [{"role": "user", "content": f"Write to {MAIL}"}], **columns})


def test_what_is_trained_and_examined_is_redacted() -> None:
    """Labels and good answers from before too; both sides of the exam alike. What is redacted stays the same row."""
    raw = label(flagged_answer="No", correction=f"To {MAIL}.", must_contain=[MAIL])
    done = label(messages=[{"role": "user", "content": "To <EMAIL_1>"}], flagged_answer="No", correction="<EMAIL_1>.")
    by = Redactor(RedactionSettings())
    one, two = redacted_labels([raw, done], by)
    assert two is done
    assert label_row(one)["messages"] == [
        {"role": "user", "content": "Write to <EMAIL_1>"},
        {"role": "assistant", "content": "To <EMAIL_1>."},
    ]
    item = label_item(one)
    assert (item.reference, item.must_contain, one.id) == ("To <EMAIL_1>.", ["<EMAIL_1>"], raw.id)
    good = GoodAnswer(project="p", prompt_digest="d", messages=raw.messages, answer=MAIL, must_contain=[MAIL])
    (kept,) = redacted_good_answers([good], by)
    assert (kept.answer, kept.must_contain, kept.messages[0]["content"]) == (
        "<EMAIL_1>",
        ["<EMAIL_1>"],
        "Write to <EMAIL_1>",
    )


async def test_one_that_cannot_be_read_is_not_shown(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where redaction fails nothing goes on raw: that feedback is left out, by name, and stops no other."""
    await flagged(database, "poison", "x")
    await flagged(database, "fine", "y")
    found = Redactor.spans

    def fails(self: Redactor, text: str, *others: Any) -> Any:
        if text == "poison":
            raise RecursionError
        return found(self, text, *others)

    monkeypatch.setattr(Redactor, "spans", fails)
    assert await fold(database, PROJECT, SETTINGS) == 1
    assert [item.messages[0]["content"] for item in await rows(database, ReviewItem)] == ["fine"]
    assert all(row.folded_at for row in await rows(database, Feedback))
