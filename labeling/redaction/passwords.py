"""Secrets without a maker's mark: what stands after a name such as `api_key =` or `password:`, in an Authorization
header, or between a URL's user and host.

A value counts when it looks random (keys) or unlike a word (passwords); names of variables and gaps to fill don't.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote

from labeling.redaction.keys import DIFFERENT_CHARACTERS
from labeling.redaction.page import Kind, Page, Span

_GAP = r"[\w-]{0,24}+[\"'`\]\\]{0,4}+\s{0,3}+(?>:=|=>|==?|:)\s{0,3}+"
_KEY_NAME = re.compile(
    r"(?>api[_-]?key|apikey|access[_-]?key|secret|token|auth[_-]?token|credential|private[_-]?key|signing[_-]?key)"
    r"(?P<rest>" + _GAP + r")[\\\"'`]{0,3}+(?:Bearer |Basic |Token )?",
    re.IGNORECASE,
)
_KEY_VALUE = re.compile(r"[A-Za-z0-9+/=_.~-]{16,512}+")
_PASSWORD_NAME = re.compile(
    r"(?>password|passwd|passphrase|passwort|kennwort|passcode|mot de passe|contraseña|contrasena|senha|wachtwoord|"
    r"lösenord|adgangskode|passord|salasana|hasło|heslo|jelszó|parolă|parola|şifre|пароль|密码|パスワード|비밀번호|"
    r"(?<![A-Za-z])(?:pass|pwd|pw))(?P<rest>" + _GAP + r")(?P<quote>[\\]?[\"'`]?)",
    re.IGNORECASE,
)
_PASSWORD_SAID = re.compile(
    r"(?>password|passphrase|passcode|passwort|kennwort|mot de passe|contraseña|senha|wachtwoord|lösenord|passord|"
    r"salasana|hasło|heslo|parola|пароль)\s{1,3}+(?>is|was|lautet|ist|est|es|è|é|är|er|on|to|je)\s{1,3}+(?P<quote>[\"'`“„]?)",
    re.IGNORECASE,
)
_QUOTED = {quote: re.compile(rf"[^{quote}\s\\]{{4,128}}+(?={quote})") for quote in "\"'`"}
_PLAIN = re.compile(r"(?:[^\s\"'`,;<>&\\”“]|&(?![\w.-]{1,40}+=)){4,128}+")  # & may begin the next field of a form
_NO_NAME = re.compile(
    r"(?:min|max|count|length|len|name|id|file|path|url|type|policy|field|hash|expir|ttl|limit|budget)", re.I
)
_WORDS = re.compile(r"[a-z]{1,128}+(?:[_./-][a-z0-9]{1,128}+){2,32}+")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)
LONG, LOWEST_SHARE = 32, 0.25
LONG_ENOUGH = 8
_SYMBOLS = frozenset("!#$%&?@^*~+=")
_AUTHORIZATION = re.compile(r"(?>bearer|basic|token)\s{1,3}+(?P<value>[A-Za-z0-9+/=_.~-]{16,4096}+)", re.IGNORECASE)
_IN_URL = re.compile(r"://(?P<user>[^\s/:@\"'<>]{0,64}+):(?P<value>[^\s/@\"'<>]{1,200}+)@")


def assigned_keys(page: Page) -> Iterator[Span]:
    for name in _KEY_NAME.finditer(page.text):
        value = _KEY_VALUE.match(page.text, name.end())
        if value and not _NO_NAME.search(name["rest"]) and looks_random(value[0].rstrip(".")):
            yield Span(value.start(), value.start() + len(value[0].rstrip(".")), Kind.KEY)
    for header in _AUTHORIZATION.finditer(page.text):
        value_text = header["value"].rstrip(".")
        if looks_random(value_text):
            yield Span(header.start("value"), header.start("value") + len(value_text), Kind.KEY)


def passwords(page: Page) -> Iterator[Span]:
    for match in _IN_URL.finditer(page.text):
        if _is_filled_in(match["value"]):
            yield Span(match.start("value"), match.end("value"), Kind.PASSWORD)
    for name in _PASSWORD_NAME.finditer(page.text):
        if not _NO_NAME.search(name["rest"]):
            yield from _value_after(page, name, digits_suffice=True)
    for name in _PASSWORD_SAID.finditer(page.text):
        yield from _value_after(page, name, digits_suffice=False)


def looks_random(value: str) -> bool:
    """Letters and digits mixed as no name of a variable, path or version mixes them."""
    digits = sum(char.isdigit() for char in value)
    letters = sum(char.isalpha() for char in value)
    if letters < 2 or len(set(value)) < DIFFERENT_CHARACTERS + 2:
        return False
    if digits < 2:
        return digits == 1 and len(value) >= LONG and _in_even_cases(value, letters)
    return _UUID.fullmatch(value) is not None or _WORDS.fullmatch(value) is None


def _in_even_cases(value: str, letters: int) -> bool:
    """As in base64: of 40 characters one in a hundred has but one digit. Names in camelCase have few capitals."""
    return LOWEST_SHARE <= sum(char.isupper() for char in value) / letters <= 1 - LOWEST_SHARE


def is_mixed(value: str) -> bool:
    """So long and unlike a word that it is the same secret wherever its characters stand, also joined to others."""
    return len(value) >= LONG_ENOUGH and _is_unlike_a_word(value, digits_suffice=False)


def spellings(kind: str, value: str) -> tuple[str, ...]:
    """As it stands and, last, as it is meant: what a URL writes as p%40ss is p@ss elsewhere."""
    meant = unquote(value) if kind == Kind.PASSWORD else value
    return (value,) if meant == value else (value, meant)


def _value_after(page: Page, name: re.Match[str], *, digits_suffice: bool) -> Iterator[Span]:
    quote = name["quote"][-1:]
    pattern = _QUOTED.get(quote, _PLAIN)
    value = pattern.match(page.text, name.end())
    if value is None:
        return
    text = value[0] if quote in _QUOTED else value[0].rstrip(".,;:)]}")
    if _IN_URL.search(text):
        return  # a connection string: of it, the part between user and host is the password
    if _is_filled_in(text) and _is_unlike_a_word(text, digits_suffice=digits_suffice):
        yield Span(value.start(), value.start() + len(text), Kind.PASSWORD)


def _is_filled_in(value: str) -> bool:
    """No variable (${X}, $X, %X%, {{x}}, <x>), call, or row of one sign."""
    return len(set(value)) > 2 and value[0] not in "$%{<([|" and "(" not in value and "{" not in value


def _is_unlike_a_word(value: str, *, digits_suffice: bool) -> bool:
    if len(value) < 4:
        return False
    inner = value[:-1]
    if value.isdigit():
        return digits_suffice
    has_letter = any(char.isalpha() for char in value)
    return has_letter and (any(char.isdigit() for char in value) or any(char in _SYMBOLS for char in inner))
