"""The runner resumes what was finished, records nothing of a stale worker and ends every night in a decision."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import date
from pathlib import Path
from typing import cast

import pytest
from sqlmodel import select

from labeling.database import Database, now
from labeling.errors import Unavailable
from loop import approval
from loop.clients import Clients
from loop.nightly import PROMOTE
from loop.outputs import Decided, Drained, Loaded, Probed, Registered, SyncedLabels
from loop.runner import TRAINING, Runner
from loop.settings import EngineSettings, ProjectSettings
from loop.stage import NightEnds, Stage, StageContext, StageOutput
from loop.tables import LabelUse, Lease, Night, NightEvent, NightState, StageMarker

DECIDED = {"reason": "r", "hint": "", "evidence_hash": "h", "report_path": "p"}


class Only:
    """The runner itself needs the database alone; these stages talk to nothing else."""

    def __init__(self, database: Database) -> None:
        self.database = database


def stages(directory: Path, decision: NightState = NightState.AWAITING_APPROVAL) -> tuple[Stage, ...]:
    """Two stages and a decision that count their runs in `directory`."""

    async def counted(context: StageContext, name: str) -> None:
        with (directory / "runs").open("a") as file:
            file.write(f"{name}\n")
        (context.folder / "made").write_text(name)
        hook = directory / f"hold-{name}"
        while hook.exists():
            await asyncio.sleep(0.02)

    async def sync(context: StageContext) -> SyncedLabels:
        await counted(context, "sync")
        return SyncedLabels(accepted=1, disputed=0, refused=0, not_in_current=1)

    async def load(context: StageContext) -> Loaded:
        assert context.take(SyncedLabels).accepted == 1
        await counted(context, "load")
        return Loaded(adapter="a", replicas=())

    async def decide(context: StageContext) -> Decided:
        await counted(context, "decide")
        return Decided(state=decision, **DECIDED)

    return (
        Stage("sync_labels", (), SyncedLabels, sync),
        Stage("train", (SyncedLabels,), Loaded, load),
        Stage("decide", (Loaded,), Decided, decide),
    )


def runner(database: Database, directory: Path, examine: tuple[Stage, ...], **options: object) -> Runner:
    project = ProjectSettings(name="p", base_dir=Path("base"), base_name="base")
    return Runner(
        clients=cast("Clients", Only(database)),
        projects={"p": project},
        engine=EngineSettings(),
        data_dir=directory,
        examine_stages=examine,
        queue_poll_seconds=0.02,
        **options,  # type: ignore[arg-type]
    )


async def claimed(database: Database, day: int = 1) -> str:
    night = Night(project="p", date=date(2026, 1, day), due_at=now())
    async with database.write() as session:
        session.add(night)
    return night.id


async def seen(database: Database, night_id: str) -> Night:
    async with database.read() as session:
        night = await session.get(Night, night_id)
    assert night is not None
    return night


def runs(directory: Path) -> Counter[str]:
    return Counter((directory / "runs").read_text().split())


async def test_a_night_walks_its_stages_and_awaits_approval(database: Database, tmp_path: Path) -> None:
    """Each stage once, a marker and an event each, the decision's reason on the night."""
    night_id = await claimed(database)
    assert await runner(database, tmp_path, stages(tmp_path)).examine(night_id) == NightState.AWAITING_APPROVAL
    assert runs(tmp_path) == {"sync": 1, "load": 1, "decide": 1}
    async with database.read() as session:
        markers = (await session.execute(select(StageMarker.stage))).scalars().all()
        finished = (
            (await session.execute(select(NightEvent).where(NightEvent.kind == "stage_finished"))).scalars().all()
        )
    assert sorted(markers) == ["decide", "sync_labels", "train"]
    assert len(finished) == 3
    assert (await seen(database, night_id)).reason == "r"


async def test_an_interrupted_night_repeats_no_marked_stage(database: Database, tmp_path: Path) -> None:
    """Cancelled in its second stage, as by SIGKILL: the first is not run again, the second is, in another folder."""
    night_id = await claimed(database)
    (tmp_path / "hold-load").touch()
    first = asyncio.create_task(runner(database, tmp_path, stages(tmp_path)).examine(night_id))
    while not (tmp_path / "runs").exists() or runs(tmp_path)["load"] == 0:
        await asyncio.sleep(0.02)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert (await seen(database, night_id)).state == NightState.RUNNING
    (tmp_path / "hold-load").unlink()
    assert await runner(database, tmp_path, stages(tmp_path)).examine(night_id) == NightState.AWAITING_APPROVAL
    assert runs(tmp_path) == {"sync": 1, "load": 2, "decide": 1}
    assert len(list((tmp_path / "nights" / night_id).glob("train.*"))) == 2


