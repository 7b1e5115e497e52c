"""Labels as training rows: what apps send is made plain where it can be, and named where it can't."""

from __future__ import annotations

from typing import Any

from labeling.answers import answer_text
from labeling.tables import Label, LabelState, Verdict
from loop.fitting_rows import trainable
from loop.training_examples import label_row


def row(name: str, *messages: dict[str, Any]) -> dict[str, Any]:
    label = Label(
        id=name,
        item_id=name,
        project="p",
        state=LabelState.ACCEPTED,
        verdict=Verdict.WRONG,
        messages=list(messages),
        correction="Yes.",
        flagged_answer="No.",
    )
    return label_row(label)


def test_what_is_text_in_other_words_is_trained_on() -> None:
    """Parts of text, the newer name of the system role, a user's name."""
    (kept,), unfit = trainable(
        [
            row(
                "a",
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "name": "ada",
                    "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "open?"}],
                },
            )
        ]
    )
    assert unfit == ()
    assert [(m["role"], m["content"]) for m in kept["messages"]] == [
        ("system", "Be brief."),
        ("user", "Is it open?"),
        ("assistant", "Yes."),
    ]


def test_one_picture_stops_no_night() -> None:
    """It is left out by name; so is a call of a tool; the others train."""
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}
    kept, unfit = trainable(
        [
            row("a", picture),
            row("b", {"role": "user", "content": "hi"}, call),
            row("c", {"role": "user", "content": "hi"}),
        ]
    )
    assert [found["id"] for found in kept] == ["c"]
    assert [line.split()[0] for line in unfit] == ["a", "b"]


def test_a_right_answer_that_calls_tools_is_not_trained_as_text() -> None:
    """Left out by name; JSON that is the answer itself trains."""
    call = {"type": "function", "function": {"name": "door", "arguments": "{}"}}
    said = answer_text({"role": "assistant", "content": "I look.", "tool_calls": [call]})
    assert said.startswith("I look.")
    rows = [row(name, {"role": "user", "content": "hi"}) for name in ("a", "b")]
    rows[0]["messages"][-1]["content"] = said
    rows[1]["messages"][-1]["content"] = '[{"name": "door"}]'
    kept, unfit = trainable(rows)
    assert [found["id"] for found in kept] == ["b"]
    assert "calls tools" in unfit[0]
