"""Who may promote what, and how: the real MLflow, our own tables, and engines with faults on demand."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlmodel import col

from labeling.database import Database, now
from loop import promotion
from loop.evidence_check import NotPromotable
from loop.mlflow_registry import Registry
from loop.promotion import NoWayBack
from loop.reconcile import reconcile
from loop.serving import ServedMeanwhile, switch_to
from loop.settings import ApprovalSettings, MlflowSettings
from loop.states import WrongState
from loop.tables import Adapter, Evidence, NightState
from loop.vllm import EngineUnavailable, Replica
from service.auth import Caller
from tests.adapters import TINY, write_adapter
from tests.fakes.vllm import FakeVllm, Faults
from tests.promoting import NOWHERE, Company, close, found_company, tiny_base
from tests.running import eventually

APP = Caller("k", "app", frozenset({"inference"}), None)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    await opened.create_tables()
    yield opened
    await opened.close()


@pytest.fixture
async def engines() -> AsyncIterator[tuple[FakeVllm, FakeVllm]]:
    async with FakeVllm() as one, FakeVllm() as two:
        yield one, two


@pytest.fixture
async def company(
    database: Database, mlflow_server: Any, engines: tuple[FakeVllm, FakeVllm], tmp_path: Path
) -> AsyncIterator[Company]:
    base_dir = tiny_base(tmp_path / "base")
    urls = [engine.url for engine in engines]
    found = await found_company(database, mlflow_server.url, urls, tmp_path, base_dir=base_dir, base_name="base")
    yield found
    await close(found)


async def test_moving_production_promotes(company: Company, engines: tuple[FakeVllm, ...]) -> None:
    """The on-call's one move in MLflow: loaded and probed everywhere, switched, aliases and record in order."""
    night_id = await company.examined()
    assert await company.registry_aliases() == {"production": 1, "candidate": 2}
    assert await company.poll() is None
    await company.move_alias("production", 2)
    assert await company.poll() == NightState.PROMOTED
    serving = await company.serving()
    assert (serving.current, serving.previous) == (company.name(2), company.name(1))
    assert company.aliases.current(company.project.name) == company.name(2)
    assert all(company.name(2) in engine.adapters for engine in engines)
    assert await company.registry_aliases() == {"production": 2, "previous": 1}
    (record,) = await company.promotions()
    assert (record.by, record.night_id) == (promotion.UNATTRIBUTED, night_id)
    assert await company.poll() is None
    version = await company.clients.registry.version_info(company.project.name, 2)
    assert version is not None
    assert version.description.startswith(f"**Approved** by {promotion.UNATTRIBUTED} at ")
    assert version.tags["nightschool.approved_by"] == promotion.UNATTRIBUTED


async def test_where_a_name_is_wanted_the_alias_is_put_back(company: Company) -> None:
    """MLflow names nobody; the version says why nothing happened, and a named approval still works."""
    project = company.project.model_copy(update={"approval": ApprovalSettings(allow_unattributed=False)})
    strict = replace(company, project=project)
    night_id = await strict.examined()
    await strict.move_alias("production", 2)
    assert await strict.poll() is None
    assert (await strict.registry_aliases())["production"] == 1
    assert "wants a name" in await strict.tag(2)
    assert (await strict.serving()).current == strict.name(1)
    assert await strict.promote(night_id, by="ada") == NightState.PROMOTED
    assert (await strict.promotions())[0].by == "ada"


async def test_what_did_not_pass_is_put_back(company: Company) -> None:
    """No alias and no name promotes a rejected candidate."""
    night_id = await company.examined(passed=False)
    await company.move_alias("production", 2)
    assert await company.poll() is None
    assert (await company.registry_aliases())["production"] == 1
    assert "REJECTED" in await company.tag(2)
    with pytest.raises(NotPromotable):
        await company.promote(night_id)
    assert (await company.serving()).current == company.name(1)


async def test_a_version_that_is_not_ours_is_put_back(company: Company) -> None:
    """Registered by somebody else: there is no evidence of it."""
    version = await company.foreign_version()
    await company.move_alias("production", version)
    assert await company.poll() is None
    assert (await company.registry_aliases())["production"] == 1
    assert "not registered by Nightschool" in await company.tag(version)


