"""Values that are written so that patterns miss them, by accident or on purpose; and one secret in many places."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling.redaction.page import Span
from labeling.redaction.passwords import looks_random
from labeling.redaction.plain import Plain, plain
from labeling.redaction.redactor import Redactor
from labeling.settings import RedactionSettings

DEFAULT = Redactor(RedactionSettings())
CARD = "4111 1111 1111 1111"
# Not in one piece with a URL: no scanner of secrets is to trip over this file.
WORD, PLAIN_WORD = "hunter22x", "sunshine"
SECRET = "wJalrXUtnFEMI/KAMDENG/bPxRfiCYEXAMPLEKEYz"  # as AWS gives them, of letters only
EVADED = {
    "dots": CARD.replace(" ", "."),
    "doubled blanks": CARD.replace(" ", "  "),
    "no-break spaces": CARD.replace(" ", "\u00a0"),
    "thin spaces": CARD.replace(" ", "\u2009"),
    "en dashes": CARD.replace(" ", "\u2013"),
    "dashes with blanks": CARD.replace(" ", " \u2013 "),
    "slashes": CARD.replace(" ", "/"),
    "zero-width spaces": "\u200b".join(CARD),
    "soft hyphens": "\u00ad".join(CARD),
    "full width": "".join(chr(ord(char) + 0xFEE0) if char != " " else char for char in CARD),
    "Arabic digits": "".join(chr(0x660 + int(char)) if char != " " else char for char in CARD),
}


def redact(text: str, **settings: object) -> str:
    return Redactor(RedactionSettings.model_validate(settings)).open().text(text)


@pytest.mark.parametrize("way", EVADED)
def test_a_card_is_found_however_it_is_written(way: str) -> None:
    """Nothing of it stays, and nothing around it goes."""
    assert redact(f"It is {EVADED[way]}, I think.") == "It is <CARD_1>, I think."


def test_every_way_to_write_it_is_the_same_card() -> None:
    """Whatever stands in its gaps, where it is written differently in one exchange."""
    redaction = DEFAULT.open()
    assert {redaction.text(written) for written in EVADED.values()} == {"<CARD_1>"}


def test_gaps_that_differ_need_a_word() -> None:
    uneven = "4111  1111 1111-1111"
    assert redact(f"card {uneven}") == "card <CARD_1>"
    assert redact(f"cells {uneven}") == f"cells {uneven}"


@pytest.mark.parametrize(
    "text",
    [
        "Versions 4111.1111.1111.1112 and 4000.2000.1000.3001.",  # Luhn's digit fails
        "4111.1111.1111.1111.5",
        "rows\n4100   4200   4300   4401",
        "2019\u20132023, pages 10\u201320, 3 \u2212 2 = 1, 10\u00b2",
    ],
)
def test_other_numbers_with_such_gaps_stay(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ann\u200b@shop.exam\u200dple.com", "<EMAIL_1>"),
        ("\uff41nn\uff20shop.example.com", "<EMAIL_1>"),
        ("Call +49\u2011170\u2011123\u20114567", "Call <PHONE_1>"),
        ("sk\u200b_live_4eC39HqLyjWDarjtT1zdp7dc", "<KEY_1>"),
        ("pass\u00adword: Sunsh1ne", "pass\u00adword: <PASSWORD_1>"),
        ("\u200bann@shop.example.com\u200b", "\u200b<EMAIL_1>\u200b"),
    ],
)
def test_other_kinds_too(text: str, expected: str) -> None:
    """What is around the value stays as it was sent, zero-width characters as well."""
    assert redact(text) == expected


def test_kept_values_are_kept_in_every_spelling() -> None:
    """`keep` lists public values, and so does an evasion of them."""
    assert redact("me\u200b@shop.example.com", keep=["me@shop.example.com"]) == "me\u200b@shop.example.com"


def test_own_patterns_see_the_same_text() -> None:
    own = [{"name": "member", "regex": r"M-\d{6,8}+"}]
    assert redact("M\u2013\uff11\uff12\uff13456", patterns=own) == "<MEMBER_1>"


@given(st.text(max_size=80), st.integers(0, 80), st.integers(0, 80))
def test_places_lead_back(text: str, one: int, other: int) -> None:
    """Any part of the text that is read comes from a part of the text as sent that reads the same."""
    read = Plain(text)
    start, end = sorted((min(one, len(read.text)), min(other, len(read.text))))
    if start < end:
        span = read.span(Span(start, end, "email"))
        assert plain(text[span.start : span.end]) == read.text[start:end]


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_ascii_is_read_as_it_is(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize("digit", ["", "7"])
def test_a_long_secret_with_one_digit(digit: str) -> None:
    """One in a hundred of AWS's has but one. Without any, it could be a name."""
    secret = SECRET[:-1] + (digit or SECRET[-1])
    assert looks_random(secret) is bool(digit)
    assert (redact(f"aws_secret_access_key = {secret}") == "aws_secret_access_key = <KEY_1>") is bool(digit)


@pytest.mark.parametrize(
    "name",
    [
        "getUserAuthenticationTokenFromRequestHeader1",
        "user_authentication_token_from_request_1",
        "Library/Application_Support/Tokens/Version1",
        "THE_TOKEN_OF_THE_FIRST_USER_IN_THE_LIST_1",
        "aB1",
    ],
)
def test_long_names_with_one_digit_are_no_secrets(name: str) -> None:
    assert redact(f"token = {name}") == f"token = {name}"


def test_a_password_in_a_url_is_replaced_wherever_it_stands() -> None:
    """Also where the whole connection string is called the password, joined to a flag, and before it was given away."""
    text = f"Try mysql -p{WORD}. DB_PASSWORD=postgres://app:{WORD}@db.example/shop did; {WORD} is right."
    assert redact(text) == (
        "Try mysql -p<PASSWORD_1>. DB_PASSWORD=postgres://app:<PASSWORD_1>@db.example/shop did; <PASSWORD_1> is right."
    )


def test_a_url_writes_it_otherwise() -> None:
    """Percent-encoded in the URL, plain beside it: one password."""
    meant = "p@ssw0rd1"
    text = f"postgres://app:{quote(meant)}@db.example and PGPASSWORD='{meant}', {meant}"
    assert redact(text) == "postgres://app:<PASSWORD_1>@db.example and PGPASSWORD='<PASSWORD_1>', <PASSWORD_1>"


def test_a_password_that_is_a_word_is_replaced_as_a_word_only() -> None:
    """Within longer words it says nothing."""
    text = f"redis://u:{PLAIN_WORD}@host; {PLAIN_WORD}, {PLAIN_WORD}s"
    assert redact(text) == "redis://u:<PASSWORD_1>@host; <PASSWORD_1>, sunshines"


def test_digits_are_no_password_within_a_number() -> None:
    assert redact("password: 48151623; order 9481516239") == "password: <PASSWORD_1>; order 9481516239"


def test_a_variable_in_a_url_is_no_password() -> None:
    text = "DB_PASSWORD=postgres://app:${PW}@db.example/shop"
    assert redact(text) == text
