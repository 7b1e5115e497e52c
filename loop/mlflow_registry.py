"""Boundary: MLflow, for runs and their curves, for versions with tags and aliases. The one file that imports mlflow.

An alias there is a request by whoever may write it, never the truth about what serves: `loop.promotion` judges it.

RegistryUnavailable  down, slow, or failing inside
RegistryRefused      our credentials, or a rule of the server's or of ours
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from labeling.errors import Refused, Unavailable
from loop.settings import MlflowSettings

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by mlflow when it is imported

from mlflow import MlflowClient, environment_variables
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

T = TypeVar("T")
RETRIES = 1
READY_SECONDS = 30
MAX_DESCRIPTION = 5000  # MLflow's column
MAX_PARAM = 500
METRICS_A_REQUEST = 1000
KIND, NIGHT, BASE_DIGEST, ADAPTER_DIGEST = (
    *("nightschool.kind", "nightschool.night"),
    *("nightschool.base_digest", "nightschool.adapter_digest"),
)
MISSING = frozenset({"RESOURCE_DOES_NOT_EXIST", "ENDPOINT_NOT_FOUND"})


class RegistryUnavailable(Unavailable):
    code = "registry_unavailable"
    default_hint = "Check that MLflow runs at mlflow.url; what serves stays, and the night can be resumed."


class RegistryRefused(Refused):
    code = "registry_refused"


@dataclass(frozen=True)
class RegistryVersion:
    """One version of a project's registered model; 1 is the base itself."""

    version: int
    run_id: str
    tags: Mapping[str, str]
    description: str