async def test_another_digest_in_mlflow_is_put_back(company: Company) -> None:
    """A registry that was restored or tampered with does not speak for our bytes."""
    await company.examined()
    await company.clients.registry.set_tags(company.project.name, 2, {"nightschool.adapter_digest": "sha256:other"})
    await company.move_alias("production", 2)
    assert await company.poll() is None
    assert "another digest" in await company.tag(2)
    assert (await company.serving()).current == company.name(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passed": True, "decision": "awaiting_approval", "summary": {"n": 10_000}}, "hash"),
        ({"adapter_digest": "sha256:other"}, "hash"),
        ({"passed": False}, "did not pass"),
    ],
)
async def test_evidence_that_was_changed_promotes_nothing(company: Company, change: dict[str, Any], said: str) -> None:
    """Every column counts towards the hash."""
    night_id = await company.examined()
    async with company.clients.database.write() as session:
        await session.execute(update(Evidence).where(col(Evidence.night_id) == night_id).values(**change))
    with pytest.raises(NotPromotable, match=said):
        await company.promote(night_id)
    assert (await company.night(night_id)).state == NightState.AWAITING_APPROVAL


async def test_bytes_that_were_changed_promote_nothing(company: Company) -> None:
    """The row says another digest than the evidence; or the files do, which the load finds."""
    night_id = await company.examined()
    async with company.clients.database.write() as session:
        await session.execute(update(Adapter).where(col(Adapter.name) == company.name(2)).values(digest="sha256:other"))
    with pytest.raises(NotPromotable, match="not the adapter"):
        await company.promote(night_id)


async def test_files_changed_after_the_exam_are_not_loaded(company: Company, engines: tuple[FakeVllm, ...]) -> None:
    """Between exam and approval somebody wrote into the adapters folder."""
    night_id = await company.examined()
    forget(engines)
    other = write_adapter(company.data_dir / "other", TINY, seed=99)
    for file in other.iterdir():
        file.replace(company.data_dir / "adapters" / company.name(2) / file.name)
    assert await company.promote(night_id) == NightState.FAILED
    assert "no longer those" in str((await company.night(night_id)).reason)
    assert not any(engine.adapters for engine in engines)
    assert (await company.serving()).current == company.name(1)


async def test_a_load_without_effect_is_found(company: Company, engines: tuple[FakeVllm, ...]) -> None:
    """One replica answers 200 to the load and serves the base's weights: nothing is switched anywhere."""
    night_id = await company.examined()
    engines[1].faults = Faults(load_has_no_effect=True)
    assert await company.promote(night_id) == NightState.FAILED
    night = await company.night(night_id)
    assert "without effect" in str(night.reason)
    assert engines[1].url in str(night.reason)
    assert (await company.serving()).current == company.name(1)
    assert company.aliases.current(company.project.name) == "base"
    assert await company.registry_aliases() == {"production": 1, "candidate": 2}


async def test_other_weights_under_the_name_are_found(company: Company, engines: tuple[FakeVllm, ...]) -> None:
    """A replica that sees another folder under the same path serves an adapter that nobody examined."""
    night_id = await company.examined()
    other = write_adapter(company.data_dir / "other", TINY, seed=99)
    path = str(company.data_dir / "adapters" / company.name(2))
    await company.clients.replicas[1].load("x@v1", other)
    engines[1].adapters[company.name(2)] = replace(engines[1].adapters.pop("x@v1"), name=company.name(2), path=path)
    assert await company.promote(night_id) == NightState.FAILED
    assert "not what was examined" in str((await company.night(night_id)).reason)


async def test_an_engine_that_falls_silent_is_found(company: Company, engines: tuple[FakeVllm, ...]) -> None:
    """After the load the base answers with empty text: the promotion stops at this replica, the next is not touched."""
    night_id = await company.examined()
    engines[0].answer = lambda model, prompt: ""
    assert await company.promote(night_id) == NightState.FAILED
    assert "empty text" in str((await company.night(night_id)).reason)
    assert not engines[1].adapters
    assert (await company.serving()).current == company.name(1)


async def test_a_missing_alias_changes_nothing(company: Company) -> None:
    """Somebody deleted it: what serves stays, and the alias comes back."""
    await company.promoted()
    await company.delete_alias("production")
    assert await company.poll() is None
    assert (await company.serving()).current == company.name(2)
    assert (await company.registry_aliases())["production"] == 2


