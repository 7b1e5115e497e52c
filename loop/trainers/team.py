"""The ranks that train together: one process a card, each with its share of every step's rows.

Each rank sees its own card alone and trains as the only one would; what makes it one training goes through here.
Gradients are summed, and what only one can know (the clock, a signal) the first rank says. The libraries below see a
single process: they would wrap, average and save in their own way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# What accelerate's launcher tells a rank. Taken out of the environment once it is read.
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CARDS, STARTED, ERRORS = "NIGHTSCHOOL_CARDS", "NIGHTSCHOOL_STARTED", "NIGHTSCHOOL_ERRORS"  # what our launcher adds
UNSLOTHS = "UNSLOTH_COMPILE_LOCATION"
# The launcher ends all when one dies. Until then any wait is right: production may have the machine for hours.
PATIENCE = timedelta(days=14)
LOCAL = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # it would take a paused process for a hanging one
}
DEFAULTS = {"NCCL_NVLS_ENABLE": "0"}  # its buffers are for large sums, and many containers refuse the multicast


@dataclass(frozen=True)
class Team:
    """`sharded`: the ranks hold the base together, and must pass through it equally often."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)  # of sharding, as accelerate's launcher told them

    def sharding(self) -> Any:
        """accelerate's FullyShardedDataParallelPlugin, read from what its launcher told."""
        from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment

        with patch_environment(**self.settings):
            return FullyShardedDataParallelPlugin()

    @property
    def leads(self) -> bool:
        """The one that tells, saves and decides."""
        return self.rank == 0

    def sum_gradients(self, weights: Sequence[torch.Tensor], figures: torch.Tensor) -> torch.Tensor:
        """Leaves the sum over all ranks in every weight's gradient; the step's figures, summed too, in float32."""
        if self.size == 1:
            return figures
        import torch
        from torch import distributed

        told = [torch.zeros_like(one) if one.grad is None else one.grad for one in weights]
        flat = torch.cat([*(one.flatten() for one in told), figures.detach().float().flatten()])
        del told
        for one in weights:
            one.grad = None  # room for the sums
        distributed.all_reduce(flat)
        *sums, total = flat.split([*(one.numel() for one in weights), figures.numel()])
        for one, summed in zip(weights, sums, strict=True):
            one.grad = summed.view_as(one)
        return total.reshape(figures.shape).clone()  # the sums themselves may go with the gradients

    def sum(self, figures: torch.Tensor) -> torch.Tensor:
        """Over all ranks, where the figures are: on a card, each waits for what the others are at."""
        if self.size == 1:
            return figures
        from torch import distributed

        total = figures.detach().clone()
        distributed.all_reduce(total)
        return total

    def agree(self, numbers: Sequence[float]) -> tuple[float, ...]:
        """The first rank's, to all. Host memory alone: a card that is busy is not waited for."""
        if self.size == 1:
            return tuple(numbers)
        import torch
        from torch import distributed

        told = torch.tensor(numbers, dtype=torch.float64)
        distributed.broadcast(told, 0)
        return tuple(told.tolist())

    def words(self, text: str) -> str:
        """The first rank's, to all."""
        if self.size == 1:
            return text
        from torch import distributed

        told = [text]
        distributed.broadcast_object_list(told, 0)
        return told[0]

    def most(self, number: float) -> float:
        return self._of_all(number, "MAX")

    def least(self, number: float) -> float:
        return self._of_all(number, "MIN")

    def wait(self) -> None:
        """For all others."""
        self.most(0)

    def _of_all(self, number: float, which: str) -> float:
        if self.size == 1:
            return number
        import torch
        from torch import distributed

        told = torch.tensor([number], dtype=torch.float64)
        distributed.all_reduce(told, getattr(distributed.ReduceOp, which))
        return told.item()


ALONE = Team()
_team = ALONE


def team() -> Team:
    """This process's."""
    return _team


@dataclass(frozen=True)
class Seat:
    """What a launched process is told of itself. `card`: its number among those that the process sees."""

    rank: int
    size: int
    address: str
    port: int
    card: int
    started: float
    errors: Path
    settings: dict[str, str]  # accelerate's, for sharding


def take_seat(*, apart: bool = True) -> Seat | None:
    """None for a process that was not launched as one of several. Before torch is imported.

    `apart`: it sees its own card alone, and its libraries nothing of the others. Otherwise they are to make one
    training of it, and find what they look for.
    """
    if CARDS not in os.environ:
        return None
    told = {name: os.environ[name] for name in TOLD}
    settings = {name: value for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    cards: list[str] = json.loads(os.environ.pop(CARDS))
    rank = int(told["RANK"])
    seat = Seat(
        rank=rank,
        size=int(told["WORLD_SIZE"]),
        address=told["MASTER_ADDR"],
        port=int(told["MASTER_PORT"]),
        card=0 if apart else rank,
        started=float(os.environ.pop(STARTED)),
        errors=Path(os.environ.pop(ERRORS)),
        settings=settings,
    )
    if apart:
        for name in (*told, *settings):
            del os.environ[name]
        cards = cards[rank : rank + 1]
        if rank:  # Unsloth writes the code that it makes whoever else does so there
            own = os.environ.get(UNSLOTHS, "unsloth_compiled_cache")
            os.environ[UNSLOTHS] = f"{own}-rank{rank}"
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
    os.environ.update(LOCAL)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    return seat


def join(seat: Seat | None, *, sharded: bool) -> Team:
    """Meets the other ranks; from then on `team()` is this. Imports torch."""
    global _team  # noqa: PLW0603 - as torch's own process group: there is one a process
    if seat is None:
        return _team
    import torch
    from torch import distributed

    on_card = torch.cuda.is_available()
    named: dict[str, Any] = {}
    if on_card:
        torch.cuda.set_device(seat.card)
        named["device_id"] = torch.device("cuda", seat.card)
    store = distributed.TCPStore(seat.address, seat.port, seat.size, is_master=False, timeout=PATIENCE)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_card else "gloo",
        store=distributed.PrefixStore("nightschool", store),
        rank=seat.rank,
        world_size=seat.size,
        timeout=PATIENCE,
        **named,
    )
    _team = Team(seat.rank, seat.size, sharded, seat.settings)
    _team.wait()
    return _team
