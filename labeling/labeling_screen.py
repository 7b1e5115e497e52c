"""What a labeller sees and what comes back: the screen, a review item as task data, a result as verdict and correction.

Every field is plain Text: Label Studio has rendered imported HTML before (CVE-2024-26152, CVE-2026-22033). The draft
stands in the box (`value`), not in a prediction: that would be a finished entry, edited only by way of its pencil.
The verdict is drawn above the box but stands below it in the tree: so one Tab enters the box, and Shift+Tab leaves it
for where Label Studio listens to Ctrl+Enter (inside boxes and on choices it does not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from labeling.draws import in_share
from labeling.tables import ReviewItem, Verdict

SCREEN = """<View style="max-width: 62rem; margin: 0 auto; padding-bottom: 2rem">
  <Style>
    .ns-other:has(h4:empty) { display: none }
  </Style>
  <View style="padding: .6rem 1rem; border-left: 4px solid #d97706; background: rgba(217, 119, 6, .09);
               white-space: pre-wrap">
    <Text name="why" value="$why" selectionEnabled="false"/>
  </View>
  <Header value="Conversation" size="5"/>
  <View style="padding: .2rem 1rem; border-left: 4px solid rgba(128, 128, 128, .4); white-space: pre-wrap">
    <Text name="conversation" value="$conversation" selectionEnabled="false"/>
  </View>
  <Header value="$answer_title" size="5"/>
  <View style="padding: .2rem 1rem; border-left: 4px solid #dc2626; white-space: pre-wrap">
    <Text name="answer" value="$flagged_answer" selectionEnabled="false"/>
  </View>
  <View className="ns-other">
    <Header value="$other_title" size="5"/>
    <View style="padding: .2rem 1rem; border-left: 4px solid #dc2626; white-space: pre-wrap">
      <Text name="other" value="$other_answer" selectionEnabled="false"/>
    </View>
  </View>
  <View style="display: flex; flex-direction: column">
    <View style="order: 2">
      <Header value="$draft_title" size="5"/>
      <TextArea name="correction" toName="answer" value="$draft" rows="6" maxSubmissions="1" editable="true"
                showSubmitButton="false" placeholder="Exactly what the model should have said"/>
    </View>
    <View style="order: 3">
      <Header value="Words that a right answer must contain  (optional; one a line, alternatives as a|b)" size="5"/>
      <TextArea name="must_contain" toName="answer" rows="2" editable="true" showSubmitButton="false"
                placeholder="14 days|two weeks"/>
    </View>
    <View style="order: 1">
      <Header value="$verdict_title" size="5"/>
      <Choices name="verdict" toName="answer" choice="single-radio" value="$verdicts" showInline="true" required="true"
               requiredMessage="Choose a verdict first: its key is the number beside it"/>
    </View>
  </View>
  <Header value="Tab enters the box, Shift+Tab leaves it; outside, Ctrl+Enter submits and Ctrl+Space skips" size="6"/>
