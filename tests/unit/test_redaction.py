"""What is found in a text, and what stands in its place."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

import labeling.redaction
from labeling.redaction.page import Kind, Span
from labeling.redaction.redactor import Redactor, placeholders
from labeling.redaction.work import UnboundedWork, steps
from labeling.settings import RedactionSettings
from loop.digests import read_jsonl
from service.bench import redaction as bench
from tests.unit.test_demo_data import PROMPTS

DEFAULT = Redactor(RedactionSettings())
TEXTS = bench.load(bench.TEXTS)
# Beyond this no pattern of ours may work at one position, whatever stands there; most stay below 200.
MOST_STEPS = 20_000


def redact(text: str, **settings: Any) -> str:
    return Redactor(RedactionSettings(**settings)).open().text(text)


def test_each_kind_is_replaced() -> None:
    """Every kind but names is looked for by default."""
    found = {span.kind for text in TEXTS for span in DEFAULT.spans(text.text)}
    assert found == set(Kind) - {Kind.NAME}


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.NAME])
def test_a_kind_can_be_left_out(kind: Kind) -> None:
    """The others stay; what the kind claimed before, another may now find."""
    without = Redactor(RedactionSettings(leave_out=(kind,)))
    assert kind not in {span.kind for text in TEXTS for span in without.spans(text.text)}


def test_nothing_is_replaced_when_off() -> None:
    assert redact("write to a.b@shop.example.com", enabled=False) == "write to a.b@shop.example.com"


def test_measured_texts_are_large_and_apart() -> None:
    """Several hundred, both parts with every kind and with texts that hold nothing; none stands in both."""
    for part in ("tune", "held_out"):
        texts = [text for text in TEXTS if text.part == part]
        assert len(texts) >= 250
        assert {value.kind for text in texts for value in text.values} == set(Kind)
        assert sum(not text.values for text in texts) >= 75
    assert sum(text.part == "later" for text in TEXTS) >= 60
    assert len({text.text for text in TEXTS}) == len(TEXTS)


def test_the_bars_of_the_bench_are_met() -> None:
    """On the held-out part; per kind nothing falls far behind."""
    figures = {figure.figure: figure for figure in bench.run(lambda _: None)}
    assert all(figure.met for figure in figures.values()), figures
    tally = bench.measure([text for text in TEXTS if text.part == "held_out"])
    for kind in set(Kind) - {Kind.NAME}:
        assert tally.recall([kind]) >= 0.85, kind
        assert tally.precision([kind]) >= 0.85, kind


def test_a_miss_and_a_false_alarm_count() -> None:
    """The measure itself: half a value replaced is a miss, a replaced word outside of every value a false alarm."""
    text = bench.Labelled("t", "tune", "a@b.example and 10.9.8.7", (Span(0, 11, "email"), Span(4, 11, "ip")))
    tally = bench.measure([text])
    assert (tally.recall(["email"]), tally.precision(["email"])) == (1.0, 1.0)
    assert (tally.recall(["ip"]), tally.precision(["ip"])) == (0.0, 0.0)


def test_demo_and_probes_are_untouched() -> None:
    """No question, answer or prompt that we ship holds anything to replace."""
    texts = [text for texts in PROMPTS.values() for text in texts]
    for name in ("facts", "general"):
        for row in read_jsonl(bench.TEXTS.parents[1] / "demo_company" / f"{name}.jsonl"):
            texts += itertools.chain.from_iterable([v] if isinstance(v, str) else v for v in row.values())
    assert len(texts) > 1000
    assert [text for text in texts if DEFAULT.spans(text)] == []


def test_same_value_same_placeholder() -> None:
    """In prompt, answer and correction, whatever its case and separators; other values get other numbers."""
    messages = [
        {"role": "user", "content": "I am Ann@Shop.example, card 4111 1111 1111 1111; my boss is bob@shop.example"},
        {"role": "assistant", "content": "ann@shop.example?"},
    ]
    found = DEFAULT.open().exchange(messages, "Card 4111-1111-1111-1111 of ann@shop.example", ["bob@shop.example"])
    assert found.messages == [
        {"role": "user", "content": "I am <EMAIL_1>, card <CARD_1>; my boss is <EMAIL_2>"},
        {"role": "assistant", "content": "<EMAIL_1>?"},
    ]
    assert (found.answer, found.others) == ("Card <CARD_1> of <EMAIL_1>", ["<EMAIL_2>"])
    assert found.counts == {"email": 5, "card": 2}


def test_a_value_is_known_without_the_word_that_gave_it_away() -> None:
    """The answer repeats a bare number that only the prompt explains, before and after."""
    messages = [{"role": "user", "content": "My phone is 5550123456"}]
    found = DEFAULT.open().exchange(messages, "Noted: 5550123456 (ref. 95550123456).", ["5550123456"])
    assert found.answer == "Noted: <PHONE_1> (ref. 95550123456)."
    assert found.others == ["<PHONE_1>"]


def test_the_question_before_explains_a_bare_number() -> None:
    messages = [
        {"role": "assistant", "content": "What is your phone number?"},
        {"role": "user", "content": "5550123456"},
        {"role": "assistant", "content": "And the order?"},
        {"role": "user", "content": "5550987654"},
    ]
    contents = [message["content"] for message in DEFAULT.open().messages(messages)]
    assert contents[1::2] == ["<PHONE_1>", "5550987654"]


def test_placeholders_that_stand_there_keep_their_numbers() -> None:
    """A user may write one, a labeller sees some: new values get the next number."""
    redaction = DEFAULT.open("<EMAIL_3> and <CARD_1>")
    assert redaction.text("<EMAIL_3> or new@shop.example") == "<EMAIL_3> or <EMAIL_4>"
    found = DEFAULT.open().exchange([{"role": "user", "content": "a@shop.example or <EMAIL_1>"}], "")
    assert found.messages[0]["content"] == "<EMAIL_2> or <EMAIL_1>"


def test_redacting_again_changes_nothing() -> None:
    for text in TEXTS:
        once = DEFAULT.open().text(text.text)
        assert DEFAULT.open().text(once) == once, text.id


def test_every_text_of_a_conversation() -> None:
    """Parts, tool calls, their results, names; roles, types and ids stay, pictures too."""
    arguments = '{"to": "ann@shop.example", "card": 4111111111111111, "note": "first\\nann@shop.example"}'
    messages: list[dict[str, Any]] = [
        {
            "role": "user",
            "name": "ann@shop.example",
            "content": [
                {"type": "text", "text": "I am ann@shop.example"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJDRA=="}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a@b.example", "type": "function", "function": {"name": "send", "arguments": arguments}}
            ],
        },
        {"role": "tool", "tool_call_id": "a@b.example", "content": '{"ip": "10.9.8.7", "n": 3}'},
    ]
    one, two, three = DEFAULT.open().exchange(messages, "").messages
    assert one == {
        "role": "user",
        "name": "<EMAIL_1>",
        "content": [{"type": "text", "text": "I am <EMAIL_1>"}, messages[0]["content"][1]],
    }
    call = two["tool_calls"][0]
    assert call["id"] == "a@b.example"
    assert call["function"]["arguments"] == '{"to": "<EMAIL_1>", "card": "<CARD_1>", "note": "first\\n<EMAIL_1>"}'
    assert three == {"role": "tool", "tool_call_id": "a@b.example", "content": '{"ip": "<IP_1>", "n": 3}'}


def test_public_values_are_kept() -> None:
    """The company's own hotline and addresses, in any spelling, and mail domains as a whole."""
    keep = ("+45 12 34 56 78", "help@shop.example", "@our.example")
    text = "Call +4512345678 or +45 87 65 43 21, mail Help@Shop.example, ann@our.example or ann@your.example"
    assert redact(text, keep=keep) == (
        "Call +4512345678 or <PHONE_1>, mail Help@Shop.example, ann@our.example or <EMAIL_1>"
    )


