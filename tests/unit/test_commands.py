"""What commands say when they can't do their work, and what they refuse before they start anything."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labeling.database import Database
from labeling.tables import Label, LabelState, ReviewItem, Verdict
from loop.held_labels import confirm
from loop.night_view import refused_labels
from service import installation
from service.commands import doctor, local_api, night
from service.data_dir import DataDirInUse, DataDirLock
from tests.running import PROJECT, settings_for

HOLD = """
import sys, time
from pathlib import Path
from service.data_dir import DataDirLock
with DataDirLock(Path(sys.argv[1]), "process 7"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
READY = b'{"ready": true, "checks": [{"name": "database", "ok": true, "detail": "answers", "hint": ""}, \
{"name": "mlflow", "ok": false, "detail": "no answer", "hint": "Start it."}]}'


def _held(folder: Path, seconds: float) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


async def test_a_command_waits_for_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both want the folder for a moment; after a while the one that waits says who has it."""
    with _held(tmp_path, 0.5):
        assert await local_api._server(tmp_path) is None
    monkeypatch.setattr(local_api, "COMMAND_SECONDS", 0.2)
    with _held(tmp_path, 60) as holder:
        with pytest.raises(DataDirInUse, match="in use by process 7") as caught:
            await local_api._server(tmp_path)
        assert "Try again" in caught.value.hint
        holder.kill()


@pytest.mark.parametrize(
    ("given", "segment"), [("ni_1", "ni_1"), ("../projects/x", "..%2Fprojects%2Fx"), ("?#", "%3F%23")]
)
def test_an_id_stays_one_segment_of_its_path(given: str, segment: str) -> None:
    assert local_api.in_path(given) == segment


def test_an_empty_id_is_refused() -> None:
    with pytest.raises(local_api.NoId):
        local_api.in_path("")


def test_a_wrong_date_starts_no_server(tmp_path: Path) -> None:
    """vLLM alone takes half a minute."""
    settings = settings_for([], data_dir=tmp_path / "data")
    with pytest.raises(night.BadDate, match="31st"):
        asyncio.run(night._run(settings, PROJECT, "31st", resume=False))
    assert not (tmp_path / "data").exists()


async def test_doctor_asks_the_running_installation(tmp_path: Path) -> None:
    """Servers of its own may be dead although they are installed; one that does not answer is trouble too."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(READY), READY))
        await writer.drain()
        writer.close()

    settings = settings_for([], data_dir=tmp_path).model_copy(
        update={"mlflow": settings_for([]).mlflow.model_copy(update={"managed": True})}
    )
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with DataDirLock(tmp_path, f"http://127.0.0.1:{port}"):
        assert await doctor._managed(settings) == [doctor.Finding("mlflow", "trouble", "no answer", "Start it.")]
        server.close()
        await server.wait_closed()
        (finding,) = await doctor._managed(settings)
    assert (finding.name, finding.level) == ("up", "trouble")


def test_small_answers_are_not_held_back(tmp_path: Path) -> None:
    """asyncio switches Nagle's algorithm off for sockets that name their protocol, and for no other."""
    with installation.listen(settings_for([], data_dir=tmp_path)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


async def test_refused_labels_are_shown_with_their_reason(database: Database) -> None:
    item = ReviewItem(
        project=PROJECT, prompt_digest="d", messages=[{"role": "user", "content": "q"}], answer="a", task_id=5
    )
    other = ReviewItem(project=PROJECT, prompt_digest="e", messages=[], answer="a")
    common: dict[str, Any] = {
        "project": PROJECT,
        "verdict": Verdict.WRONG,
        "messages": item.messages,
        "flagged_answer": "a",
    }
    async with database.write() as session:
        session.add_all([item, other])
        await session.flush()
        session.add(Label(item_id=item.id, state=LabelState.REFUSED, reason="the correction is empty", **common))
        session.add(Label(item_id=other.id, state=LabelState.ACCEPTED, correction="b", **common))
    (row,) = await refused_labels(database, PROJECT)
    assert (row["task"], row["reason"], row["prompt"]) == (5, "the correction is empty", item.messages)
    assert await refused_labels(database, "another") == []
    assert await confirm(database, PROJECT, []) == 0
