"""The preflight stage, with the real audit and the real kernels in child processes; the engine is a small fake."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import AsyncIterator, Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import structlog
from transformers import AutoTokenizer

from labeling.database import Database, now
from labeling.errors import NightschoolError
from loop import nightly
from loop.machine_memory import Machine
from loop.memory_estimate import GIB
from loop.outputs import Delta, Preflight
from loop.preflight import machine, serving, trainer_environment
from loop.preflight.finding import PreflightFailed
from loop.settings import EngineSettings, ProjectSettings
from loop.stage import StageContext
from loop.stages import preflight
from loop.tables import Evidence, Night
from loop.trainers.spec import read_spec
from loop.vllm import Replica
from tests.bases import TEMPLATE, write_base
from tests.fakes.vllm import FakeVllm
from tests.running import offline_clients

OWN = TEMPLATE.replace("<user> ", "<after> <user> ")
ROW = {
    "id": "l1",
    "kind": "label",
    "messages": [{"role": "user", "content": "who founded it"}, {"role": "assistant", "content": "Ines did"}],
}


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(f"sqlite+aiosqlite:///{tmp_path}/t.db")
    await opened.create_tables()
    yield opened
    await opened.close()


def rendering(base_dir: Path, template: str | None = None) -> Callable[[dict[str, Any]], list[int]]:
    """As vLLM's /tokenize does it."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    if template is not None:
        tokenizer.chat_template = template

    def render(body: dict[str, Any]) -> list[int]:
        prompt = body.get("add_generation_prompt", True)
        return list(
            tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=prompt, tokenize=True, return_dict=True
            )["input_ids"]
        )

    return render


class Installed:
    """One project on one engine that serves its base."""

    def __init__(self, folder: Path, database: Database, engine: FakeVllm, **project: Any) -> None:
        self.folder, self.database, self.engine = folder, database, engine
        base_dir = folder / "base"
        self.project = ProjectSettings(name="bot", base_dir=base_dir, base_name="base", **project)
        self.clients = offline_clients(database, folder, [Replica(engine.url)])
        self.settings = EngineSettings(managed=True)
        self.nights = 0

    async def night(self) -> Preflight:
        self.nights += 1
        folder = self.folder / "nights" / str(self.nights) / "preflight.1"
        folder.mkdir(parents=True)
        (folder.parent / "train.jsonl").write_text(json.dumps(ROW))
        delta = Delta(
            data_dir=str(folder.parent), digest="sha256:d", label_ids=("l1",), label_rows=1, replay_rows=0, base_rows=0,
            held_out_items=0,
        )  # fmt: skip
        return await preflight.run(
            StageContext(
                night_id=f"ni_{self.nights}",
                project=self.project,
                engine=self.settings,
                date=date(2026, 11, 23 + self.nights),
                folder=folder,
                data_dir=self.folder,
                clients=self.clients,
                log=structlog.get_logger(),
                progress=lambda line: None,
                inputs={Delta: delta},
            )
        )

    async def passed(self, environment: dict[str, str]) -> None:
        """The last night was a good one, on this environment."""
        night = Night(id=f"ni_{self.nights}", project="bot", date=date(2026, 11, 23 + self.nights), due_at=now())
        digests: dict[str, Any] = dict.fromkeys(
            ("adapter_digest", "current_digest", "base_digest", "data_digest", "tasks_digest"), ""
        )
        evidence = Evidence(
            night_id=night.id, hash=night.id, adapter="bot@v2", current="bot@v1", passed=True, decision="", probe={},
            summary={"environment": environment}, report="", **digests,
        )  # fmt: skip
        async with self.database.write() as session:
            session.add(night)
            await session.flush()
            session.add(evidence)


@pytest.fixture
async def installed(tmp_path: Path, database: Database) -> AsyncIterator[Installed]:
    base_dir = write_base(tmp_path / "base")
    async with FakeVllm(base="base", root=str(base_dir), render=rendering(base_dir)) as engine:
        found = Installed(tmp_path, database, engine)
        yield found
        await found.clients.replicas[0].close()


