"""Nights that are examined at once: real registration, promotion and roll back around an adapter made of numpy.

The exam itself is left out (`passed` says how it went); everything from the registry's version on is the product's own.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
from sqlmodel import select

from labeling.database import Database, now
from labeling.label_studio import LabelStudioServer
from loop import projects, promotion
from loop.adapter_files import adapter_digest, base_digest, read_base_config
from loop.clients import Clients
from loop.digests import digest_json
from loop.executors import LocalExecutor
from loop.mlflow_registry import Registry
from loop.object_store import open_store
from loop.outputs import Decided, Delta, Preflight, Registered, Trained
from loop.probe import take_probe
from loop.runner import Runner
from loop.serving import get_adapter, get_serving
from loop.settings import ApprovalSettings, EngineSettings, MlflowSettings, ObjectStoreSettings, ProjectSettings
from loop.stage import Stage, StageContext
from loop.stages import register
from loop.tables import Evidence, Night, NightState, Promotion, Serving
from loop.vllm import Replica
from service.alias_table import AliasTable, Upstream
from tests.adapters import TINY, write_adapter

NOWHERE = "http://127.0.0.1:1"


@dataclass
class Company:
    """One project on some replicas. `exams` says how the next nights' exams go."""

    clients: Clients
    project: ProjectSettings
    data_dir: Path
    mlflow_url: str
    adapter: dict[str, Any] = field(default_factory=dict)  # of write_adapter
    exams: list[bool] = field(default_factory=list)
    _nights: int = 0

    @property
    def aliases(self) -> AliasTable:
        return cast("AliasTable", self.clients.aliases)

    @property
    def runner(self) -> Runner:
        stages = (
            Stage("build_delta", (), Delta, self._delta),
            Stage("preflight", (), Preflight, self._preflight),
            Stage("train", (), Trained, self._train),
            Stage("register", (Delta, Preflight, Trained), Registered, register.run),
            Stage("decide", (Registered,), Decided, self._decide),
        )
        names = {self.project.name: self.project}
        return Runner(self.clients, names, EngineSettings(), self.data_dir, examine_stages=stages)

    async def examined(self, passed: bool = True) -> str:
        """A night whose exam is over."""
        self.exams.append(passed)
        self._nights += 1
        day = date(2026, 1, 1) + timedelta(days=self._nights)
        night = Night(project=self.project.name, date=day, due_at=now())
        async with self.clients.database.write() as session:
            session.add(night)
        state = await self.runner.examine(night.id)
        assert state == (NightState.AWAITING_APPROVAL if passed else NightState.REJECTED), await self.night(night.id)
        return night.id

    async def promoted(self) -> str:
        night_id = await self.examined()
        assert await self.promote(night_id) == NightState.PROMOTED, await self.night(night_id)
        return night_id

    async def promote(self, night_id: str, by: str = "ada", why: str = "looks right") -> NightState:
        await promotion.approve(self.clients, self.project, night_id, by=by, why=why)
        return await self.runner.promote(night_id)

    async def poll(self) -> NightState | None:
        """What the worker does at each look at MLflow; gives the promoted night's state."""
        request = await promotion.read_request(self.clients, self.project)
        if isinstance(request, promotion.ApprovalRequest):
            return await self.promote(request.night_id, request.by, request.why)
        if isinstance(request, promotion.RollBackRequest):
            await promotion.roll_back(self.clients, self.project, by=request.by, why=request.why, to=request.to)
        return None

    async def move_alias(self, alias: str, version: int) -> None:
        """As MLflow's page does it."""
        body = {"name": self.project.name, "alias": alias, "version": str(version)}
        await self._mlflow("POST", "registered-models/alias", body)

    async def delete_alias(self, alias: str) -> None:
        await self._mlflow("DELETE", "registered-models/alias", {"name": self.project.name, "alias": alias})

    async def delete_version(self, version: int) -> None:
        body = {"name": self.project.name, "version": str(version)}
        await self._mlflow("DELETE", "model-versions/delete", body)

    async def foreign_version(self) -> int:
        """Registered by somebody else."""
        body = {"name": self.project.name, "source": "models:/m-1"}
        body["source"] = (await self._mlflow("GET", "model-versions/get", {}, version="1"))["model_version"]["source"]
        run = (await self._mlflow("GET", "model-versions/get", {}, version="1"))["model_version"]["run_id"]
        made = await self._mlflow("POST", "model-versions/create", {**body, "run_id": run})
        return int(made["model_version"]["version"])

    async def _mlflow(self, method: str, path: str, body: dict[str, Any], **query: str) -> Any:
        async with httpx.AsyncClient(base_url=self.mlflow_url, timeout=30, trust_env=False) as http:
            parameters = {"name": self.project.name, **query} if query else None
            url = f"/api/2.0/mlflow/{path}"
            response = await http.request(method, url, json=None if query else body, params=parameters)
            response.raise_for_status()
            return response.json()

    async def registry_aliases(self) -> dict[str, int]:
        return await self.clients.registry.aliases(self.project.name)

    async def tag(self, version: int, name: str = promotion.REASON_TAG) -> str:
        found = await self.clients.registry.version_info(self.project.name, version)
        assert found is not None
        return found.tags.get(name, "")

    async def night(self, night_id: str) -> Night:
        async with self.clients.database.read() as session:
            night = await session.get(Night, night_id)
        assert night is not None
        return night

    async def serving(self) -> Serving:
        return await get_serving(self.clients, self.project.name)

    async def promotions(self) -> list[Promotion]:
        async with self.clients.database.read() as session:
            return list((await session.execute(select(Promotion).order_by(Promotion.at))).scalars())  # type: ignore[arg-type]

    def name(self, version: int) -> str:
        return f"{self.project.name}@v{version}"

    async def _delta(self, context: StageContext) -> Delta:
        (context.folder / "train.jsonl").write_text("{}\n")
        counts = {"label_rows": 1, "replay_rows": 0, "base_rows": 0, "held_out_items": 0}
        return Delta(data_dir=str(context.folder), digest=f"sha256:{context.night_id}", label_ids=(), **counts)

    async def _preflight(self, context: StageContext) -> Preflight:
        return Preflight(spec_path="", base_digest=base_digest(context.project.base_dir), checks=())

    async def _train(self, context: StageContext) -> Trained:
        base = read_base_config(context.project.base_dir)
        options = {"base_name": context.project.base_name, "seed": self._nights, **self.adapter}
        folder = write_adapter(context.folder / "adapter", base, **options)
        run = await context.clients.registry.start_run(context.project.name, context.night_id, "night", {})
        return Trained(
            adapter_dir=str(folder), adapter_digest=adapter_digest(folder), result={}, run_id=run, seconds=0.0
        )

    async def _decide(self, context: StageContext) -> Decided:
        """Examined on the first replica; a passed one gets the alias."""
        passed, registered = self.exams.pop(0), context.take(Registered)
        replica = context.clients.replicas[0]
        await replica.load(registered.adapter, Path(registered.folder))
        probe = await take_probe(replica, context.project.base_name, registered.adapter)
        assert probe.applied, "choose another seed: this adapter changes too little"
        state = NightState.AWAITING_APPROVAL if passed else NightState.REJECTED
        evidence = await self._evidence(context, registered, probe.model_dump(mode="json"), state)
        if passed:
            await context.clients.registry.set_alias(context.project.name, "candidate", registered.version)
        return Decided(state=state, reason="so", hint="", evidence_hash=evidence, report_path="")

    async def _evidence(
        self, context: StageContext, registered: Registered, probe: dict[str, Any], state: NightState
    ) -> str:
        serving = await self.serving()
        adapter = await get_adapter(self.clients, registered.adapter)
        columns: dict[str, Any] = {
            "night_id": context.night_id,
            "adapter": registered.adapter,
            "adapter_digest": adapter.digest,
            "current": serving.current,
            "current_digest": (await get_adapter(self.clients, serving.current)).digest,
            "base_digest": adapter.base_digest,
            "data_digest": context.take(Delta).digest,
            "tasks_digest": "sha256:tasks",
            "passed": state == NightState.AWAITING_APPROVAL,
            "decision": state.value,
            "summary": {},
            "probe": probe,
        }
        async with self.clients.database.write() as session:
            await session.merge(Evidence(**columns, hash=digest_json(columns), report="# Report"))
        return digest_json(columns)