async def test_an_alias_on_a_deleted_version_changes_nothing(company: Company) -> None:
    """MLflow leaves it dangling."""
    version = await company.foreign_version()
    await company.move_alias("production", version)
    await company.delete_version(version)
    assert await company.poll() is None
    assert (await company.serving()).current == company.name(1)
    assert (await company.registry_aliases())["production"] == 1


async def test_roll_back_and_forward_again(company: Company, engines: tuple[FakeVllm, ...]) -> None:
    """Back takes no load, since `previous` is there; forward is a promotion, probed anew."""
    night_id = await company.promoted()
    loads = [set(engine.adapters) for engine in engines]
    await promotion.roll_back(company.clients, company.project, by="ada", why="worse on refunds")
    assert [set(engine.adapters) for engine in engines] == loads
    serving = await company.serving()
    assert (serving.current, serving.previous) == (company.name(1), company.name(2))
    assert company.aliases.current(company.project.name) == "base"
    night = await company.night(night_id)
    assert (night.state, "ada" in str(night.reason)) == (NightState.ROLLED_BACK, True)
    assert await company.registry_aliases() == {"production": 1, "previous": 2}
    assert await company.poll() is None
    with pytest.raises(NoWayBack):
        await promotion.roll_back(company.clients, company.project, by="ada", why="a second click")
    assert await company.promote(night_id) == NightState.PROMOTED
    assert (await company.serving()).current == company.name(2)
    assert [record.to_adapter for record in await company.promotions()] == [company.name(n) for n in (2, 1, 2)]


async def test_roll_back_by_alias_and_forward_by_alias(company: Company) -> None:
    """The same moves from MLflow's page."""
    night_id = await company.promoted()
    await company.move_alias("production", 1)
    await company.poll()
    assert (await company.serving()).current == company.name(1)
    assert (await company.night(night_id)).state == NightState.ROLLED_BACK
    await company.move_alias("production", 2)
    assert await company.poll() == NightState.PROMOTED
    assert await company.registry_aliases() == {"production": 2, "previous": 1}


async def test_a_second_promotion_keeps_one_way_back(company: Company, engines: tuple[FakeVllm, ...]) -> None:
    """`previous` stays loaded and is where a roll back goes; an older, promoted one must be named."""
    for _ in range(3):
        await company.promoted()
    assert all(set(engine.adapters) == {company.name(3), company.name(4)} for engine in engines)
    await promotion.roll_back(company.clients, company.project, by="ada", why="")
    assert (await company.serving()).current == company.name(3)
    await promotion.roll_back(company.clients, company.project, by="ada", why="", to=company.name(2))
    assert (await company.serving()).current == company.name(2)
    assert all(company.name(2) in engine.adapters for engine in engines)
    await promotion.roll_back(company.clients, company.project, by="ada", why="", to=company.name(1))
    assert company.aliases.current(company.project.name) == "base"


async def test_only_what_was_promoted_is_a_way_back(company: Company) -> None:
    """Not a refused or rejected adapter, not a newer one, and not another project's."""
    refused = await company.examined()
    await promotion.refuse(company.clients, company.project, refused, by="ada", why="odd tone")
    await company.promoted()
    for name in (company.name(2), company.name(3), "other@v1"):
        with pytest.raises(Exception, match=name) as error:
            await promotion.roll_back(company.clients, company.project, by="ada", why="", to=name)
        assert error.value.__class__.__name__ in {"NoWayBack", "UnknownAdapter"}
    assert (await company.serving()).current == company.name(3)


async def test_refused_is_over(company: Company) -> None:
    """Its alias goes, and neither a name nor an alias brings it back."""
    night_id = await company.examined()
    await promotion.refuse(company.clients, company.project, night_id, by="ada", why="odd tone")
    assert await company.registry_aliases() == {"production": 1}
    with pytest.raises(NotPromotable, match="REFUSED"):
        await company.promote(night_id)
    with pytest.raises(WrongState):
        await promotion.refuse(company.clients, company.project, night_id, by="ada", why="again")


