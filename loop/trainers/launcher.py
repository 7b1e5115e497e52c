"""A trainer of several ranks: the process that the night starts becomes accelerate's launcher, and stays their parent.

Its parent sees what it would of one trainer: progress lines (the first rank's), at most one error line, one exit
status. A signal to it reaches the ranks, and no rank outlives it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from labeling.errors import InvalidInput, NightschoolError
from loop.machine_memory import visible_cards
from loop.process_tree import children
from loop.trainers.launch_config import threads_of_a_rank, write_config
from loop.trainers.progress import Channel, Said
from loop.trainers.spec import TrainSpec
from loop.trainers.team import CARDS, ERRORS, STARTED

PARK = signal.SIGUSR1
RENDEZVOUS = "nightschool"
STOPPED, UNEXPECTED = "stopped", "trainer_error"
SECONDS_TO_END = 25.0  # a little less than torch's launcher gives a rank that is told to end
SECONDS_BETWEEN_LOOKS = 0.05


class TooFewCards(InvalidInput):
    code = "too_few_cards"
    default_hint = "Lower trainer.gpus, or let CUDA_VISIBLE_DEVICES name more cards."


class RankFailed(NightschoolError):
    """What a rank said of its end, in its own code."""

    code = "rank_failed"

    def __init__(self, code: str, message: str, hint: str | None) -> None:
        super().__init__(message, hint=hint)
        self.code = code  # type: ignore[misc]  # the rank's word for it


@dataclass(frozen=True)
class Launch:
    """`module` is run as each rank. `by_us`: our loop makes one training of them; else the backend's own does."""

    module: str
    by_us: bool = True


def launch(ranks: Launch, spec: TrainSpec, spec_path: Path, channel: Channel) -> int:
    """Runs the ranks to their end; the exit status. Raises what the rank that failed first has said."""
    folder = spec_path.parent
    errors = folder / "ranks"
    shutil.rmtree(errors, ignore_errors=True)
    errors.mkdir(parents=True)
    cards = _cards(spec)
    config = write_config(spec, folder, on_gpu=bool(cards), by_us=ranks.by_us)
    os.environ |= {
        CARDS: json.dumps(cards),
        STARTED: repr(time.monotonic()),
        ERRORS: str(errors),
        "CUDA_VISIBLE_DEVICES": "",  # not the launcher's: its libraries would make a context on each
    }
    command = [
        *("--config_file", str(config), "--num_cpu_threads_per_process", str(threads_of_a_rank(spec))),
        *("--rdzv_backend", RENDEZVOUS),  # of the file's own entry the launcher takes no notice
        *("-m", ranks.module, str(spec_path), "--parent", str(os.getpid())),
    ]
    channel.give_back()
    with _parking_passed_on(channel):
        return _run(command, errors)


def _cards(spec: TrainSpec) -> list[str]:
    """One for each rank; none where there is no card, and ranks share the processor."""
    there = visible_cards()
    if there and len(there) < spec.cards.gpus:
        raise TooFewCards(f"trainer.gpus = {spec.cards.gpus}, and {len(there)} can be seen here")
    return there[: spec.cards.gpus]


def _run(command: Sequence[str], errors: Path) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _register_rendezvous()
    try:
        launch_command(launch_command_parser().parse_args(list(command)))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        killed = [rank for rank, code in codes.items() if code == -signal.SIGKILL]
        if killed and not _explained(errors):
            sys.stderr.write(f"rank {killed[0]} was killed (SIGKILL)\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)  # our parent is to see of us what it would of the one trainer
        raise _first(errors, f"ranks ended with status {codes}") from None
    except SignalException as error:
        raise _first(errors, f"the trainer was told to stop ({error.sigval.name})", code=STOPPED) from None
    return 0


def _explained(errors: Path) -> bool:
    """Whether ranks had failed for a reason of their own before one was killed: by the launcher, for not ending. What
    they say shortly before is mostly that the killed one has left them."""
    return any(
        one.code != UNEXPECTED or time.monotonic() - one.at > SECONDS_TO_END
        for one in _said(errors)
        if one.code != STOPPED
    )


def _said(errors: Path) -> list[Said]:
    """The first one first, and last what only follows from the others' end."""
    return sorted((Said.read(path) for path in errors.glob("*.json")), key=lambda one: (one.code == STOPPED, one.at))


def _first(errors: Path, otherwise: str, code: str = UNEXPECTED) -> RankFailed:
    said = _said(errors)
    if not said:
        return RankFailed(code, otherwise, "The trainer's log holds what there is.")
    return RankFailed(said[0].code, said[0].message, said[0].hint)


@contextmanager
def _parking_passed_on(channel: Channel) -> Iterator[None]:
    """Ranks inherit that the signal waits, and take it when they can: none dies of it while it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {PARK})
    threading.Thread(target=_pass_on, name="parking", daemon=True).start()
    if channel.parked:
        os.kill(os.getpid(), PARK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {PARK})


def _pass_on() -> None:
    while True:
        signal.sigwait({PARK})
        while not (ranks := _ranks()):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, PARK)


def _ranks() -> list[int]:
    """Our libraries start other processes, too."""
    found = []
    for process in children(os.getpid()):
        with suppress(OSError):
            if b"--parent" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0"):
                found.append(process)
    return found


def listen_for_parking(channel: Channel) -> None:
    signal.signal(PARK, lambda *_: channel.park())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {PARK})


def _register_rendezvous() -> None:
    """Where ranks meet: a port that the kernel chose, on the loopback interface and no other."""
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

    class Here(RendezvousHandler):
        def __init__(self, parameters: Any) -> None:
            self._run_id = parameters.run_id
            listening = socket.create_server(("127.0.0.1", 0))
            address, port = listening.getsockname()
            self._met = RendezvousStoreInfo(address, port)
            self._store = TCPStore(
                *(address, port, 1, True, timedelta(minutes=10)), master_listen_fd=listening.detach()
            )

        use_agent_store = True

        def get_backend(self) -> str:
            return RENDEZVOUS

        def next_rendezvous(self) -> RendezvousInfo:
            return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, self._met)

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            return

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return str(self._run_id)

        def shutdown(self) -> bool:
            return True

    rendezvous_handler_registry.register(RENDEZVOUS, Here)
