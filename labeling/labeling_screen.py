"""What a labeller sees and what comes back: the screen, a review item as task data, a result as verdict and correction.

Every field is plain Text: Label Studio has rendered imported HTML before (CVE-2024-26152, CVE-2026-22033). The draft
stands in the box (`value`), not in a prediction: that would be a finished entry, edited only by way of its pencil.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labeling.tables import ReviewItem, Verdict

SCREEN = """<View style="max-width: 62rem; margin: 0 auto; padding-bottom: 2rem">
  <View style="padding: .6rem 1rem; border-left: 4px solid #d97706; background: rgba(217, 119, 6, .09)">
    <Text name="why" value="$why" selectionEnabled="false"/>
  </View>
  <Header value="Conversation" size="5"/>
  <View style="padding: .2rem 1rem; border-left: 4px solid rgba(128, 128, 128, .4); white-space: pre-wrap">
    <Text name="conversation" value="$conversation" selectionEnabled="false"/>
  </View>
  <Header value="The flagged answer" size="5"/>
  <View style="padding: .2rem 1rem; border-left: 4px solid #dc2626; white-space: pre-wrap">
    <Text name="answer" value="$flagged_answer" selectionEnabled="false"/>
  </View>
  <Header value="Your verdict  (keys 1 to 4)" size="5"/>
  <Choices name="verdict" toName="answer" choice="single-radio" showInline="true" required="true"
           requiredMessage="Choose a verdict first: keys 1 to 4">
    <Choice value="wrong" hotkey="1" hint="The answer is wrong: correct it below"/>
    <Choice value="good" hotkey="2" hint="The answer is right, the flag was not"/>
    <Choice value="can't tell" hotkey="3" hint="It can't be decided from what stands here"/>
    <Choice value="unsafe" hotkey="4" hint="Must never be said; a safe answer below is welcome"/>
  </Choices>
  <Header value="The right answer  (wrong or unsafe: edit until you would send it to the user)" size="5"/>
  <TextArea name="correction" toName="answer" value="$draft" rows="6" maxSubmissions="1" editable="true"
            showSubmitButton="false" placeholder="Exactly what the model should have said"/>
  <Header value="Words that a right answer must contain  (optional; one a line, alternatives as a|b)" size="5"/>
  <TextArea name="must_contain" toName="answer" rows="2" editable="true" showSubmitButton="false"
            placeholder="14 days|two weeks"/>
  <Header value="Tab leaves a box; then Ctrl+Enter submits, Ctrl+Space skips" size="6"/>
</View>
"""


COMMENT_SHOWN = 500


@dataclass(frozen=True)
class Opinion:
    """What one labeller said; None where nothing was chosen or written."""

    verdict: str | None
    correction: str | None
    must_contain: tuple[str, ...] = ()


def task_data(item: ReviewItem, comments: Sequence[str] = ()) -> dict[str, str]:
    """The draft, which the labeller edits, is the correction that a user offered, else the flagged answer.

    `comments`: what users said of it, the newest first.
    """
    return {
        "why": _printable(_why(item, comments)),
        "conversation": _printable("\n\n".join(_message(message) for message in item.messages)),
        "flagged_answer": _printable(item.answer),
        "draft": _printable(item.prefilled or item.answer),
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
        verdict=next((verdict for verdict in verdicts if verdict in set(Verdict)), None),
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


def _why(item: ReviewItem, comments: Sequence[str]) -> str:
    flags = "Flagged once" if item.count <= 1 else f"Flagged {item.count} times"
    reasons = f": {', '.join(item.reasons)}" if item.reasons else ""
    lines = [f"{flags}{reasons}."]
    if item.prefilled:
        lines.append("A user offered the correction below; check it.")
    lines += [f"Answered by {item.served}."] if item.served else []
    said = [f"“{' '.join(comment.split())[:COMMENT_SHOWN]}”" for comment in comments]
    return " ".join([*lines, *(["Users say:"] if said else []), *said])


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
