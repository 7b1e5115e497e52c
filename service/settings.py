"""One `nightschool.toml`, typed and bounded. The only module that reads the environment.

`load(path)` reports every mistake in one go. A secret is written as "env:NAME" or "file:PATH", never as itself.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from labeling.errors import InvalidInput
from labeling.settings import LabelStudioSettings, Strict
from loop.settings import EngineSettings, MlflowSettings, ObjectStoreSettings, ProjectSettings

SECRET_KEYS = frozenset({"token", "password", "api_key", "access_key", "secret_key"})
PATH_KEYS = frozenset(
    {
        *("data_dir", "base_dir", "chat_template", "held_out_file", "prompts_file", "folder"),
        *("embedding_model_dir", "names_model_dir"),
    }
)


class SettingsError(InvalidInput):
    code: ClassVar[str] = "settings_error"
    default_hint = "Correct nightschool.toml; `nightschool init` writes a commented example."


class HttpSettings(Strict):
    host: str = Field("127.0.0.1", description="Any other address is your explicit choice")
    port: int = Field(8700, ge=0, le=65535, description="0 = any free one")
    max_body_bytes: int = Field(4_000_000, ge=1_000, le=1_000_000_000)
    capture_queue: int = Field(
        4096, ge=1, le=1_000_000, description="Exchanges waiting to be stored; more are dropped and counted"
    )
    ingest_queue: int = Field(4096, ge=1, le=1_000_000, description="Feedback waiting for its commit; more answer 503")
    upstream_timeout_seconds: float = Field(600.0, gt=0, le=86_400)
    request_timeout_seconds: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="For a whole request to come in; a body that goes on coming may take longer",
    )
    stalled_client_seconds: float = Field(
        120.0, gt=0, le=86_400, description="An answer waits so long for a client that reads nothing"
    )
    max_connections: int = Field(
        10_000, ge=1, le=60_000, description="Open ones; more are closed at once. Open files may allow fewer"
    )


class DatabaseSettings(Strict):
    url: str = Field("", description="postgresql+asyncpg://user@host/name; empty = SQLite in the data directory")

    @model_validator(mode="after")
    def _known(self) -> DatabaseSettings:
        if self.url and not self.url.startswith(("postgresql+asyncpg://", "sqlite+aiosqlite://")):
            raise ValueError("url must begin with postgresql+asyncpg:// or sqlite+aiosqlite://")
        return self


class Settings(Strict):
    data_dir: Path = Path("nightschool-data")
    http: HttpSettings = HttpSettings()
    database: DatabaseSettings = DatabaseSettings()
    vllm: EngineSettings = EngineSettings(managed=True)
    label_studio: LabelStudioSettings = LabelStudioSettings(managed=True)
    mlflow: MlflowSettings = MlflowSettings(managed=True)
    object_store: ObjectStoreSettings = ObjectStoreSettings()
    projects: tuple[ProjectSettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        names = [project.name for project in self.projects]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"project names must differ; repeated: {', '.join(repeated)}")
        bases = {(project.base_name, project.base_dir) for project in self.projects}
        if len(bases) > 1:
            raise ValueError(
                "all projects of one installation share one base model (base_name, base_dir): "
                "run another installation for another base"
            )
        if len({project.chat_template for project in self.projects}) > 1:
            raise ValueError("all projects of one installation share one engine, and so one chat_template")
        return self

    @property
    def database_url(self) -> str:
        return self.database.url or f"sqlite+aiosqlite:///{self.data_dir.resolve() / 'nightschool.db'}"

    @property
    def adapters_dir(self) -> Path:
        return self.data_dir.resolve() / "adapters"

    @property
    def nights_dir(self) -> Path:
        return self.data_dir.resolve() / "nights"

    @property
    def archive_dir(self) -> Path:
        return (self.object_store.folder or self.data_dir / "archive").resolve()

    def project(self, name: str) -> ProjectSettings:
        for project in self.projects:
            if project.name == name:
                return project
        raise InvalidInput(f"no project {name!r}", hint=f"Configured: {', '.join(p.name for p in self.projects)}.")


def load(path: Path) -> Settings:
    """Reads, resolves secrets and relative paths (against the file's folder) and validates."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingsError(
            f"no settings file at {path}", hint="Run `nightschool init` first, or name one with --settings."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    mistakes: list[str] = []
    resolved = _resolve(raw, path.resolve().parent, "", mistakes)
    try:
        settings = Settings.model_validate(resolved)
    except ValidationError as error:
        mistakes += [
            f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
    if mistakes:
        raise SettingsError(
            f"{path}: {len(mistakes)} mistake(s)\n" + "\n".join(f"  - {mistake}" for mistake in mistakes)
        )
    return settings


def _resolve(value: Any, folder: Path, where: str, mistakes: list[str]) -> Any:
    """Secrets by reference become secrets, relative paths absolute; mistakes are collected, not raised."""
    if isinstance(value, list):
        return [_resolve(item, folder, f"{where}.{index}", mistakes) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    resolved: dict[str, Any] = {}
    for key, item in value.items():
        place = f"{where}.{key}" if where else key
        if key in SECRET_KEYS and isinstance(item, str) and item:
            resolved[key] = _secret(item, folder, place, mistakes)
        elif key in PATH_KEYS and isinstance(item, str) and item:
            resolved[key] = folder / Path(item).expanduser()
        elif not (key in PATH_KEYS and item == ""):
            resolved[key] = _resolve(item, folder, place, mistakes)
    return resolved


def _secret(reference: str, folder: Path, place: str, mistakes: list[str]) -> str | None:
    kind, _, name = reference.partition(":")
    if kind == "env" and name:
        if name not in os.environ:
            mistakes.append(f"{place}: environment variable {name} is not set")
        return os.environ.get(name)
    if kind == "file" and name:
        try:
            return (folder / Path(name).expanduser()).read_text(encoding="utf-8").strip()
        except OSError as error:
            mistakes.append(f"{place}: cannot read {name}: {error.strerror}")
            return None
        except UnicodeDecodeError:
            mistakes.append(f"{place}: {name} is not text in UTF-8")
            return None
    mistakes.append(f'{place}: write a secret as "env:NAME" or "file:PATH", not as itself')
    return None