async def test_changed_files_make_a_stage_run_again(database: Database, tmp_path: Path) -> None:
    """A marker counts only while the bytes are those that it was written for; what follows is done again too."""
    night_id = await claimed(database)
    await runner(database, tmp_path, stages(tmp_path, NightState.FAILED)).examine(night_id)
    folder = next((tmp_path / "nights" / night_id).glob("train.*"))
    (folder / "made").write_text("tampered")
    await runner(database, tmp_path, stages(tmp_path)).examine(night_id)
    assert runs(tmp_path) == {"sync": 1, "load": 2, "decide": 2}


async def test_an_error_fails_the_night_with_its_cure_and_resume_goes_on(database: Database, tmp_path: Path) -> None:
    """An outside system that is down ends the night as FAILED with the hint; resumed, it finishes."""
    night_id = await claimed(database)
    good = stages(tmp_path)

    async def down(context: StageContext) -> StageOutput:
        raise Unavailable("the registry is down", hint="Start it.")

    broken = (good[0], Stage("train", (SyncedLabels,), Loaded, down), good[2])
    assert await runner(database, tmp_path, broken).examine(night_id) == NightState.FAILED
    night = await seen(database, night_id)
    assert (night.reason, night.hint) == ("the registry is down", "Start it.")
    assert night.finished_at is not None
    assert await runner(database, tmp_path, good).examine(night_id) == NightState.AWAITING_APPROVAL
    assert runs(tmp_path)["sync"] == 1


async def test_a_bug_fails_the_night_and_says_so(database: Database, tmp_path: Path) -> None:
    """Even an unforeseen exception ends in a decision."""

    async def bug(context: StageContext) -> StageOutput:
        raise ZeroDivisionError("oops")

    night_id = await claimed(database)
    assert await runner(database, tmp_path, (Stage("x", (), SyncedLabels, bug),)).examine(night_id) == NightState.FAILED
    night = await seen(database, night_id)
    assert night.reason == "ZeroDivisionError: oops"
    assert "bug in Nightschool" in (night.hint or "")


async def test_a_stage_may_end_the_night_without_failing(database: Database, tmp_path: Path) -> None:
    """Too few labels: SKIPPED, with the number needed."""

    async def few(context: StageContext) -> StageOutput:
        raise NightEnds(NightState.SKIPPED, "3 more labels are needed")

    night_id = await claimed(database)
    assert (
        await runner(database, tmp_path, (Stage("x", (), SyncedLabels, few),)).examine(night_id) == NightState.SKIPPED
    )
    assert (await seen(database, night_id)).reason == "3 more labels are needed"


async def test_two_nights_queue_for_the_lease(database: Database, tmp_path: Path) -> None:
    """Started together they run one after the other, never interleaved."""
    ids = [await claimed(database, 1), await claimed(database, 2)]
    both = [runner(database, tmp_path, stages(tmp_path)).examine(night_id) for night_id in ids]
    assert set(await asyncio.gather(*both)) == {NightState.AWAITING_APPROVAL}
    order = (tmp_path / "runs").read_text().split()
    assert order == ["sync", "load", "decide"] * 2


async def test_one_night_by_two_workers_runs_once(database: Database, tmp_path: Path) -> None:
    """The second worker waits for the lease, sees the decision and leaves it."""
    night_id = await claimed(database)
    both = [runner(database, tmp_path, stages(tmp_path)).examine(night_id) for _ in range(2)]
    assert await asyncio.gather(*both) == [NightState.AWAITING_APPROVAL] * 2
    assert runs(tmp_path) == {"sync": 1, "load": 1, "decide": 1}


async def test_a_stale_worker_records_nothing(database: Database, tmp_path: Path) -> None:
    """Paused beyond its lease and overtaken: its stage's end is refused, its folder is not the one marked."""
    night_id = await claimed(database)
    (tmp_path / "hold-load").touch()
    stale = asyncio.create_task(runner(database, tmp_path, stages(tmp_path), lease_seconds=3600).examine(night_id))
    while not (tmp_path / "runs").exists() or runs(tmp_path)["load"] == 0:
        await asyncio.sleep(0.02)
    async with database.write() as session:  # what the clock does while a machine sleeps
        held = await session.get(Lease, TRAINING)
        assert held is not None
        held.expires_at = now()
        session.add(held)
    fresh = asyncio.create_task(runner(database, tmp_path, stages(tmp_path)).examine(night_id))
    while runs(tmp_path)["load"] < 2:
        await asyncio.sleep(0.02)
    (tmp_path / "hold-load").unlink()
    ended = await asyncio.gather(stale, fresh, return_exceptions=True)
    assert ended[1] == NightState.AWAITING_APPROVAL
    async with database.read() as session:
        marker = await session.get(StageMarker, (night_id, "train"))
    assert marker is not None
    newest = max(int(path.name.split(".")[1]) for path in (tmp_path / "nights" / night_id).glob("train.*"))
    assert marker.token == newest


