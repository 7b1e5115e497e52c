"""Label Studio's two kinds of token and the table of what its answers mean; the requests are in `label_studio`."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import httpx

from labeling.errors import InvalidInput, NightschoolError, NotFound, Unavailable


class LabelStudioUnavailable(Unavailable):
    code = "label_studio_unavailable"
    default_hint = "Check that Label Studio runs and that label_studio.url is right; it is tried again by itself."


class LabelStudioBroke(LabelStudioUnavailable):
    """Status 500: it may be about this request alone."""

    code = "label_studio_broke"


class LabelStudioRefused(InvalidInput):
    code = "label_studio_refused"
    default_hint = "label_studio.url must be the root of a Label Studio server (1.20 or later), not of something else."


class LabelStudioNotFound(NotFound):
    code = "label_studio_not_found"
    default_hint = "It was deleted in Label Studio, or the token's user is not a member of its organisation."


_CURE_OF_401 = (
    "Set label_studio.token to a token of Account & Settings: a legacy token, or a personal access token that has not "
    "expired; Label Studio's organisation settings say which of the two kinds are allowed."
)
# Statuses that have a cure of their own. Other 4xx are refusals; 5xx and _BUSY are a server that can't answer now.
_REFUSALS: dict[int, tuple[type[NightschoolError], str | None]] = {
    400: (LabelStudioRefused, "Label Studio found the request invalid, for the reason that it names."),
    401: (LabelStudioRefused, _CURE_OF_401),
    403: (LabelStudioRefused, "Give the token's user the right to create projects and to import tasks."),
    404: (LabelStudioNotFound, None),
    413: (LabelStudioRefused, "Raise the body limit of the proxy before Label Studio."),
}
_BUSY = (408, 425, 429)


def error_of(doing: str, status: int, body: Any) -> NightschoolError:
    message = f"{doing}: Label Studio answered {status} {_reason(body)}".rstrip()
    if status == 500:
        return LabelStudioBroke(message)
    if status >= 500 or status in _BUSY:
        return LabelStudioUnavailable(message)
    if not isinstance(body, dict | list):  # a page for people: another server, or a path that this version lacks
        return LabelStudioRefused(message)
    kind, hint = _REFUSALS.get(status, (LabelStudioRefused, None))
    return kind(message, hint=hint)


def _reason(body: Any) -> str:
    if not isinstance(body, dict):
        return ""
    parts = [body.get("detail"), body.get("validation_errors")]
    return " ".join(str(part) for part in parts if part)[:500]


def json_of(response: httpx.Response, doing: str) -> Any:
    """The body of a good answer; anything else is raised."""
    try:
        body = response.json() if response.content else None
    except ValueError:
        body = response.text
    if not response.is_success or isinstance(body, str):
        raise error_of(doing, response.status_code, body)
    return body


class TokenAuth(httpx.Auth):
    """Legacy tokens are sent as they are; personal ones are refresh tokens, exchanged for short-lived access tokens."""

    requires_response_body = True

    def __init__(self, url: str, token: str) -> None:
        self.kind = "personal" if token.count(".") == 2 else "legacy"
        self._url, self.token, self._access = url, token.strip(), ""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if self.kind == "legacy":
            request.headers["Authorization"] = f"Token {self.token}"
            yield request
            return
        if self._access:
            request.headers["Authorization"] = f"Bearer {self._access}"
            response = yield request
            if response.status_code != httpx.codes.UNAUTHORIZED:
                return
        answer = yield httpx.Request("POST", f"{self._url}/api/token/refresh", json={"refresh": self.token})
        self._access = str(json_of(answer, "exchanging the personal access token")["access"])
        request.headers["Authorization"] = f"Bearer {self._access}"
        yield request
