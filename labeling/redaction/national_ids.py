"""National identity, insurance and tax numbers: each country's form, its check digits and, where these leave more than
about one other number in a thousand, a word before it.

Sources: the countries' own descriptions, as collected by Wikipedia's "National identification number".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from labeling.redaction.check_digits import is_date, luhn, mod_11_10, verhoeff, weighted
from labeling.redaction.page import Kind, Page, Span, Words

_BEFORE, _AFTER = r"(?<![A-Za-z0-9_.\-])(?<!\d[ /])", r"(?![A-Za-z0-9_]|[-./]\d)"


@dataclass(frozen=True)
class NationalId:
    """`valid` gets the plain characters, upper case. With `words`, one of them must stand before the number;
    `shape_says` is a form that needs none of them."""

    country: str
    pattern: re.Pattern[str]
    valid: Callable[[str], bool]
    words: Words | None = None
    shape_says: re.Pattern[str] | None = None


def national_ids(page: Page) -> Iterator[Span]:
    for known in KNOWN:
        for match in known.pattern.finditer(page.text):
            plain = "".join(char for char in match[0] if char.isalnum()).upper()
            if known.valid(plain) and _explained(page, known, match):
                yield Span(match.start(), match.end(), Kind.NATIONAL_ID)


def _explained(page: Page, known: NationalId, match: re.Match[str]) -> bool:
    if known.words is None or page.near(known.words, match.start()):
        return True
    return known.shape_says is not None and known.shape_says.fullmatch(match[0]) is not None


def _entry(
    country: str, pattern: str, valid: Callable[[str], bool], words: Words | None = None, shape_says: str = ""
) -> NationalId:
    compiled = re.compile(f"{_BEFORE}(?:{pattern}){_AFTER}")
    return NationalId(country, compiled, valid, words, re.compile(shape_says) if shape_says else None)


def _us(plain: str) -> bool:
    return plain[:3] not in {"000", "666"} and plain[0] != "9" and plain[3:5] != "00" and plain[5:] != "0000"


def _uk_nino(plain: str) -> bool:
    return plain[:2] not in {"BG", "GB", "KN", "NK", "NT", "TN", "ZZ"}


def _uk_nhs(plain: str) -> bool:
    return (11 - weighted(plain, range(10, 1, -1)) % 11) % 11 == int(plain[9])


def _german_tax(plain: str) -> bool:
    """Of the first ten digits one or two come twice or three times, and never three in a row."""
    counts = [plain[:10].count(digit) for digit in set(plain[:10])]
    return plain[0] != "0" and max(counts) in {2, 3} and len(counts) in {8, 9} and mod_11_10(plain)


def _french(plain: str) -> bool:
    number = plain[:13].replace("2A", "19").replace("2B", "18")
    return number.isdigit() and 97 - int(number) % 97 == int(plain[13:])


_DNI = "TRWAGMYFPDXBNJZSQVHLCKE"


def _spanish(plain: str) -> bool:
    number = str("XYZ".index(plain[0])) + plain[1:-1] if plain[0] in "XYZ" else plain[:-1]
    return _DNI[int(number) % 23] == plain[-1]


# Decreto ministeriale 23 dicembre 1976: odd places by this table, even ones by the alphabet.
_ODD_DIGITS = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21)
_ODD_LETTERS = (*_ODD_DIGITS, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
_ODD = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", (*_ODD_DIGITS, *_ODD_LETTERS), strict=True))


def _italian(plain: str) -> bool:
    total = sum(_ODD[char] for char in plain[:15:2])
    total += sum(int(char, 36) - (10 if char.isalpha() else 0) for char in plain[1:15:2])
    return chr(ord("A") + total % 26) == plain[15]


def _dutch(plain: str) -> bool:
    return plain.strip("0") != "" and (weighted(plain, range(9, 1, -1)) - int(plain[8])) % 11 == 0


def _belgian(plain: str) -> bool:
    if not (1 <= int(plain[2:4]) <= 12 and 1 <= int(plain[4:6]) <= 31):
        return False
    return any(97 - int(century + plain[:9]) % 97 == int(plain[9:]) for century in ("", "2"))


def _in_a_century(year: str, month: str, day: str) -> bool:
    return any(is_date(century + int(year), int(month), int(day)) for century in (1900, 2000))


def _swedish(plain: str) -> bool:
    short = plain[-10:]
    return _in_a_century(short[:2], short[2:4], str(int(short[4:6]) % 60 or 60)) and luhn(short)


def _norwegian(plain: str) -> bool:
    one = weighted(plain, (3, 7, 6, 1, 8, 9, 4, 5, 2, 1))
    two = weighted(plain, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1))
    return _in_a_century(plain[4:6], plain[2:4], str(int(plain[:2]) % 40)) and one % 11 == two % 11 == 0


def _danish(plain: str) -> bool:
    """The check digit of old is no longer kept to."""
    return _in_a_century(plain[4:6], plain[2:4], plain[:2])


_HETU = "0123456789ABCDEFHJKLMNPRSTUVWXY"


def _finnish(plain: str) -> bool:
    """Plain has lost a dash as sign of the century."""
    number = plain[:6] + plain[-4:-1]
    return _in_a_century(plain[4:6], plain[2:4], plain[:2]) and _HETU[int(number) % 31] == plain[-1]


def _polish(plain: str) -> bool:
    month = int(plain[2:4]) % 20
    right_date = _in_a_century(plain[:2], str(month), plain[4:6])
    return right_date and weighted(plain, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10 == 0


def _czech(plain: str) -> bool:
    month = int(plain[2:4]) % 50
    right_date = _in_a_century(plain[:2], str(month - 20 if month > 20 else month), plain[4:6])
    return right_date and (len(plain) == 9 or int(plain) % 11 == 0 or (int(plain[:9]) % 11 == 10 and plain[9] == "0"))


def _portuguese(plain: str) -> bool:
    check = 11 - weighted(plain, range(9, 1, -1)) % 11
    return (0 if check > 9 else check) == int(plain[8])


def _brazilian(plain: str) -> bool:
    if len(set(plain)) == 1:
        return False
    one = weighted(plain, range(10, 1, -1)) * 10 % 11 % 10
    two = weighted(plain, range(11, 1, -1)) * 10 % 11 % 10
    return plain[9:] == f"{one}{two}"


def _swiss(plain: str) -> bool:
    return weighted(plain, (1, 3) * 6 + (1,)) % 10 == 0


def _austrian(plain: str) -> bool:
    check = weighted(plain, (3, 7, 9, 0, 5, 8, 4, 2, 1, 6)) % 11
    return plain[0] != "0" and int(plain[6:8]) <= 15 and 1 <= int(plain[4:6]) <= 31 and check == int(plain[3])


def _irish(plain: str) -> bool:
    second = ord(plain[8]) - 64 if len(plain) == 9 and plain[8] != "W" else 0
    return "WABCDEFGHIJKLMNOPQRSTUV"[(weighted(plain[:7], range(8, 1, -1)) + 9 * second) % 23] == plain[7]


def _turkish(plain: str) -> bool:
    digits = [int(char) for char in plain]
    tenth = (7 * sum(digits[:9:2]) - sum(digits[1:8:2])) % 10
    return tenth == digits[9] and sum(digits[:10]) % 10 == digits[10]


def _chinese(plain: str) -> bool:
    total = weighted(plain[:17], (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2))
    return is_date(int(plain[6:10]), int(plain[10:12]), int(plain[12:14])) and "10X98765432"[total % 11] == plain[17]


def _korean(plain: str) -> bool:
    """Since 2020 the last digits are chance."""
    return _in_a_century(plain[:2], plain[2:4], plain[4:6])


def _south_african(plain: str) -> bool:
    return _in_a_century(plain[:2], plain[2:4], plain[4:6]) and plain[10] in "01" and luhn(plain)


def _australian(plain: str) -> bool:
    return weighted(plain, (1, 4, 3, 7, 5, 8, 6, 9, 10)) % 11 == 0


def _romanian(plain: str) -> bool:
    check = weighted(plain, (2, 7, 9, 1, 4, 6, 3, 5, 8, 2, 7, 9)) % 11
    return _in_a_century(plain[1:3], plain[3:5], plain[5:7]) and min(check, 1 if check == 10 else check) == int(
        plain[12]
    )


def _bulgarian(plain: str) -> bool:
    right_date = _in_a_century(plain[:2], str(int(plain[2:4]) % 20), plain[4:6])
    return right_date and weighted(plain, (2, 4, 8, 5, 10, 9, 7, 3, 6)) % 11 % 10 == int(plain[9])


def _baltic(plain: str) -> bool:
    """Estonia's and Lithuania's."""
    check = weighted(plain, (1, 2, 3, 4, 5, 6, 7, 8, 9, 1)) % 11
    if check == 10:
        check = weighted(plain, (3, 4, 5, 6, 7, 8, 9, 1, 2, 3)) % 11 % 10
    return _in_a_century(plain[1:3], plain[3:5], plain[5:7]) and check == int(plain[10])


def _chilean(plain: str) -> bool:
    total = sum(int(digit) * (2 + place % 6) for place, digit in enumerate(reversed(plain[:-1])))
    return "0K987654321"[total % 11] == plain[-1]


_CURP = "0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ"


def _mexican(plain: str) -> bool:
    total = sum(_CURP.index(char) * (18 - place) for place, char in enumerate(plain[:17]))
    return _in_a_century(plain[4:6], plain[6:8], plain[8:10]) and (10 - total % 10) % 10 == int(plain[17])


def _singaporean(plain: str) -> bool:
    total = weighted(plain[1:8], (2, 7, 6, 5, 4, 3, 2)) + {"T": 4, "G": 4, "M": 3}.get(plain[0], 0)
    table = {"S": "JZIHGFEDCBA", "T": "JZIHGFEDCBA", "M": "XWUTRQPNJLK"}.get(plain[0], "XWUTRQPNMLK")
    return (table[10 - total % 11] if plain[0] == "M" else table[total % 11]) == plain[8]


def _japanese(plain: str) -> bool:
    total = weighted(plain, (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)) % 11
    return (0 if total <= 1 else 11 - total) == int(plain[11])


def _always(_: str) -> bool:
    return True


# fmt: off
KNOWN: tuple[NationalId, ...] = (
    _entry("US", r"\d{3}-\d{2}-\d{4}", _us),
    _entry("US", r"\d{3} ?\d{2} ?\d{4}", _us, Words.of("ssn", "social security")),
    _entry("GB", r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]", _uk_nino),
    _entry("GB", r"\d{3}[ -]?\d{3}[ -]?\d{4}", _uk_nhs, Words.of("nhs")),
    _entry("DE", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", _german_tax, Words.of("steuer", "idnr", "id-nr", "tax")),
    _entry("FR", r"[12] ?\d{2} ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}", _french),
    _entry("ES", r"\d{8}-?[A-HJ-NP-TV-Z]|[XYZ]-?\d{7}-?[A-HJ-NP-TV-Z]", _spanish),
    _entry("IT", r"(?i:[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z])", _italian),
    _entry("NL", r"\d{4}\.?\d{2}\.?\d{3}|\d{4} \d{2} \d{3}", _dutch, Words.of("bsn", "burgerservice", "sofi")),
    _entry("BE", r"\d{2}[. ]?\d{2}[. ]?\d{2}[- ]?\d{3}[. ]?\d{2}", _belgian),
    _entry("SE", r"(?:19|20)?\d{6}[-+]\d{4}", _swedish),
    _entry("SE", r"(?:19|20)?\d{10}", _swedish, Words.of("personnummer", "pnr", "personnr")),
    _entry("NO", r"\d{6} ?\d{5}", _norwegian),
    _entry("DK", r"\d{6}[- ]?\d{4}", _danish, Words.of("cpr", "personnummer")),
    _entry("FI", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-FHJ-NPR-Y]", _finnish),
    _entry("PL", r"\d{11}", _polish, Words.of("pesel")),
    _entry("CZ", r"\d{6}/\d{3,4}", _czech),
    _entry("PT", r"[1-35-9]\d{2} ?\d{3} ?\d{3}", _portuguese, Words.of("nif", "contribuinte", "identificação fiscal")),
    _entry("BR", r"\d{3}[. ]?\d{3}[. ]?\d{3}[- ]?\d{2}", _brazilian, Words.of("cpf"), r"\d{3}\.\d{3}\.\d{3}-\d{2}"),
    _entry("CH", r"756[. ]?\d{4}[. ]?\d{4}[. ]?\d{2}", _swiss),
    _entry("AT", r"\d{4}[ -]?\d{6}", _austrian, Words.of("svnr", "sv-nr", "sozialversicherung", "versicherungsnummer")),
    _entry("IE", r"\d{7}[A-W][A-IW]?", _irish, Words.of("pps", "ppsn")),
    _entry("TR", r"[1-9]\d{10}", _turkish, Words.of("tc", "t.c.", "kimlik", "tckn")),
    _entry("IN", r"[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}", verhoeff, Words.of("aadhaar", "aadhar", "uidai", "आधार")),
    _entry("IN", r"[A-Z]{3}[ABCFGHLJPT][A-Z]\d{4}[A-Z]", _always, Words.of("pan", "permanent account")),
    _entry("CN", r"[1-9]\d{5}(?:19|20)\d{9}[\dXx]", _chinese),
    _entry("KR", r"\d{6}-[1-8]\d{6}", _korean),
    _entry("ZA", r"\d{13}", _south_african),
    _entry("CA", r"\d{3}[ -]?\d{3}[ -]?\d{3}", luhn, Words.of("sin", "social insurance", "assurance sociale", "nas")),
    _entry("AU", r"\d{3} ?\d{3} ?\d{3}", _australian, Words.of("tfn", "tax file")),
    _entry("RO", r"[1-8]\d{12}", _romanian),
    _entry("BG", r"\d{10}", _bulgarian, Words.of("егн", "egn")),
    _entry("HR", r"\d{11}", mod_11_10, Words.of("oib")),
    _entry("EE", r"[1-6]\d{10}", _baltic, Words.of("isikukood", "asmens kod", "personal code")),
    _entry("CL", r"\d{1,2}\.?\d{3}\.?\d{3}-?[\dKk]", _chilean, Words.of("rut", "run"), r"\d{1,2}\.\d{3}\.\d{3}-[\dKk]"),
    _entry("MX", r"[A-Z][AEIOUX][A-Z]{2}\d{6}[HMX][A-Z]{2}[B-DF-HJ-NP-TV-Z]{3}[A-Z\d]\d", _mexican),
    _entry("SG", r"[STFGM]\d{7}[A-Z]", _singaporean),
    _entry("IL", r"\d{9}", luhn, Words.of("teudat", "תעודת זהות", "ת.ז")),
    _entry("JP", r"\d{4}[ -]?\d{4}[ -]?\d{4}", _japanese, Words.of("マイナンバー", "個人番号", "my number card")),
)
# fmt: on