</View>
"""


COMMENT_SHOWN = 500
ONE_ANSWER = {
    "answer_title": "The flagged answer",
    "other_title": "",
    "verdict_title": "Your verdict  (keys 1 to 4)",
    "draft_title": "The right answer  (wrong or unsafe: edit until you would send it to the user)",
}
TWO_ANSWERS = {
    "answer_title": "First answer",
    "other_title": "Second answer",
    "verdict_title": "Which one is better?  (keys 1 to 5)",
    "draft_title": "A still better answer  (needed where both are bad)",
}
VERDICTS_OF_ONE = [
    {"value": "wrong", "hotkey": "1", "hint": "The answer is wrong: correct it below"},
    {"value": "good", "hotkey": "2", "hint": "The answer is right, the flag was not"},
    {"value": "can't tell", "hotkey": "3", "hint": "It can't be decided from what stands here"},
    {"value": "unsafe", "hotkey": "4", "hint": "Must never be said; a safe answer below is welcome"},
]
VERDICTS_OF_TWO = [
    {"value": "first", "hotkey": "1", "hint": "The first answer is better"},
    {"value": "second", "hotkey": "2", "hint": "The second answer is better"},
    {"value": "both bad", "hotkey": "3", "hint": "Neither would do: write the right answer below"},
    {"value": "can't tell", "hotkey": "4", "hint": "They are equally good, or it can't be decided"},
    {"value": "unsafe", "hotkey": "5", "hint": "One of them must never be said; a safe answer below is welcome"},
]
OFFERED: frozenset[str] = frozenset(Verdict) - {Verdict.PREFERRED} | frozenset(("first", "second", "both bad"))


@dataclass(frozen=True)
class Opinion:
    """What one labeller said; None where nothing was chosen or written."""

    verdict: str | None
    correction: str | None
    must_contain: tuple[str, ...] = ()


class Choice(StrEnum):
    """What is offered where two answers are shown; "can't tell" and "unsafe" are there too."""

    FIRST = "first"
    SECOND = "second"
    BOTH_BAD = "both bad"


def in_order(item: ReviewItem) -> tuple[str, str] | None:
    """First and second answer, in an order that gives nothing away and never changes; None where there is one."""
    if item.other_answer is None:
        return None
    pair = (item.answer, item.other_answer)
    return pair if in_share(f"order:{item.id}", 0.5) else pair[::-1]


def task_data(item: ReviewItem, comments: Sequence[str] = (), users: int = 0) -> dict[str, Any]:
    """The draft, which the labeller edits, is the correction that a user offered, else the flagged answer.

    Of two answers neither is the draft: it is written only where both are bad. `comments`: what users said of it, the
    newest first; `users`: how many different ones, as far as they have names.
    """
    pair = in_order(item)
    shown = pair or (item.answer, "")
    titles, verdicts = (TWO_ANSWERS, VERDICTS_OF_TWO) if pair else (ONE_ANSWER, VERDICTS_OF_ONE)
    return {
        "why": _printable(_why(item, comments, users)),
        "conversation": _printable("\n\n".join(_message(message) for message in item.messages)),
        "flagged_answer": _printable(shown[0]),
        "other_answer": _printable(shown[1]),
        "draft": "" if pair else _printable(item.prefilled or item.answer),
        "verdicts": verdicts,
        **titles,
    }


def as_result(opinion: Opinion) -> list[dict[str, Any]]:
    """As the screen would send it."""
    parts = []
    if opinion.verdict is not None:
        parts.append(_part("verdict", "choices", {"choices": [opinion.verdict]}))
    if opinion.correction:
        parts.append(_text("correction", opinion.correction))
    if opinion.must_contain:
        parts.append(_text("must_contain", "\n".join(opinion.must_contain)))
    return parts


def read_result(result: list[dict[str, Any]]) -> Opinion:
    """Anybody with a token can write any result: parts that the screen could not have made are passed over."""
    values = {str(part.get("from_name")): part.get("value") for part in result if isinstance(part, dict)}
    verdicts = _strings(values.get("verdict"), "choices")
    lines = "\n".join(_strings(values.get("must_contain"), "text")).splitlines()
    return Opinion(
        verdict=next((verdict for verdict in verdicts if verdict in OFFERED), None),
        correction="\n".join(_strings(values.get("correction"), "text")).strip() or None,
        must_contain=tuple(dict.fromkeys(line.strip() for line in lines if line.strip())),
    )


def _strings(value: Any, key: str) -> list[str]:
    found = value.get(key) if isinstance(value, dict) else None
    if isinstance(found, str):
        return [found]
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def _part(name: str, kind: str, value: dict[str, list[str]]) -> dict[str, Any]:
    return {"from_name": name, "to_name": "answer", "type": kind, "value": value}


def _text(name: str, text: str) -> dict[str, Any]:
    return _part(name, "textarea", {"text": [text]})


def _why(item: ReviewItem, comments: Sequence[str], users: int) -> str:
    """Of a pair, the count is of flags and comparisons together."""
    reports = "Flagged" if item.other_answer is None else "Reported"
    reports += " once" if item.count <= 1 else f" {item.count} times"
    reports += f" by {users} users" if users > 1 else ""
    reasons = f": {', '.join(item.reasons)}" if item.reasons else ""
    lines = [f"{reports}{reasons}."]
    if item.other_answer is not None:
        lines.append("A user preferred one of two answers; say which is better.")
    elif item.prefilled:
        lines.append("A user offered the correction below; check it.")
    lines += [f"Answered by {item.served}."] if item.served else []
    said = [f"“{' '.join(comment.split())[:COMMENT_SHOWN]}”" for comment in comments]
    return "\n".join([" ".join(lines), *(["Users say:"] if said else []), *said])


def _message(message: dict[str, Any]) -> str:
    role = str(message.get("role", "user")).upper()
    return f"{role}\n{content_text(message.get('content'))}"


def content_text(content: Any) -> str:
    """OpenAI's content is a text or a list of parts; parts that are not text are named."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", f"[{part.get('type')}]")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _printable(text: str) -> str:
    """Without what a server on PostgreSQL or UTF-8 can't store: NUL and lone surrogates become U+FFFD."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