def test_own_patterns() -> None:
    """They win over ours, and are counted under their own name."""
    settings = RedactionSettings.model_validate({"patterns": [{"name": "member", "regex": r"\bM-\d{6,11}\b"}]})
    found = Redactor(settings).open().exchange([{"role": "user", "content": "I am M-4155550123, call M-123456"}], "")
    assert found.messages[0]["content"] == "I am <MEMBER_1>, call <MEMBER_2>"
    assert found.counts == {"member": 2}


@pytest.mark.parametrize(
    ("regex", "complaint"),
    [
        (r"(a+)+$", "no upper limit"),
        (r"\w*x", "no upper limit"),
        (r"a{3,}", "no upper limit"),
        (r"(?:a{1,30}){1,30}b", "steps"),
        (r"(?:a|a){1,64}b", "steps"),
        (r"(a)?(?(1)b|c)", "conditional"),
        (r"a{0,5}", "nothing at all"),
        (r"(?=a)", "nothing at all"),
        (r"(a", "no regular expression"),
        (r"\p{L}", "no regular expression"),
    ],
)
def test_own_patterns_that_could_stall_are_refused(regex: str, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        RedactionSettings.model_validate({"patterns": [{"name": "own", "regex": regex}]})


@pytest.mark.parametrize("name", ["email", "Two", "", "a b", "1a"])
def test_names_of_own_patterns(name: str) -> None:
    with pytest.raises(ValidationError):
        RedactionSettings.model_validate({"patterns": [{"name": name, "regex": "abc"}]})


def test_names_of_own_patterns_differ() -> None:
    with pytest.raises(ValidationError, match="must differ"):
        RedactionSettings.model_validate({"patterns": [{"name": "own", "regex": "abc"}] * 2})


def patterns_in(value: Any) -> Iterator[re.Pattern[str]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, tuple | list | frozenset):
        for item in value:
            yield from patterns_in(item)
    elif isinstance(value, dict):
        yield from patterns_in(list(value.values()))
    elif type(value).__module__.startswith("labeling.redaction") and hasattr(value, "__dataclass_fields__"):
        yield from patterns_in([getattr(value, name) for name in value.__dataclass_fields__])


def ours() -> list[re.Pattern[str]]:
    modules = [import_module(f"labeling.redaction.{found.name}") for found in iter_modules(labeling.redaction.__path__)]
    return [pattern for module in modules for value in vars(module).values() for pattern in patterns_in(value)]


def test_no_pattern_of_ours_can_stall() -> None:
    """Each has an upper bound of work at any position of any text: the search as a whole is linear."""
    patterns = ours()
    assert len(patterns) > 120
    too_much = {pattern.pattern[:80]: steps(pattern.pattern, pattern.flags) for pattern in patterns}
    assert {pattern: cost for pattern, cost in too_much.items() if cost > MOST_STEPS} == {}


def test_the_bound_counts_what_re_would_do() -> None:
    """Backtracking multiplies, possessive repeats and atomic groups add."""
    assert steps(r"abc") == 3
    assert steps(r"a{0,10}+b{0,10}+c") < 30
    assert steps(r"a{0,10}b{0,10}c") > 100
    assert steps(r"(?:a{0,9}){0,9}b") > 10**8
    assert steps(r"(?>a{0,10}b{0,10})c") < steps(r"a{0,10}b{0,10}c")
    with pytest.raises(UnboundedWork):
        steps("a+")


HOSTILE: dict[str, Callable[[int], str]] = {
    name: (lambda size, unit=unit: unit * (size // len(unit)))  # type: ignore[misc]  # the unit of this line
    for name, unit in {
        "one letter": "a",
        "one digit": "1",
        "at signs": "@",
        "addresses": "a@b.co ",
        "almost addresses": "a@b.",
        "digit pairs": "12 34 56 78 ",
        "announced": "tel 12345678 ",
        "cards": "4111 1111 1111 1111 ",
        "almost cards": "4111 ",
        "dots": "1.1.1.1.",
        "ips": "10.9.8.7 ",
        "colons": "::",
        "almost ibans": "DE00 ",
        "web tokens": "eyJ-",
        "key beginnings": "-----BEGIN " + "PRIVATE KEY-----A\n",
        "urls": "://a:",
        "assignments": "password: ",
        "quotes": 'api_key="',
        "plus": "+1-2",
        "backslashes": "\\n",
        "placeholders": "<EMAIL_1>",
        "brackets": "(",
        "spaces": " ",
    }.items()
}


@pytest.mark.parametrize("name", HOSTILE)
def test_work_grows_with_the_text_and_no_faster(name: str) -> None:
    """Twice the text, at most twice the calls of our code and of re: counted, not timed."""
    small, large = (calls(lambda size=size: DEFAULT.spans(HOSTILE[name](size))) for size in (30_000, 60_000))  # type: ignore[misc]  # bound at once
    assert large <= 2.2 * small + 2_000


def test_a_megabyte_of_all_of_them_comes_to_an_end() -> None:
    """One text, so that what one kind leaves open another may take up."""
    share = 1_000_000 // len(HOSTILE)
    text = "\n".join(make(share) for make in HOSTILE.values())
    assert {span.kind for span in DEFAULT.spans(text)} >= {Kind.EMAIL, Kind.IP, Kind.CARD, Kind.PRIVATE_KEY}


def calls(work: Callable[[], object]) -> int:
    """How many calls `work` makes, of Python and of C."""
    count = 0

    def see(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


PIECES = [
    *"aA1@.:-+ /\\\"'=<>_{}[]é中\n",
    "tel ",
    "key=",
    "password: ",
    "://",
    "<EMAIL_1>",
    "555-012-3456",
    "a@b.example",
]


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
def test_any_text_is_redacted(text: str) -> None:
    """No text raises, and placeholders that stood there still do."""
    once = DEFAULT.open().text(text)
    assert placeholders(text) <= placeholders(once)
    assert DEFAULT.open().text(text) == once