def tiny_base(folder: Path) -> Path:
    """A base folder for engines that never read it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


async def found_company(
    database: Database,
    mlflow_url: str,
    replica_urls: Sequence[str],
    folder: Path,
    *,
    base_dir: Path,
    base_name: str,
    allow_unattributed: bool = True,
    aliases: AliasTable | None = None,
    name: str | None = None,
) -> Company:
    """Prepared as at the product's start: version 1 and `production` on the base."""
    project = ProjectSettings(
        name=name or f"bot-{secrets.token_hex(4)}",
        base_dir=base_dir,
        base_name=base_name,
        approval=ApprovalSettings(allow_unattributed=allow_unattributed),
    )
    clients = Clients(
        database=database,
        label_studio=LabelStudioServer(NOWHERE, "none"),
        registry=Registry(MlflowSettings(url=mlflow_url, timeout_seconds=10)),
        objects=open_store(ObjectStoreSettings(), folder / "archive"),
        executor=LocalExecutor(),
        replicas=tuple(Replica(url) for url in replica_urls),
        aliases=aliases or AliasTable([project], [Upstream(url) for url in replica_urls]),
    )
    await projects.prepare(clients, project)
    return Company(clients, project, folder, mlflow_url)


async def close(company: Company) -> None:
    for replica in company.clients.replicas:
        await replica.close()
    await company.clients.label_studio.close()
