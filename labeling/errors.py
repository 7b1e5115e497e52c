"""The root of every error that Nightschool raises on purpose; leaf classes stand beside the code that raises them.

NightschoolError
├── InvalidInput          what was given is wrong; giving it again will fail again
├── NotFound              a name that nothing here has
├── Conflict              right in itself, but not in the state that things are in
├── Refused               a rule of ours says no (the gate, a scope, a file check)
└── Unavailable           an outside system is down, full or slow; retryable
"""

from __future__ import annotations

from typing import ClassVar


class NightschoolError(Exception):
    """Says what happened and to which object (`str(error)`), and the cure (`hint`)."""

    code: ClassVar[str] = "nightschool_error"
    retryable: ClassVar[bool] = False
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = self.default_hint if hint is None else hint


class InvalidInput(NightschoolError):
    code = "invalid_input"


class NotFound(NightschoolError):
    code = "not_found"


class Conflict(NightschoolError):
    code = "conflict"


class Refused(NightschoolError):
    code = "refused"


class Unavailable(NightschoolError):
    """`retry_after_seconds` is what HTTP callers are told to wait."""

    code = "unavailable"
    retryable = True

    def __init__(self, message: str, *, hint: str | None = None, retry_after_seconds: int = 5) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_seconds = retry_after_seconds
