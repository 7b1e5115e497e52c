"""The demo's installation: a fresh folder, the model from its package, settings, `nightschool up` as a child."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from labeling.errors import Conflict
from service.children import Child
from service.demo.api import DemoBroke
from service.demo.company import Company

PROJECT = "support-bot"
BASE_NAME = "smollm2-135m-instruct"
MARK = ".nightschool-demo"
START_SECONDS = 600


class NotADemo(Conflict):
    code = "not_a_demo_folder"
    default_hint = "Name another folder with --data-dir, or remove this one yourself."


def fresh_folder(data_dir: Path) -> Path:
    """An earlier demo's folder is replaced; anything else in the way is left alone."""
    data_dir = data_dir.resolve()
    if data_dir.exists() and any(data_dir.iterdir()):
        if not (data_dir / MARK).exists():
            raise NotADemo(f"{data_dir} is not empty and was not made by the demo")
        shutil.rmtree(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    (data_dir / MARK).touch()
    return data_dir


async def prepare_model(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors, converted once from the package that ships it."""
    folder = cache / BASE_NAME
    command = (sys.executable, "-m", "loop.trainers.prepare_model", str(folder))
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await child.communicate()
    if child.returncode != 0:
        raise DemoBroke(f"the model could not be prepared: {errors.decode(errors='replace')[-600:]}")
    return folder


def write_settings(data_dir: Path, model_dir: Path, company: Company, quantisation: str) -> Path:
    """What an operator would have written; `held_out.jsonl` beside it is the company's own exam."""
    rows = [
        {"id": f"held-out-{index:03d}", "question": question.text, "accept": list(question.accept)}
        for index, question in enumerate(company.held_out())
    ]
    (data_dir / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = data_dir / "nightschool.toml"
    text = (Path(__file__).parent / "nightschool.demo.toml").read_text(encoding="utf-8")
    for name, value in {"PROJECT": PROJECT, "BASE_NAME": BASE_NAME, "BASE_DIR": model_dir, "NF4": quantisation}.items():
        text = text.replace(f"@{name}@", str(value))
    path.write_text(text, encoding="utf-8")
    return path


@asynccontextmanager
async def running(settings: Path, data_dir: Path) -> AsyncIterator[dict[str, Any]]:
    """`nightschool up` as a child that ends with us; gives what it wrote about itself once it is ready."""
    child = Child.start(
        "nightschool",
        [sys.executable, "-m", "service.cli", "up", "--settings", str(settings)],
        environment={},
        log_path=data_dir / "logs" / "nightschool.log",
        grace_seconds=60,
    )
    ready = data_dir / "state" / "ready.json"

    async def is_ready() -> bool:
        return ready.exists()

    try:
        await child.wait_ready(is_ready, START_SECONDS, cure="The log is in the demo's data folder, under logs/.")
        yield {**json.loads(ready.read_text(encoding="utf-8")), **_secrets(data_dir / "secrets")}
    finally:
        await child.stop()


def _secrets(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8").strip() for path in folder.iterdir() if path.is_file()}
