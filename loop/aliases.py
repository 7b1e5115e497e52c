"""How the loop tells the gateway what an alias serves, without knowing the gateway."""

from __future__ import annotations

from typing import Protocol


class AliasSwitch(Protocol):
    """The data plane's table of aliases, as the loop sees it."""

    async def set(self, project: str, served: str) -> None:
        """From now on requests for `project` go to `served`, the name that the engine knows."""

    def in_flight(self, served: str) -> int:
        """How many requests that name `served` have not ended yet."""


class NoGateway:
    """For a worker apart from the HTTP process: gateways read the serving table themselves, once a second."""

    async def set(self, project: str, served: str) -> None:
        return None

    def in_flight(self, served: str) -> int:
        return 0
