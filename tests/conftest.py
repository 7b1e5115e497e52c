"""Real servers for the tests: each started once, when the first test asks for it, and ended with the session.

They run under the product's own watchdog: nothing is left behind, also when the tests are killed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import asyncpg
import pytest

import labeling.tables  # noqa: F401  # these three: every table is known before any is created
import loop.tables  # noqa: F401
import service.tables  # noqa: F401
from labeling.database import Database
from labeling.settings import LabelStudioSettings
from loop.settings import EngineSettings
from service import servers
from service.bench import postgres
from service.servers import LabelStudioLogin, Server

# Started in the background of a script, we ignore SIGINT, and so would every child whose end by Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
BASE_NAME = "smollm2-135m-instruct"
ORDER = ("unit", "contract", "integration")
HEAVY = ("vllm_server", "label_studio", "mlflow_server", "smollm2_dir")
START_SECONDS = 60.0


@dataclass(frozen=True)
class VllmServer:
    url: str
    base_name: str
    base_dir: Path


@dataclass(frozen=True)
class LabelStudio:
    url: str
    token: str
    database: Path  # its SQLite file, for backups and their restoration


@dataclass(frozen=True)
class MlflowServer:
    url: str


@dataclass(frozen=True)
class S3Server:
    """`endpoint` is host:port, without TLS. Buckets live as long as the server."""

    endpoint: str
    access_key: str
    secret_key: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick ones first; those that need a model or a big server last, and marked slow."""

    def rank(item: pytest.Item) -> tuple[int, bool]:
        kind = next((part for part in item.path.parts if part in ORDER), ORDER[0])
        return ORDER.index(kind), _heavy(item)

    for item in items:
        if _heavy(item):
            item.add_marker(pytest.mark.slow)
    items.sort(key=rank)


def _heavy(item: pytest.Item) -> bool:
    """By what it asks for, or, where one of several kinds does, by the mark of that kind."""
    asked = any(name in getattr(item, "fixturenames", ()) for name in HEAVY)
    return asked or item.get_closest_marker("slow") is not None


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; converted at the first call, then kept in .cache/."""
    folder = ROOT / ".cache" / "models" / BASE_NAME
    subprocess.run([sys.executable, "-m", "loop.trainers.prepare_model", str(folder)], check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def vllm_server(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory, log_dir: Path) -> Iterator[VllmServer]:
    """As `nightschool up` starts it: bfloat16 on CPU, runtime LoRA. Tests unload what they load."""
    settings = EngineSettings(managed=True, threads=os.cpu_count() or 1)
    folder = tmp_path_factory.mktemp("vllm")
    server = servers.vllm(settings, smollm2_dir, BASE_NAME, _port(), folder)
    yield from _served(server, log_dir, VllmServer(server.url, BASE_NAME, smollm2_dir))


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory, log_dir: Path) -> Iterator[LabelStudio]:
    """The installed one; another version by LABEL_STUDIO_COMMAND, the path of its executable."""
    settings = LabelStudioSettings(managed=True, command=os.environ.get("LABEL_STUDIO_COMMAND", ""))
    folder = tmp_path_factory.mktemp("label-studio")
    login = LabelStudioLogin.kept(settings, folder / "secrets")
    server = servers.label_studio(settings, login, _port(), folder)
    yield from _served(server, log_dir, LabelStudio(server.url, login.token, folder / "label_studio.sqlite3"))


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, log_dir: Path) -> Iterator[MlflowServer]:
    server = servers.mlflow(_port(), tmp_path_factory.mktemp("mlflow"))
    yield from _served(server, log_dir, MlflowServer(server.url))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory, log_dir: Path) -> Iterator[S3Server]:
    port = _port()
    server = Server(
        name="s3",
        url=f"http://{servers.HOST}:{port}",
        command=(sys.executable, "-m", "moto.server", "-H", servers.HOST, "-p", str(port)),
        environment={},
        folder=tmp_path_factory.mktemp("s3"),
        health="/moto-api/",
        start_seconds=START_SECONDS,
        cure="",
    )
    yield from _served(server, log_dir, S3Server(f"{servers.HOST}:{port}", "tests", secrets.token_hex(8)))


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Of an empty PostgreSQL that this session owns. Where there is none: a failure in CI, else a skip."""
    port = _port()
    try:
        child, folder = postgres.start(port)
    except postgres.NoPostgres as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(f"NOT TESTED ON POSTGRESQL: {missing}")
    url = f"postgresql+asyncpg://{postgres.USER}@{servers.HOST}:{port}/postgres"
    try:
        asyncio.run(child.wait_ready(lambda: _accepts(url), START_SECONDS))
        yield url
    finally:
        asyncio.run(child.stop())
        shutil.rmtree(folder)


@pytest.fixture
async def postgres_database(postgres_url: str) -> AsyncIterator[str]:
    """The URL of a fresh, empty database, dropped after the test."""
    name = f"test_{secrets.token_hex(6)}"
    await _execute(postgres_url, f"CREATE DATABASE {name}")
    yield postgres_url.rpartition("/")[0] + f"/{name}"
    await _execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database; each test that asks for it runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/test.db"
    return str(request.getfixturevalue("postgres_database"))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """Every table, no rows."""
    opened = Database(database_url)
    await opened.create_tables()
    yield opened
    await opened.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [str(one.longrepr) for one in terminalreporter.stats.get("skipped", [])]
    for what, missing in (
        ("NOT TESTED ON", "PostgreSQL"),
        ("NOT TESTED IN", "browser"),
        ("NOT TESTED WITH", "axolotl"),
    ):
        count = sum(what in reason for reason in skipped)
        if count:
            terminalreporter.section(f"{count} tests did not run: no {missing} on this machine", red=True, bold=True)


def _port() -> int:
    return servers.free_ports(1)[0]


def _served(server: Server, log_dir: Path, told: T) -> Iterator[T]:
    child = server.start(log_dir)
    try:
        asyncio.run(server.wait_ready(child))
        yield told
    finally:
        asyncio.run(child.stop())


async def _accepts(url: str) -> bool:
    try:
        await _execute(url, "SELECT 1")
    except (OSError, asyncpg.CannotConnectNowError):
        return False
    return True


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