class Registry:
    def __init__(self, settings: MlflowSettings, *, url: str = "") -> None:
        """`url`: of a managed server, which settings do not know."""
        self.url = (url or settings.url).rstrip("/")
        _configure(settings)
        # Given no address, its client makes a database of its own in the working directory.
        self._client = MlflowClient(tracking_uri=self.url, registry_uri=self.url) if self.url else None

    async def check(self) -> None:
        """Answers, and knows us."""
        await self._call("reading the registry", lambda c: c.search_registered_models(max_results=1))

    def version_url(self, project: str, version: int) -> str:
        return f"{self.url}/#/models/{project}/versions/{version}"

    async def ensure_model(self, project: str, *, base_digest: str, base_name: str) -> None:
        """The registered model, its version 1 (the base) and, when just made, `production` on it. Idempotent."""
        first = await self.version_info(project, 1)
        if first is None:
            first = await self._make_base_version(project, base_digest, base_name)
        if first.tags.get(KIND) != "base" or first.tags.get(BASE_DIGEST) != base_digest:
            raise RegistryRefused(
                f"version 1 of MLflow's model {project!r} is not this base ({base_digest[:19]}…)",
                hint="Another base or another program used that name: choose a new project name.",
            )

    async def start_run(self, project: str, night_id: str, name: str, parameters: Mapping[str, str]) -> str:
        """A new run of the night; an interrupted earlier one is marked KILLED."""

        def start(client: MlflowClient) -> str:
            experiment = _experiment(client, project)
            mine = f"tags.`{NIGHT}` = '{night_id}' and attributes.status = 'RUNNING'"
            for left in client.search_runs([experiment], mine):
                client.set_terminated(left.info.run_id, "KILLED")
            run_id: str = client.create_run(experiment, run_name=name, tags={NIGHT: night_id}).info.run_id
            client.log_batch(run_id, params=[Param(key, value[:MAX_PARAM]) for key, value in parameters.items()])
            return run_id

        return await self._call(f"starting the run of night {night_id}", start)

    async def log_metrics(self, run_id: str, metrics: Mapping[int, Mapping[str, float]]) -> None:
        """By step; a request for each thousand, which is as many as MLflow takes."""
        at = time.time_ns() // 1_000_000
        rows = [Metric(key, value, at, step) for step, found in metrics.items() for key, value in found.items()]
        for start in range(0, len(rows), METRICS_A_REQUEST):
            batch = rows[start : start + METRICS_A_REQUEST]
            await self._call(f"logging metrics of run {run_id}", partial(_log_metrics, run_id=run_id, metrics=batch))

    async def tag_run(self, run_id: str, tags: Mapping[str, str]) -> None:
        def put(client: MlflowClient) -> None:
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

        await self._call(f"tagging run {run_id}", put)

    async def log_files(self, run_id: str, path: Path, place: str | None = None) -> None:
        """A file or a folder as artifacts of the run, under `place`."""
        log = "log_artifacts" if path.is_dir() else "log_artifact"
        await self._call(f"uploading {path.name}", lambda c: getattr(c, log)(run_id, str(path), place))

    async def finish_run(self, run_id: str, *, failed: bool = False, tags: Mapping[str, str] | None = None) -> None:
        def finish(client: MlflowClient) -> None:
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in (tags or {}).items()])
            client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

        await self._call(f"finishing run {run_id}", finish)

    async def register(
        self,
        project: str,
        run_id: str,
        adapter_dir: Path,
        *,
        night_id: str,
        tags: Mapping[str, str],
        description: str = "",
    ) -> int:
        """The version of this night's adapter; looked up first, because a call cut short may have made it."""
        wanted = {**tags, NIGHT: night_id}
        for known in await self.versions_of_night(project, night_id):
            if known.tags.get(ADAPTER_DIGEST) == wanted.get(ADAPTER_DIGEST):
                return known.version

        def make(client: MlflowClient) -> int:
            client.log_artifacts(run_id, str(adapter_dir), "adapter")
            source = f"runs:/{run_id}/adapter"
            made = client.create_model_version(
                project, source, run_id, wanted, description=_fit(description), await_creation_for=READY_SECONDS
            )
            return int(made.version)

        return await self._call(f"registering the adapter of night {night_id}", make)

    async def versions_of_night(self, project: str, night_id: str) -> list[RegistryVersion]:
        search = f"name = '{project}' and tags.`{NIGHT}` = '{night_id}'"
        found = await self._call("searching versions", lambda c: list(c.search_model_versions(search)))
        return sorted((_version(one) for one in found), key=lambda one: one.version)

    async def version_info(self, project: str, version: int) -> RegistryVersion | None:
        """None when there is no such model or version."""
        what = f"reading version {version} of {project!r}"
        found = await self._call(what, lambda c: _or_none(lambda: c.get_model_version(project, str(version))))
        return _version(found) if found is not None else None

    async def aliases(self, project: str) -> dict[str, int]:
        """All of them, also one whose version was deleted (MLflow leaves it dangling, mlflow#24825)."""
        model = await self._call(f"reading the aliases of {project!r}", lambda c: c.get_registered_model(project))
        return {alias: int(version) for alias, version in model.aliases.items()}

    async def set_alias(self, project: str, alias: str, version: int) -> None:
        """Read again after writing: the server has no compare-and-set."""

        def put(client: MlflowClient) -> int:
            client.set_registered_model_alias(project, alias, str(version))
            return int(client.get_model_version_by_alias(project, alias).version)

        stands = await self._call(f"moving {alias!r} of {project!r} to version {version}", put)
        if stands != version:
            raise RegistryUnavailable(
                f"alias {alias!r} of {project!r} stands on {stands}, not on {version}: moved again"
            )

    async def delete_alias(self, project: str, alias: str) -> None:
        """Gone already is gone."""

        def remove(client: MlflowClient) -> bool:
            client.delete_registered_model_alias(project, alias)
            return alias in client.get_registered_model(project).aliases

        if await self._call(f"removing alias {alias!r} of {project!r}", remove):
            raise RegistryUnavailable(f"alias {alias!r} of {project!r} was set again meanwhile")

    async def set_tags(self, project: str, version: int, tags: Mapping[str, str]) -> None:
        def put(client: MlflowClient) -> None:
            for key, value in tags.items():
                client.set_model_version_tag(project, str(version), key, value)

        await self._call(f"tagging version {version} of {project!r}", put)

    async def set_description(self, project: str, version: int, text: str) -> None:
        """Markdown, shown on the version's page; cut where MLflow's column ends."""
        what = f"describing version {version} of {project!r}"
        await self._call(what, lambda c: c.update_model_version(project, str(version), _fit(text)))

    async def _make_base_version(self, project: str, base_digest: str, base_name: str) -> RegistryVersion:
        def make(client: MlflowClient) -> RegistryVersion:
            _ignoring_existing(lambda: client.create_registered_model(project, description=f"Adapters of {base_name}"))
            run = client.create_run(_experiment(client, project), run_name=f"base {base_name}", tags={KIND: "base"})
            run_id = run.info.run_id
            client.log_dict(run_id, {"base": base_name, "digest": base_digest}, "base/base.json")
            client.set_terminated(run_id)
            tags = {KIND: "base", BASE_DIGEST: base_digest, "nightschool.base": base_name}
            source, text = f"runs:/{run_id}/base", f"The base itself: {base_name}"
            made = client.create_model_version(
                project, source, run_id, tags, description=text, await_creation_for=READY_SECONDS
            )
            if int(made.version) == 1:
                client.set_registered_model_alias(project, "production", "1")
                return _version(made)
            client.delete_model_version(project, made.version)
            return _version(client.get_model_version(project, "1"))

        return await self._call(f"making version 1 of {project!r}", make)

    async def _call(self, what: str, work: Callable[[MlflowClient], T]) -> T:
        """In a thread: the client blocks."""

        client = self._client
        if client is None:
            raise RegistryUnavailable(f"MLflow is not running, for {what}", hint="`nightschool up` starts it.")

        def run() -> T:
            with _translated(self.url, what):
                return work(client)

        return await asyncio.to_thread(run)