async def test_labels_of_a_rejected_night_are_held(database: Database, tmp_path: Path) -> None:
    """New ones only: what an earlier night proved good stays free."""
    night_id = await claimed(database)
    async with database.write() as session:
        for role in ("new", "replay", "held_out"):
            session.add(LabelUse(night_id=night_id, label_id=role, item_id="i", role=role))
    await runner(database, tmp_path, stages(tmp_path, NightState.REJECTED)).examine(night_id)
    async with database.read() as session:
        held = (await session.execute(select(LabelUse).where(LabelUse.night_id == night_id))).scalars().all()
    assert {use.role: use.held for use in held} == {"new": True, "replay": False, "held_out": False}


async def test_a_second_promotion_probes_anew(database: Database, tmp_path: Path) -> None:
    """Rolled back and forwards again: markers of the first promotion are gone, those of the examination stay."""
    assert tuple(stage.name for stage in PROMOTE) == approval.PROMOTION_STAGES
    night_id = await claimed(database)
    promote = (Stage("probe", (Decided,), Probed, _probe(tmp_path)), Stage("drain", (Probed,), Drained, _drain))
    one = runner(database, tmp_path, stages(tmp_path), promote_stages=promote)
    await one.examine(night_id)
    for target in (NightState.ROLLED_BACK, None):
        async with database.write() as session:
            await approval.begin(session, night_id, by="ada", why="good")
        assert await one.promote(night_id) == NightState.PROMOTED
        if target is not None:
            async with database.write() as session:
                from_state = await session.get(Night, night_id)
                assert from_state is not None
                from_state.state = target
                session.add(from_state)
    assert runs(tmp_path) == {"sync": 1, "load": 1, "decide": 1, "probe": 2}
    assert (await seen(database, night_id)).approved_by == "ada"


def _probe(directory: Path) -> Callable[[StageContext], Awaitable[Probed]]:
    async def probe(context: StageContext) -> Probed:
        assert context.approval is not None
        assert context.approval.by == "ada"
        with (directory / "runs").open("a") as file:
            file.write("probe\n")
        return Probed(largest_difference={})

    return probe


async def _drain(context: StageContext) -> Drained:
    return Drained(seconds=0.0, unloaded=())


KILLED = """
import asyncio, sys
from pathlib import Path
from labeling.database import Database
from tests.unit.test_runner import runner, stages
async def main():
    database = Database(sys.argv[1])
    await runner(database, Path(sys.argv[2]), stages(Path(sys.argv[2])), lease_seconds=0.5).examine(sys.argv[3])
asyncio.run(main())
"""


@pytest.mark.parametrize("at", ["sync", "load", "decide"])
async def test_sigkill_in_any_stage_then_resume(database: Database, tmp_path: Path, at: str) -> None:
    """A killed process leaves a night that another finishes, repeating only the stage that had no marker."""
    night_id = await claimed(database)
    (tmp_path / f"hold-{at}").touch()
    url = database.engine.url.render_as_string(hide_password=False)
    child = subprocess.Popen([sys.executable, "-c", KILLED, url, str(tmp_path), night_id])
    while not (tmp_path / "runs").exists() or runs(tmp_path)[at] == 0:
        await asyncio.sleep(0.05)
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    (tmp_path / f"hold-{at}").unlink()
    assert await runner(database, tmp_path, stages(tmp_path)).examine(night_id) == NightState.AWAITING_APPROVAL
    assert runs(tmp_path) == Counter({"sync": 1, "load": 1, "decide": 1}) + Counter({at: 1})


async def test_the_nights_row_names_its_models(database: Database, tmp_path: Path) -> None:
    """The candidate from `register` on, also while the night still runs: reconciling must spare it."""
    night_id = await claimed(database)

    async def register(context: StageContext) -> Registered:
        return Registered(adapter="p@v2", version=2, run_id="r", archive="a", folder=str(tmp_path))

    async def see(context: StageContext) -> Decided:
        assert (await seen(database, night_id)).candidate == "p@v2"
        return Decided(state=NightState.REJECTED, **DECIDED)

    both = (Stage("register", (), Registered, register), Stage("decide", (Registered,), Decided, see))
    assert await runner(database, tmp_path, both).examine(night_id) == NightState.REJECTED
