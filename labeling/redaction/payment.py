"""Payment cards (issuer, length and Luhn's digit) and IBANs (the country's length and ISO 7064's mod 97)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from labeling.redaction.check_digits import luhn, mod_97
from labeling.redaction.page import Kind, Page, Span, Words

CARD_WORDS = Words.of(
    *(
        "card",
        "credit",
        "debit",
        "visa",
        "mastercard",
        "amex",
        "american express",
        "diners",
        "maestro",
        "pan",
        "kredit",
    ),
    *(
        "karte",
        "carte",
        "tarjeta",
        "carta",
        "kaart",
        "kort",
        "karta",
        "cartão",
        "cartao",
        "карт",
        "kart",
        "カード",
        "卡",
        "카드",
    ),
)
# Issuers by the first digits, with the lengths that they give out; from ISO/IEC 7812 and the schemes' own tables.
_ISSUERS: tuple[tuple[re.Pattern[str], frozenset[int]], ...] = tuple(
    (re.compile(prefix), frozenset(lengths))
    for prefix, lengths in (
        ("4", (13, 16, 19)),
        (r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),
        (r"3[47]", (15,)),
        (r"6011|64[4-9]|65", (16, 19)),
        (r"30[0-5]|3095|3[689]", (14, 16, 19)),
        (r"35(?:2[89]|[3-8])", (16, 19)),
        (r"62|81", (16, 17, 18, 19)),
        (r"50|5[6-8]|6304|67", (16, 18, 19)),
        (r"220[0-4]|9792", (16,)),
    )
)
_NEEDS_A_WORD = frozenset({13, 14, 17, 18})  # lengths that many other numbers have
_BEFORE, _AFTER = r"(?<![A-Za-z0-9_.\-])(?<!\d[ ,])", r"(?![A-Za-z0-9_]|[-.]\d)"
# A full stop may follow, but no further group after a dot.
_SENTENCE = r"(?![A-Za-z0-9_]|-\d|(?<=\.\d{4})\.\d)"
# Typographic blanks and dashes are read as these: `labeling.redaction.plain`.
_GAP = r"[ ]{1,3}+|[ ]?+[-./][ ]?+"
_SHAPES = (
    re.compile(rf"{_BEFORE}\d{{4}}({_GAP})\d{{4}}\1\d{{4}}\1\d{{4}}(?:\1\d{{3}})?+{_AFTER}"),
    re.compile(rf"{_BEFORE}\d{{4}}({_GAP})\d{{4}}\1\d{{4}}\1\d{{4}}{_SENTENCE}"),
    re.compile(rf"{_BEFORE}\d{{4}}({_GAP})\d{{6}}\1\d{{4,5}}+{_AFTER}"),
    re.compile(rf"{_BEFORE}\d{{13,19}}+{_AFTER}"),
)
# Of gaps that differ it needs a word.
_UNEVEN = re.compile(rf"{_BEFORE}\d{{4}}(?:{_GAP})\d{{4}}(?:{_GAP})\d{{4}}(?:{_GAP})\d{{4}}{_SENTENCE}")


def cards(page: Page) -> Iterator[Span]:
    for shape in (*_SHAPES, _UNEVEN):
        for match in shape.finditer(page.text):
            number = "".join(char for char in match[0] if char.isdigit())
            if not _is_issued(number) or not luhn(number):
                continue
            needs_a_word = shape is _UNEVEN or len(number) in _NEEDS_A_WORD
            if not needs_a_word or page.near(CARD_WORDS, match.start()):
                yield Span(match.start(), match.end(), Kind.CARD)


def _is_issued(number: str) -> bool:
    return len(set(number)) > 1 and any(
        len(number) in lengths and prefix.match(number) is not None for prefix, lengths in _ISSUERS
    )


# Characters -> countries, from the SWIFT registry of IBAN formats.
_IBAN_COUNTRIES = {
    15: "NO",
    16: "BE",
    18: "DK FI FK FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU YE",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
IBAN_LENGTHS = {country: length for length, countries in _IBAN_COUNTRIES.items() for country in countries.split()}
_IBAN_START = re.compile(r"(?<![A-Za-z0-9])([A-Za-z]{2})\d{2}(?=[ \u00a0.\-]?[A-Za-z0-9])")
_IBAN_REST = {
    length: re.compile(rf"(?:[ \u00a0.\-]?+[A-Za-z0-9]){{{length - 4}}}+(?![A-Za-z0-9])")
    for length in set(IBAN_LENGTHS.values())
}


def ibans(page: Page) -> Iterator[Span]:
    for start in _IBAN_START.finditer(page.text):
        length = IBAN_LENGTHS.get(start[1].upper())
        rest = _IBAN_REST[length].match(page.text, start.end()) if length else None
        if rest is None:
            continue
        plain = "".join(char for char in start[0] + rest[0] if char.isalnum()).upper()
        if mod_97(plain[4:] + plain[:4]) == 1:
            yield Span(start.start(), rest.end(), Kind.IBAN)
