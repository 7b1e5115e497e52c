"""Label Studio's webhook: registered in its project by us, known by a secret header, and no more than a hint.

It comes once, late, twice or never, and says little; what it wakes reads the truth from the API.
"""

from __future__ import annotations

import hmac
from typing import Any
from urllib.parse import quote, urlsplit

import structlog

from labeling.label_studio import LabelStudioServer
from labeling.label_studio_http import LabelStudioBroke, LabelStudioNotFound, LabelStudioRefused

log = structlog.get_logger(__name__)
HEADER = "X-Nightschool-Hook"
PATH = "/v1/hooks/label-studio"
ACTIONS = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED", "ANNOTATIONS_DELETED")
REFUSED_CURE = (
    "Until then labels come back by polling. Label Studio takes public addresses only, by name or number, unless its "
    "SSRF_PROTECTION_ENABLED or USE_DEFAULT_BANNED_SUBNETS says otherwise, and no host name without a dot."
)


def hook_path(project: str) -> str:
    return f"{PATH}/{quote(project, safe='')}"


def hook_secret(server: LabelStudioServer, project: str) -> str:
    """Of one project, from Label Studio's token: whoever has the token may read its labels anyway."""
    return server.derived_secret(f"nightschool webhook of {project}")


def is_genuine(server: LabelStudioServer, project: str, sent: str | None) -> bool:
    expected = hook_secret(server, project)
    return hmac.compare_digest((sent or "").encode("utf-8", "surrogateescape"), expected.encode())


async def keep_webhook(server: LabelStudioServer, server_project: int, project: str, our_url: str) -> bool:
    """Whether Label Studio now tells us of annotations. `our_url` "": ours is taken out, for it delays labellers."""
    doing = f"registering our webhook in Label Studio project {server_project}"
    found = await server.request("GET", "/api/webhooks/", doing, params={"project": server_project})
    ours = [hook for hook in found if HEADER in hook["headers"] and urlsplit(hook["url"]).path == hook_path(project)]
    wanted: dict[str, Any] = {
        "url": our_url.rstrip("/") + hook_path(project),
        "headers": {HEADER: hook_secret(server, project)},
        "send_payload": False,
        "send_for_all_actions": False,
        "is_active": True,
    }
    kept = ours[0] if ours and our_url else None
    try:
        if our_url and kept is None:
            body = {**wanted, "project": server_project, "actions": ACTIONS}
            await server.request("POST", "/api/webhooks/", doing, json=body)
        elif kept is not None and not _is(kept, wanted):
            path = f"/api/webhooks/{kept['id']}/"
            await server.request("PATCH", path, doing, json={**wanted, "actions": ACTIONS})
    except (LabelStudioRefused, LabelStudioBroke) as error:  # 500: a name that it cannot resolve
        log.warning("webhook_refused", project=project, url=wanted["url"], reason=str(error), cure=REFUSED_CURE)
        return False
    for hook in ours:
        if hook is not kept:
            await _delete(server, hook["id"], doing)
    return bool(our_url)


def _is(hook: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(hook[name] == value for name, value in wanted.items()) and set(hook["actions"]) == set(ACTIONS)


async def _delete(server: LabelStudioServer, hook_id: int, doing: str) -> None:
    try:
        await server.request("DELETE", f"/api/webhooks/{hook_id}/", doing)
    except LabelStudioNotFound:
        return