async def test_a_sound_night_is_told_and_the_next_one_is_compared_with_it(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every check has its line; what changed since the last good night is a warning with a cure."""
    first = await installed.night()
    told = " | ".join(first.checks)
    for part in (
        "base base: sha256:",
        "chat template chat_template.jinja: sha256:",
        "weights whole: 1 files",
        "tokenizer fits: 12 tokens",
        "adapter servable: rank 16 of 16, 7 modules, 28 tensors",
        "(vLLM 0.32.0) serves base with the same bytes",
        "needed at worst",
        "written and synced",
        "needed to load the base",
        "1 rows go through the chat template whole",
        "renders 5 conversations into the trainer's tokens",
        "kernels work on ",
        "checkpointing ",
    ):
        assert part in told, part
    assert first.warnings == ()
    assert first.environment["python"] == sys.version.split()[0]
    assert "torch" in first.environment
    spec = json.loads(Path(first.spec_path).read_text())
    assert spec["template_digest"] == first.template_digest != ""
    assert spec["memory"]["plans"]

    monkeypatch.setattr(preflight, "CHECKS", (trainer_environment.kernels,))
    await installed.passed({**first.environment, "driver": "570.1", "torch": "2.0.0", "xformers": "1"})
    again = await installed.night()
    warning = next(line for line in again.warnings if "changed since the last good night, 2026-11-24" in line)
    assert "driver 570.1 -> " in warning
    assert "torch 2.0.0 -> " in warning
    assert "xformers 1 -> none" in warning
    await installed.passed(again.environment)
    third = await installed.night()
    assert "driver and packages are those of the last good night, 2026-11-25" in " | ".join(third.checks)
    assert third.warnings == ()


async def test_an_engine_with_another_template_stops_the_night(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by its tokens; the cure names the file and the flag. With the same template there, the night goes on."""
    monkeypatch.setattr(preflight, "CHECKS", (trainer_environment.tokenizer_at_work, serving.same_tokens))
    own = tmp_path / "own.jinja"
    own.write_text(OWN)
    installed.project = installed.project.model_copy(update={"chat_template": own})
    installed.settings = EngineSettings()
    with pytest.raises(PreflightFailed) as refused:
        await installed.night()
    assert "renders a conversation otherwise than the trainer, from token 0 on" in str(refused.value)
    assert refused.value.hint.startswith(f"Start that vLLM with --chat-template {own}")
    installed.engine.render = rendering(installed.project.base_dir, OWN)
    found = await installed.night()
    copy = json.loads(Path(found.spec_path).read_text())["chat_template"]
    assert Path(copy).read_text() == OWN
    assert "chat template own.jinja" in " | ".join(found.checks)


HALTED = """#!{python}
import os, runpy, sys
sys.path.insert(0, os.getcwd())
sys.modules["{package}"] = None
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


async def test_an_environment_that_lacks_a_package_is_told(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the package's name and with the cure, not with a traceback."""
    monkeypatch.setattr(preflight, "CHECKS", (trainer_environment.kernels,))
    python = tmp_path / "python"
    python.write_text(HALTED.format(python=sys.executable, package="bitsandbytes"))
    python.chmod(0o755)
    trainer = installed.project.trainer.model_copy(update={"python": str(python)})
    installed.project = installed.project.model_copy(update={"trainer": trainer})
    with pytest.raises(PreflightFailed, match="the trainer's environment lacks the package bitsandbytes") as refused:
        await installed.night()
    assert "projects.trainer.python" in refused.value.hint


def test_the_stage_is_the_nights_own() -> None:
    """What is tested here is what runs."""
    assert next(stage for stage in nightly.EXAMINE if stage.name == "preflight").run is preflight.run


async def failing(installed: Installed) -> NightschoolError:
    with pytest.raises(NightschoolError) as refused:
        await installed.night()
    return refused.value


async def test_every_trouble_in_one_go(installed: Installed) -> None:
    """A night costs a day: nobody mends one thing a day. What starts children is left out then."""
    trainer = installed.project.trainer.model_copy(update={"rank": 64, "target_modules": ("q_proj", "lm_head")})
    installed.project = installed.project.model_copy(update={"trainer": trainer})
    installed.engine.base = "other"
    error = await failing(installed)
    assert str(error).startswith("2 checks failed: (1) trainer.rank 64 is above vLLM's max_lora_rank 16")
    assert "does not serve 'base'; it serves other" in str(error)
    assert "(2) Set projects.base_name" in error.hint
    assert not list(installed.folder.glob("nights/*/*/preflight.log"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainer": {"target_modules": ("lm_head",)}}, "names 'lm_head', which engines do not serve"),
        ({"engine": {"max_lora_rank": 24}}, "24 is none that vLLM takes"),
        ({"version": "0.21.0"}, "runs vLLM 0.21.0, which is older than 0.26"),
        ({"root": "other"}, "is not the model in"),
        ({"base": {"quantization_config": {"quant_method": "gptq"}}}, "is stored quantised (gptq)"),
        (
            {
                "base": {"quantization_config": {"quant_method": "gptq"}},
                "trainer": {"finetuning_type": "full", "quantisation": "none"},
            },
            "(gptq): its weights can't be trained themselves",
        ),
    ],
)
async def test_what_could_not_be_served_or_trained_is_refused(
    installed: Installed, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    if recipe := change.get("trainer"):
        trainer = installed.project.trainer.model_copy(update=recipe)
        installed.project = installed.project.model_copy(update={"trainer": trainer})
    installed.settings = installed.settings.model_copy(update=change.get("engine", {}))
    installed.engine.version = change.get("version", "0.32.0")
    if "root" in change:
        installed.engine.root = str(write_base(tmp_path / "other", template="{{ messages }}"))
    if config := change.get("base"):
        path = installed.project.base_dir / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    error = await failing(installed)
    assert said in str(error)
    assert error.hint


async def test_a_base_without_template_says_what_to_do(installed: Installed) -> None:
    (installed.project.base_dir / "chat_template.jinja").unlink()
    error = await failing(installed)
    assert "has no chat template" in str(error)
    assert "projects.chat_template" in error.hint


async def test_limits_of_disk_and_caches_are_warnings_with_cures(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both can be set; here they are set so that no machine keeps them."""
    checks = [check for check in preflight.CHECKS if check not in preflight.COSTLY]
    monkeypatch.setattr(preflight, "CHECKS", tuple(checks))
    kept = installed.folder / "cache" / "trainer"
    kept.mkdir(parents=True)
    (kept / "kernel.bin").write_bytes(bytes(120_000_000))
    limits = installed.project.preflight.model_copy(update={"disk_mb_per_s_at_least": 1e5, "caches_gb_at_most": 0.1})
    installed.project = installed.project.model_copy(update={"preflight": limits})
    found = await installed.night()
    slow = next(line for line in found.warnings if "written and synced" in line)
    grown = next(line for line in found.warnings if "caches have grown" in line)
    assert "preflight.disk_mb_per_s_at_least is 100000. Move data_dir" in slow
    assert f"{kept} 0.1 GB" in grown
    assert "Delete those folders" in grown


async def test_a_training_that_can_never_fit_is_refused(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it starts, with what it needs; planned only once the rest is well."""
    monkeypatch.setattr(preflight, "CHECKS", ())
    trainer = installed.project.trainer.model_copy(update={"memory_budget_gib": 0.01})
    installed.project = installed.project.model_copy(update={"trainer": trainer})
    error = await failing(installed)
    assert "training needs" in str(error)
    assert "may take 0.0 GiB" in str(error)
    assert "trainer.memory_budget_gib" in error.hint
    monkeypatch.setattr(preflight, "CHECKS", (serving.same_base,))
    installed.engine.base = "other"
    assert "does not serve 'base'" in str(await failing(installed))


async def test_a_full_fine_tune_that_does_not_fit_is_refused_with_what_would(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the planner, before the night; one that fits goes on with its plan."""
    monkeypatch.setattr(preflight, "CHECKS", ())
    full = {"finetuning_type": "full", "quantisation": "none"}
    for free, fits in ((GIB, True), (GIB // 2, False)):
        monkeypatch.setattr(preflight, "this_machine", lambda cards, free=free: Machine("cpu", "here", GIB, free, 4))
        trainer = installed.project.trainer.model_copy(update=full)
        installed.project = installed.project.model_copy(update={"trainer": trainer})
        if fits:
            told = await installed.night()
            spec = read_spec(Path(told.spec_path))
            assert spec.finetuning_type == "full"
            assert spec.memory.plans[0].budget_bytes == int(0.9 * free)
        else:
            error = await failing(installed)
            assert "a full fine-tune needs" in str(error)
            assert "for the training" in error.hint


async def test_a_folder_that_cannot_be_written_is_told(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is: the disk is full, or read-only. Files may have 1 MB here, and a block has 4."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(preflight, "CHECKS", (machine.disk_speed,))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        error = await failing(installed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write in" in str(error)
    assert not list(installed.folder.glob(".speed.*"))