async def test_a_newer_candidate_expires_the_older(company: Company) -> None:
    """One candidate waits at a time, and the alias is the newer's."""
    older, newer = await company.examined(), await company.examined()
    await company.poll()
    assert (await company.night(older)).state == NightState.EXPIRED
    assert (await company.night(newer)).state == NightState.AWAITING_APPROVAL
    assert (await company.registry_aliases())["candidate"] == 3


async def test_a_candidate_that_nobody_decides_on_expires(company: Company) -> None:
    """After the project's hours; its alias goes."""
    night_id = await company.examined()
    await company.poll()
    assert (await company.night(night_id)).state == NightState.AWAITING_APPROVAL
    async with company.clients.database.write() as session:
        await session.execute(update(Evidence).values(created_at=now() - timedelta(hours=73)))
    await company.poll()
    assert (await company.night(night_id)).state == NightState.EXPIRED
    assert await company.registry_aliases() == {"production": 1}


async def test_what_was_compared_with_another_expires(company: Company) -> None:
    """Examined against v2, and then v2 is rolled back: what would be lost now was not measured."""
    await company.promoted()
    night_id = await company.examined()
    await promotion.roll_back(company.clients, company.project, by="ada", why="")
    with pytest.raises(NotPromotable, match="examined against"):
        await company.promote(night_id)
    await company.poll()
    assert (await company.night(night_id)).state == NightState.EXPIRED


async def test_two_approvals_are_one(company: Company) -> None:
    """Two people at the same moment: one promotion, the other is told."""
    night_id = await company.examined()
    done = await asyncio.gather(company.promote(night_id, by="ada"), company.promote(night_id), return_exceptions=True)
    assert sorted(type(one).__name__ for one in done) == ["NightState", "NotPromotable"]
    assert len(await company.promotions()) == 1


async def test_a_switch_that_mlflow_missed_is_no_roll_back(company: Company, mlflow_server: Any) -> None:
    """MLflow was down at the switch: its stale `production` must not be read as somebody's wish to go back."""
    night_id = await company.examined()
    down = Registry(MlflowSettings(url=NOWHERE, timeout_seconds=1))
    without = replace(company, clients=replace(company.clients, registry=down))
    assert await without.promote(night_id) == NightState.PROMOTED
    assert await company.registry_aliases() == {"production": 1, "candidate": 2}
    assert await company.poll() is None
    assert (await company.serving()).current == company.name(2)
    assert await company.registry_aliases() == {"production": 2, "previous": 1}


async def test_refused_while_mlflow_is_down_loses_its_alias_later(company: Company) -> None:
    """The refusal holds at once; `candidate` goes at the first look after MLflow is back."""
    night_id = await company.examined()
    down = Registry(MlflowSettings(url=NOWHERE, timeout_seconds=1))
    without = replace(company.clients, registry=down)
    await promotion.refuse(without, company.project, night_id, by="ada", why="odd tone")
    assert (await company.night(night_id)).state == NightState.REFUSED
    assert await company.registry_aliases() == {"production": 1, "candidate": 2}
    await company.poll()
    assert await company.registry_aliases() == {"production": 1}


async def test_a_waiting_night_whose_folder_is_gone_fails_with_the_cure(company: Company) -> None:
    """Somebody tidied up: nothing is promoted, what serves stays, and the reason names the folder."""
    night_id = await company.examined()
    shutil.rmtree(company.data_dir / "nights" / night_id)
    assert await company.promote(night_id) == NightState.FAILED
    night = await company.night(night_id)
    assert night_id in (night.reason or "")
    assert "backup" in (night.hint or "")
    assert (await company.serving()).current == company.name(1)


async def test_while_a_promotion_runs_aliases_ask_for_nothing(company: Company) -> None:
    """The alias that asked for it still differs from what serves."""
    night_id = await company.examined()
    await company.move_alias("production", 2)
    await promotion.approve(company.clients, company.project, night_id, by="ada", why="")
    assert await company.poll() is None
    assert (await company.registry_aliases())["production"] == 2
    assert await company.runner.promote(night_id) == NightState.PROMOTED


