"""Keys and tokens that their makers mark with a prefix, signed web tokens and private keys in PEM.

Forms: the makers' documentation and the public rules of secret scanners, written anew. Public identifiers (Stripe's
pk_, Twilio's AC...) are no secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from labeling.redaction.page import Kind, Page, Span

DIFFERENT_CHARACTERS = 6  # fewer in a token: a dummy such as xxxxxxxx
# Not within a longer word; but the n of an escaped line end (backslash, n) belongs to no word.
_NOT_JOINED = r"(?:(?<![A-Za-z0-9_])|(?<=\\[nrt]))"


@dataclass(frozen=True)
class Token:
    """`mark` stands in every such token; a text without it is not searched."""

    maker: str
    mark: str
    pattern: re.Pattern[str]


def _token(maker: str, mark: str, form: str) -> Token:
    return Token(maker, mark, re.compile(f"{_NOT_JOINED}{form}(?![A-Za-z0-9_])"))


TOKENS: tuple[Token, ...] = (
    *(_token("AWS", mark, rf"{mark}[A-Z2-7]{{16}}+") for mark in ("AKIA", "ASIA", "ABIA", "ACCA")),
    _token("Google", "AIza", r"AIza[\w-]{35}"),
    _token("Google", "GOCSPX-", r"GOCSPX-[\w-]{28}"),
    _token("Google", "ya29.", r"ya29\.[\w-]{20,2048}+"),
    _token("Azure", "Q~", r"[\w.~]{3}\dQ~[\w.~-]{31,34}+"),
    _token("Azure", "AccountKey=", r"(?<=AccountKey=)[A-Za-z0-9+/]{40,100}+={0,2}+"),
    _token("Azure", "SharedAccessKey=", r"(?<=SharedAccessKey=)[A-Za-z0-9+/]{40,100}+={0,2}+"),
    _token("Azure", "sig=", r"(?<=sig=)[A-Za-z0-9%]{40,100}+"),
    *(_token("GitHub", f"gh{kind}_", rf"gh{kind}_[A-Za-z0-9]{{36,255}}+") for kind in "pousr"),
    _token("GitHub", "github_pat_", r"github_pat_\w{40,255}+"),
    *(
        _token("GitLab", f"{mark}-", rf"{mark}-[\w.=-]{{20,300}}+")
        for mark in ("glpat", "gldt", "glrt", "glcbt", "glptt", "glft", "glsoat", "glimt", "glagent", "gloas", "glffct")
    ),
    *(_token("Slack", f"xox{kind}-", rf"xox{kind}-[A-Za-z0-9-]{{10,250}}+") for kind in "abeoprs"),
    _token("Slack", "xapp-", r"xapp-\d-[A-Za-z0-9-]{20,250}+"),
    _token(
        "Slack", "hooks.slack.com/", r"https://hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9+/]{20,120}+"
    ),
    *(
        _token("Stripe", f"{kind}_{mode}_", rf"{kind}_{mode}_[A-Za-z0-9]{{10,250}}+")
        for kind in ("sk", "rk")
        for mode in ("live", "test", "prod")
    ),
    _token("Stripe", "whsec_", r"whsec_[A-Za-z0-9+/=]{24,100}+"),
    _token("Anthropic", "sk-ant-", r"sk-ant-[\w-]{40,250}+"),
    _token("OpenRouter", "sk-or-", r"sk-or-[\w-]{40,120}+"),
    _token("Langfuse", "sk-lf-", r"sk-lf-[0-9a-f-]{36}"),
    _token("OpenAI", "sk-", r"sk-(?:(?:proj|svcacct|admin)-[\w-]{40,250}+|[A-Za-z0-9]{32,120}+)"),
    _token("Hugging Face", "hf_", r"hf_[A-Za-z0-9]{34,40}+"),
    _token("Hugging Face", "api_org_", r"api_org_[A-Za-z0-9]{34}"),
    _token("npm", "npm_", r"npm_[A-Za-z0-9]{36}"),
    _token("PyPI", "pypi-", r"pypi-[\w-]{80,1000}+"),
    _token("RubyGems", "rubygems_", r"rubygems_[0-9a-f]{48}"),
    _token("Docker", "dckr_", r"dckr_(?:pat|oat)_[\w-]{27,64}+"),
    _token("Twilio", "SK", r"SK[0-9a-f]{32}"),
    _token("SendGrid", "SG.", r"SG\.[\w-]{16,32}\.[\w-]{16,64}+"),
    _token("Mailgun", "key-", r"key-[0-9a-f]{32}"),
    _token("Mailchimp", "-us", r"[0-9a-f]{32}-us\d{1,2}+"),
    *(_token("DigitalOcean", f"do{kind}_v1_", rf"do{kind}_v1_[0-9a-f]{{64}}") for kind in "opr"),
    *(_token("Shopify", f"shp{kind}_", rf"shp{kind}_[0-9a-fA-F]{{32}}") for kind in ("at", "ca", "pa", "ss")),
    _token("Square", "sq0", r"sq0(?:atp|csp|idp)-[\w-]{22,43}+"),
    _token("Telegram", ":AA", r"\d{8,10}:AA[\w-]{33}"),
    _token("Discord", ".", r"[MNO][A-Za-z0-9_-]{23,27}\.[\w-]{6}\.[\w-]{27,40}+"),
    _token("Groq", "gsk_", r"gsk_[A-Za-z0-9]{40,64}+"),
    _token("xAI", "xai-", r"xai-[A-Za-z0-9]{60,100}+"),
    _token("Perplexity", "pplx-", r"pplx-[A-Za-z0-9]{40,64}+"),
    _token("Replicate", "r8_", r"r8_[A-Za-z0-9]{37,40}+"),
    _token("Databricks", "dapi", r"dapi[0-9a-f]{32}(?:-\d)?+"),
    _token("Linear", "lin_api_", r"lin_api_[A-Za-z0-9]{40}"),
    _token("Notion", "ntn_", r"ntn_[A-Za-z0-9]{40,60}+"),
    _token("Figma", "figd_", r"figd_[\w-]{36,60}+"),
    _token("Postman", "PMAK-", r"PMAK-[0-9a-fA-F]{24}-[0-9a-fA-F]{34}"),
    _token("Grafana", "glsa_", r"glsa_[A-Za-z0-9]{32}_[0-9A-Fa-f]{8}"),
    _token("Grafana", "glc_", r"glc_[A-Za-z0-9+/=]{32,400}+"),
    _token("Vault", "hvs.", r"hvs\.[\w-]{24,300}+"),
    _token("Vault", "hvb.", r"hvb\.[\w-]{100,300}+"),
    _token("Terraform", ".atlasv1.", r"[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,70}+"),
    _token("Doppler", "dp.", r"dp\.(?:pt|st|ct|sa|scim|audit)\.(?>(?:[\w-]{2,35}+\.)?)[A-Za-z0-9]{40,44}+"),
    _token("New Relic", "NRAK-", r"NRAK-[A-Z0-9]{27}"),
    _token("Sentry", "sntry", r"sntry[su]_[A-Za-z0-9+/=_]{40,400}+"),
    _token("LangSmith", "lsv2_", r"lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}"),
    _token("Atlassian", "ATATT3", r"ATATT3[\w=-]{60,250}+"),
    _token("PlanetScale", "pscale_", r"pscale_(?:tkn|pw|oauth)_[\w=.-]{32,64}+"),
    _token("Supabase", "sbp_", r"sbp_[0-9a-f]{40}"),
    _token("Alibaba", "LTAI", r"LTAI[A-Za-z0-9]{16,24}+"),
    _token("age", "AGE-SECRET-KEY-1", r"AGE-SECRET-KEY-1[A-Z0-9]{58}"),
    _token("1Password", "ops_eyJ", r"ops_eyJ[A-Za-z0-9+/=]{100,1500}+"),
    _token("Nightschool", "ns_", r"ns_[\w-]{43}"),
    _token("a signed web token", "eyJ", r"(?<!-)eyJ[\w-]{10,2000}+\.eyJ[\w-]{10,4000}+(?:\.[\w-]{10,2000}+)?"),
)


def tokens(page: Page) -> Iterator[Span]:
    for token in TOKENS:
        if token.mark in page.text:
            for match in token.pattern.finditer(page.text):
                if len(set(match[0])) - len(set(token.mark)) >= DIFFERENT_CHARACTERS:
                    yield Span(match.start(), match.end(), Kind.KEY)


_BOUNDARY = re.compile(r"-----(BEGIN|END) ([A-Z0-9 ]{0,40}?)PRIVATE KEY( BLOCK)?-----")
_CUT_OFF = re.compile(r"[A-Za-z0-9+/=\s\\:,-]{0,16000}+")


def private_keys(page: Page) -> Iterator[Span]:
    """From BEGIN to END; where a log cut the end off, as far as the letters go."""
    boundaries = list(_BOUNDARY.finditer(page.text))
    for here, following in zip_longest(boundaries, boundaries[1:]):
        if here[1] != "BEGIN":
            continue
        if following is not None and following[1] == "END":
            yield Span(here.start(), following.end(), Kind.PRIVATE_KEY)
            continue
        limit = following.start() if following else len(page.text)
        match = _CUT_OFF.match(page.text, here.end(), limit)
        body = match[0].rstrip() if match else ""
        yield Span(here.start(), here.end() + len(body), Kind.PRIVATE_KEY)
