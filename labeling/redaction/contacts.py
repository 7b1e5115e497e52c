"""E-mail addresses and phone numbers.

A phone number is taken by its shape alone only where nothing else looks so: with a country code, in the North American
form, or with a trunk zero and separators. Any other needs a word before it that says what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from labeling.redaction.page import Kind, Page, Span, Words

OTHER_REACH = 16  # characters between "order no." and its number
LOCAL_LENGTH = 64  # RFC 5321, 4.5.3.1
# Letters of scripts that write spaces between words: in others the sentence goes on without one.
_SPACED = r"0-9A-Za-z\u00c0-\u1fff"
_LOCAL = re.compile(rf"[{_SPACED}._%+-]")
_DOMAIN = re.compile(rf"[{_SPACED}_-][{_SPACED}_.-]{{0,252}}+")
_TOP = re.compile(r"[^\W\d_]{2,24}|xn--[a-z0-9-]{2,59}", re.IGNORECASE)
_PIXEL_RATIO = re.compile(r"\d{1,2}x", re.IGNORECASE)  # logo@2x.png
_USERINFO = 160


def emails(page: Page) -> Iterator[Span]:
    text = page.text
    at = text.find("@")
    while at >= 0:
        start, end = _local_start(text, at), _domain_end(text, at + 1)
        if start < at and end and not _is_no_mailbox(text, start, at):
            yield Span(start, end, Kind.EMAIL)
        at = text.find("@", at + 1)


def _local_start(text: str, at: int) -> int:
    start = at
    while start > max(0, at - LOCAL_LENGTH) and _LOCAL.match(text, start - 1):
        start -= 1
    while start < at and not text[start].isalnum():
        start += 1
    return start


def _domain_end(text: str, start: int) -> int:
    """0 where no host name with a top level of letters follows."""
    match = _DOMAIN.match(text, start)
    if match is None:
        return 0
    domain = match[0].rstrip(".-_")
    first, *rest = domain.split(".")
    if not rest or not all((first, *rest)) or not _TOP.fullmatch(rest[-1]) or _PIXEL_RATIO.fullmatch(first):
        return 0
    return start + len(domain)


def _is_no_mailbox(text: str, start: int, at: int) -> bool:
    """git@host names a repository; what stands between :// and @ is the user of a URL."""
    if text[start:at] == "git":
        return True
    scheme = text.rfind("://", max(0, at - _USERINFO), at)
    return scheme >= 0 and not any(char in "/@" or char.isspace() for char in text[scheme + 3 : at])