async def test_a_roll_back_needs_not_every_replica(company: Company, engines: tuple[FakeVllm, ...]) -> None:
    """One is down; with all of them down there is nothing to roll back to."""
    await company.promoted()
    await company.promoted()
    dead = replace(company.clients, replicas=(company.clients.replicas[0], *unreachable()))
    await promotion.roll_back(dead, company.project, by="ada", why="")
    assert (await company.serving()).current == company.name(2)
    with pytest.raises(EngineUnavailable):
        await promotion.roll_back(
            replace(company.clients, replicas=unreachable()), company.project, by="ada", why="", to=company.name(1)
        )
    assert (await company.serving()).current == company.name(2)


def unreachable() -> tuple[Replica, ...]:
    return (Replica(NOWHERE),)


def forget(engines: tuple[FakeVllm, ...]) -> None:
    """As after a restart of vLLM."""
    for engine in engines:
        engine.adapters.clear()


async def test_what_a_restart_forgot_is_loaded_again(company: Company, engines: tuple[FakeVllm, ...]) -> None:
    """Current and previous, on every replica, while another one is down."""
    await company.promoted()
    await company.promoted()
    forget(engines)
    clients = replace(company.clients, replicas=(*unreachable(), *company.clients.replicas))
    await reconcile(clients, company.project)
    assert all(set(engine.adapters) == {company.name(2), company.name(3)} for engine in engines)


async def test_only_our_own_idle_strangers_are_unloaded(company: Company, engines: tuple[FakeVllm, ...]) -> None:
    """Not another project's adapters, not an operator's, not a waiting candidate, not one with a request in flight."""
    await company.examined()
    folder = company.data_dir / "adapters" / company.name(2)
    replica, project = company.clients.replicas[0], company.project.name
    for name in ("other@v7", "warm-up", f"{project}@v77", f"{project}-x@v3"):
        await replica.load(name, folder)
    reader = Caller("k", "oncall", frozenset({"read"}), None)
    with company.aliases.flight(f"{project}@v77", reader):
        assert await reconcile(company.clients, company.project) == ()
    assert await reconcile(company.clients, company.project) == (f"{project}@v77",)
    assert set(engines[0].adapters) == {"other@v7", "warm-up", f"{project}-x@v3", company.name(2)}


async def test_the_drain_waits_for_requests_on_the_old_adapter(company: Company) -> None:
    """New requests have the new adapter meanwhile; the promotion ends when the last old one has."""
    await company.promoted()
    night_id = await company.examined()
    with company.aliases.flight(company.project.name, APP) as flight:
        assert flight.route.served == company.name(2)
        task = asyncio.create_task(company.promote(night_id))
        await eventually(lambda: company.aliases.current(company.project.name) == company.name(3), 20)
        await asyncio.sleep(0.5)
        assert not task.done()
    assert await task == NightState.PROMOTED


async def test_a_roll_back_while_the_promotion_drains(company: Company) -> None:
    """The night is ROLLED_BACK, its promotion does not end as PROMOTED, and it may be approved again."""
    night_id = await company.examined()
    with company.aliases.flight(company.project.name, APP):
        promoting = asyncio.create_task(company.promote(night_id))
        await eventually(lambda: company.aliases.current(company.project.name) == company.name(2), 20)
        await promotion.roll_back(company.clients, company.project, by="ada", why="looks wrong")
    with pytest.raises(WrongState):
        await promoting
    assert (await company.night(night_id)).state == NightState.ROLLED_BACK
    assert (await company.serving()).current == company.name(1)
    assert await company.promote(night_id) == NightState.PROMOTED


async def test_a_switch_is_not_repeated_for_a_night_that_was_rolled_back(company: Company) -> None:
    """Interrupted after its switch, then rolled back by a person: resumed, it must not switch again."""
    night_id = await company.promoted()
    await promotion.roll_back(company.clients, company.project, by="ada", why="looks wrong")
    with pytest.raises(ServedMeanwhile):
        await switch_to(
            company.clients,
            company.project,
            company.name(2),
            expected=company.name(1),
            by="ada",
            why="resumed",
            night_id=night_id,
            promotes=True,
        )


async def test_a_roll_back_without_any_replica_at_hand(company: Company) -> None:
    """From the command line while nothing runs: the table moves, the replicas follow when they are back."""
    await company.promoted()
    offline = replace(company.clients, replicas=())
    await promotion.roll_back(offline, company.project, by="ada", why="at night")
    assert (await company.serving()).current == company.name(1)