def _log_metrics(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
    client.log_batch(run_id, metrics=metrics)


def _configure(settings: MlflowSettings) -> None:
    """By its own variables, the only means that its client offers; unset, one call would be retried for minutes."""
    environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.set(max(1, round(settings.timeout_seconds)))
    environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(RETRIES)
    environment_variables.MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR.set(1)
    environment_variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    environment_variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    if settings.username and settings.password is not None:
        environment_variables.MLFLOW_TRACKING_USERNAME.set(settings.username)
        environment_variables.MLFLOW_TRACKING_PASSWORD.set(settings.password.get_secret_value())


@contextmanager
def _translated(url: str, what: str) -> Iterator[None]:
    """The vendor's error table. A failed connection is an INTERNAL_ERROR like any other to its client."""
    try:
        yield
    except MlflowException as error:
        _fail(url, what, error)
    except FileNotFoundError:  # ours, not MLflow's
        raise
    except OSError as error:  # requests' errors are: an artifact's upload does not wrap them
        raise RegistryUnavailable(f"MLflow at {url} failed {what}: {error}") from error


def _fail(url: str, what: str, error: MlflowException) -> NoReturn:
    status, reason = error.get_http_status_code(), str(error.message)[:500]
    if status in {401, 403}:
        raise RegistryRefused(
            f"MLflow at {url} does not let us do this: {what}",
            hint="Set mlflow.username and mlflow.password to a user with EDIT permission on the project's model.",
        ) from error
    if status in {408, 429} or status >= 500:
        raise RegistryUnavailable(f"MLflow at {url} failed {what}: {reason}") from error
    raise RegistryRefused(f"MLflow at {url} refused {what}: {reason}") from error


def _experiment(client: MlflowClient, project: str) -> str:
    """One a project."""
    name = f"nightschool/{project}"
    _ignoring_existing(lambda: client.create_experiment(name))
    experiment_id: str = client.get_experiment_by_name(name).experiment_id
    return experiment_id


def _ignoring_existing(create: Callable[[], object]) -> None:
    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _or_none(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except MlflowException as error:
        if error.error_code in MISSING:
            return None
        raise


def _version(found: Any) -> RegistryVersion:
    return RegistryVersion(int(found.version), found.run_id or "", dict(found.tags), found.description or "")


def _fit(text: str) -> str:
    cut = "\n\n… (cut: the whole report is among the run's artifacts)"
    return text if len(text) <= MAX_DESCRIPTION else text[: MAX_DESCRIPTION - len(cut)] + cut