PHONE_WORDS = Words.of(
    *("phone", "telephone", "tel", "tél", "mobile", "cell", "call", "ring me", "ring us", "whatsapp", "sms", "text me"),
    *("fax", "dial", "landline", "contact number", "contact no", "my number", "reach me", "get me on"),
    *("telefon", "handy", "mobil", "rückruf", "rufen sie", "ruf mich", "meine nummer", "erreichbar", "durchwahl"),
    *("téléphone", "portable", "appelez", "appeler", "joindre", "joignable", "mon numéro", "fixe"),
    *("teléfono", "telefono", "móvil", "movil", "celular", "llámame", "llamar", "llame", "mi número"),
    *("cellulare", "chiami", "chiamare", "chiamami", "mio numero", "recapito"),
    *("telefoon", "bellen", "terugbellen", "mobiel", "mijn nummer", "bereikbaar"),
    *("telefone", "telemóvel", "ligue", "meu número", "contacto"),
    *("ring til", "ring mig", "ringa", "puh", "puhelin", "puhelinnumero", "soita", "matkapuhelin", "kännykkä"),
    *("zadzwoń", "dzwonić", "komórka", "numer telefonu", "zavolejte", "volejte", "telefón", "hívj", "telefonszám"),
    *(
        "sunați",
        "numărul meu",
        "cep telefon",
        "cep no",
        "cep numara",
        "τηλ",
        "κινητό",
        "тел",
        "мобил",
        "звоните",
        "позвоните",
        "мой номер",
    ),
    *("мій номер", "дзвоніть", "電話", "携帯", "手机", "电话", "联系电话", "전화", "휴대폰", "연락처", "핸드폰"),
    *("मोबाइल", "फ़ोन", "फोन", "هاتف", "جوال", "טלפון", "נייד"),
)
OTHER_NUMBER_WORDS = Words.of(
    *("order", "invoice", "ticket", "reference", "ref", "customer", "article", "sku", "serial", "tracking", "case"),
    *("booking", "id", "pid", "account", "port", "version", "build", "isbn", "ean", "amount", "total", "price", "page"),
    *("bestell", "rechnung", "kunden", "artikel", "sendung", "vertrag", "konto", "betrag", "auftrag"),
    *("commande", "facture", "client", "colis", "réf", "pedido", "factura", "cliente", "importe"),
    *("ordine", "fattura", "importo", "factuur", "klant", "ordre", "faktura", "tilaus", "zamówienie", "objednávka"),
    *("sipariş", "заказ", "счет", "订单", "注文", "주문"),
)
# ITU-T E.164: country codes by their first one, two or three digits.
_COUNTRY = re.compile(
    r"1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-689]\d|3[578]\d|42\d|5[09]\d|6[7-9]\d|8[0578]\d|"
    r"9[679]\d"
)
_BEFORE = r"(?<![A-Za-z0-9_+.\-])(?<!\d[,/])"
_AFTER = r"(?![A-Za-z0-9_]|[-.:/]\d)"
_GAP = r"\)?[ \u00a0\u202f./\-\u2011]{0,2}\(?"
_GROUP = r"\d{1,13}+(?![A-Za-z_]|:\d)"  # not the hour of a time that follows the number
_INTERNATIONAL = re.compile(
    rf"(?<![A-Za-z0-9_+.])(?:\(?\+ ?|00(?=[1-9]))\(?(?=[1-9]){_GROUP}(?:{_GAP}{_GROUP}){{0,7}}+{_AFTER}"
)
_AMERICAN = re.compile(
    rf"{_BEFORE}(?:1[-. ])?(?:\([2-9]\d\d\)[ -]?[2-9]\d\d[-. ]|[2-9]\d\d-[2-9]\d\d-|[2-9]\d\d\.[2-9]\d\d\.)"
    rf"\d{{4}}{_AFTER}"
)
_TRUNK = re.compile(
    rf"{_BEFORE}\(?0[1-9]\d{{0,4}}\)?(?: ?[/-] ?|[ \u00a0]){_GROUP}(?:[ \u00a0.\-]{_GROUP}){{0,4}}+{_AFTER}"
)
_DOTTED = re.compile(rf"{_BEFORE}0[1-9](?:\.\d\d){{4}}{_AFTER}")
_ANY = re.compile(rf"{_BEFORE}\(?{_GROUP}(?:{_GAP}{_GROUP}){{0,6}}+{_AFTER}")
_DATE = re.compile(r"(?:\d{1,2}[./-]\d{1,2}[./-]\d{4}|\d{4}[./-]\d{1,2}[./-]\d{1,2})(?!\d)")
_NEXT = re.compile(r"[ \u00a0]\(?\d{1,13}$")
# Calls that the called party pays, or that cost extra: a business's, no person's.
_SERVICE = re.compile(
    r"0(?:80[0458]|900)\d{3,8}|(?:\+|00)\d{2,3}0?(?:800|900)\d{5,8}|00800\d{7,8}|\+?1?8(?:00|33|44|55|66|77|88)\d{7}"
)


def phones(page: Page) -> Iterator[Span]:
    for found in (_international(page), _by_shape(page), _announced(page)):
        for start, end in found:
            if _SERVICE.fullmatch(_digits(page.text[start:end], "+")) is None:
                yield Span(start, end, Kind.PHONE)


def _digits(text: str, others: str = "") -> str:
    return "".join(char for char in text if char.isdigit() or char in others)


def _international(page: Page) -> Iterator[tuple[int, int]]:
    """00 in place of + is also how parcel numbers begin: it needs separators or a word."""
    for match in _INTERNATIONAL.finditer(page.text):
        if "+" not in match[0] and match[0].isdigit() and not page.near(PHONE_WORDS, match.start()):
            continue
        zeros = 0 if "+" in match[0] else 2
        start, end = _at_most(page.text, *match.span(), 15 + zeros)
        number = _digits(page.text[start:end])[zeros:]
        if 8 <= len(number) <= 15 and _COUNTRY.match(number):
            yield start, end


def _by_shape(page: Page) -> Iterator[tuple[int, int]]:
    for match in _AMERICAN.finditer(page.text):
        yield match.span()
    for pattern in (_TRUNK, _DOTTED):
        for match in pattern.finditer(page.text):
            start, end = _at_most(page.text, *match.span(), 12)
            if 9 <= len(_digits(page.text[start:end])) <= 12 and not _is_named_otherwise(page, start):
                yield start, end


def _announced(page: Page) -> Iterator[tuple[int, int]]:
    for match in _ANY.finditer(page.text):
        start, end = _at_most(page.text, *match.span(), 13)
        long_enough = 7 <= len(_digits(page.text[start:end])) <= 13
        announced = page.near(PHONE_WORDS, start) and not _is_named_otherwise(page, start)
        if long_enough and announced and not _DATE.match(page.text, start):
            yield start, end


def _at_most(text: str, start: int, end: int, digits: int) -> tuple[int, int]:
    """Without the groups at the end that belong to another number: "+45 20 12 34 56 2 people"."""
    while len(_digits(text[start:end])) > digits and (last := _NEXT.search(text[start:end])):
        end = start + last.start()
    return start, end


def _is_named_otherwise(page: Page, start: int) -> bool:
    """The nearer word counts: "call about order 12345678"."""
    other = page.last(OTHER_NUMBER_WORDS, start)
    if other is None or start - other > OTHER_REACH:
        return False
    phone = page.last(PHONE_WORDS, start)
    return phone is None or phone < other
