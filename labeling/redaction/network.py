"""Addresses of machines: IPv4 and IPv6, less those that name no machine (loopback, any, masks, multicast)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from labeling.redaction.page import Kind, Page, Span, Words

VERSION_WORDS = Words.of(
    *("version", "ver", "v", "release", "build", "firmware", "driver", "macos", "android", "section", "chapter", "oid"),
    *(
        "versione",
        "versión",
        "versão",
        "versie",
        "wersja",
        "verze",
        "версия",
        "revision",
        "chrome",
        "patch",
        "update to",
    ),
)
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_V4 = re.compile(rf"(?<![\w.])(?<![A-Za-z]/)(?<![~<>=!]=){_OCTET}(?:\.{_OCTET}){{3}}(?![\w]|\.\d|-[A-Za-z])")
_V6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{2,45}+(?:\.\d{1,3}){0,3}+(?!\w)")
_ROUTED = tuple(map(ipaddress.IPv6Network, ("2000::/3", "fc00::/7", "fe80::/10", "64:ff9b::/96", "::ffff:0:0/96")))
_VERSION_REACH = 12


def ip_addresses(page: Page) -> Iterator[Span]:
    for match in _V4.finditer(page.text):
        first = int(match[0].partition(".")[0])
        if first in {0, 127} or first >= 224 or page.near(VERSION_WORDS, match.start(), _VERSION_REACH):
            continue
        yield Span(match.start(), match.end(), Kind.IP)
    for match in _V6.finditer(page.text):
        address = match[0]
        if address.endswith(":") and not address.endswith("::"):
            address = address[:-1]
        if _names_a_machine(address):
            yield Span(match.start(), match.start() + len(address), Kind.IP)


def _names_a_machine(address: str) -> bool:
    """`dead::beef` may be code; what is routed, private or link-local begins with a digit or f and has digits."""
    if address.count(":") < 2 or address == "::" or not any(char.isdigit() for char in address):
        return False
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return any(found in network for network in _ROUTED)
