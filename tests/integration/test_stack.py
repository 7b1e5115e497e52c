"""`up`'s servers, the real ones: started, restarted after a crash, found again by the next start, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.children import ServerFailed
from service.settings import Settings
from service.stack import Stack, start_stack

ENGINE = {"replicas": [{"url": "http://127.0.0.1:9"}]}  # vLLM itself starts in its own tests


def settings_for(data_dir: Path, **parts: Any) -> Settings:
    project = {"name": "support-bot", "base_dir": "/models/base", "base_name": "base"}
    return Settings.model_validate({"data_dir": data_dir, "vllm": ENGINE, "projects": [project], **parts})


def silent(_: str) -> None:
    return None


def processes_of(folder: Path) -> list[int]:
    """Whose command line or working folder names it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = (entry / "cmdline").read_text() + str((entry / "cwd").readlink())
        except OSError:
            continue
        if str(folder) in told:
            found.append(int(entry.name))
    return found


async def whoami(stack: Stack) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=stack.label_studio_url, trust_env=False, timeout=60) as client:
        answer = await client.get(
            "/api/current-user/whoami", headers={"Authorization": f"Token {stack.label_studio_token}"}
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


async def healthy(url: str) -> bool:
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            return (await client.get(f"{url}/health")).status_code == 200
        except httpx.TransportError:
            return False


@pytest.mark.slow
async def test_two_starts_over_one_folder_and_a_crash_between(tmp_path: Path) -> None:
    """The second start finds login and databases of the first; a killed server is back at its address by itself."""
    settings, said = settings_for(tmp_path), list[str]()
    first = await start_stack(settings, log_dir=tmp_path / "logs", progress=said.append)
    try:
        assert (await whoami(first))["email"] == settings.label_studio.username
        assert [line.split()[0] for line in said[:2]] == ["starting", "starting"]
        assert any(line.startswith("mlflow ready after") and first.mlflow_url in line for line in said)
        assert first.vllm_urls == ("http://127.0.0.1:9",)
        await _crash_and_return(first, tmp_path / "mlflow")
    finally:
        await first.stop()
    assert processes_of(tmp_path) == []
    for secret in (tmp_path / "secrets").iterdir():
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600, secret

    second = await start_stack(settings, log_dir=tmp_path / "logs", progress=silent)
    try:
        assert second.label_studio_token == first.label_studio_token
        assert (await whoami(second))["email"] == settings.label_studio.username
    finally:
        await second.stop()
    assert processes_of(tmp_path) == []


async def _crash_and_return(stack: Stack, folder: Path) -> None:
    for pid in processes_of(folder):
        if "watchdog.py" not in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    assert not await healthy(stack.mlflow_url)
    deadline = time.monotonic() + 120
    while not await healthy(stack.mlflow_url):
        assert time.monotonic() < deadline, "not restarted"
        await asyncio.sleep(0.5)


async def test_one_that_fails_takes_the_others_with_it(tmp_path: Path) -> None:
    """A start that fails raises the reason at once, with its cure, and leaves no process."""
    settings = settings_for(tmp_path, label_studio={"managed": True, "command": "/nowhere/label-studio"})
    with pytest.raises(ServerFailed, match="/nowhere/label-studio could not be started") as failed:
        await start_stack(settings, log_dir=tmp_path / "logs", progress=silent)
    assert "make setup" in failed.value.hint
    assert processes_of(tmp_path) == []


async def test_cancelled_while_starting_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C during the start ends what had been started."""
    starting = asyncio.create_task(
        start_stack(
            settings_for(tmp_path, label_studio={"url": "http://127.0.0.1:9", "token": "t"}),
            log_dir=tmp_path / "logs",
            progress=silent,
        )
    )
    while not processes_of(tmp_path):
        await asyncio.sleep(0.02)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert processes_of(tmp_path) == []


def test_what_others_run_is_taken_by_url(tmp_path: Path) -> None:
    """Nothing is started or made up: a managed server that does not run has no address."""
    settings = settings_for(tmp_path, label_studio={"url": "http://ls", "token": "t"}, mlflow={"url": "http://ml"})
    assert Stack.configured(settings) == Stack(("http://127.0.0.1:9",), "http://ls", "t", "http://ml")
    assert Stack.configured(settings_for(tmp_path)).label_studio_url == ""
