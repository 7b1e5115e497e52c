"""Several cards: how a step is dealt out, what the launchers are given, what is refused before the night."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from loop import machine_memory, process_tree
from loop.backends import limits
from loop.machine_memory import Machine
from loop.memory_estimate import GIB, Setup, Workload, estimate
from loop.model_shape import NAMED
from loop.plan_advice import Question, answer
from loop.preflight import machine as machine_checks
from loop.preflight.finding import PreflightFailed
from loop.run_plan import planned
from loop.settings import TrainerSettings
from loop.trainers import launcher
from loop.trainers.batches import Batches
from loop.trainers.launch_config import accelerate_config, fsdp_config, write_config, zero3_config
from loop.trainers.progress import Said, say
from loop.trainers.rows import Example
from loop.trainers.shares import most_parts, shares
from loop.trainers.spec import CardsSpec, Row, TrainSpec, render, run_digest
from loop.trainers.team import ALONE, CARDS, ERRORS, STARTED, Team, take_seat
from tests.bases import write_base

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def spec_of(folder: Path, **changed: Any) -> TrainSpec:
    fields = {"base_dir": folder, "base_name": "b", "base_digest": "d", "data_dir": folder, "out_dir": folder}
    return TrainSpec.model_validate({**fields, **changed})


@given(lengths=LENGTHS, ranks=st.integers(1, 8))
def test_every_row_goes_to_one_rank_and_tokens_are_even(lengths: list[int], ranks: int) -> None:
    """In the step's order; no rank has more than another by more than the longest row."""
    rows = list(range(len(lengths)))
    dealt = shares(rows, lengths, ranks)
    assert sorted(chain.from_iterable(dealt)) == rows
    assert all(part == sorted(part) for part in dealt)
    tokens = [sum(lengths[row] for row in part) for part in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert dealt == shares(rows, lengths, ranks)
    assert shares(rows, lengths, 1) == [rows]


def test_a_row_that_comes_twice_is_trained_twice() -> None:
    assert sorted(chain.from_iterable(shares([3, 3, 1], [9, 5, 9, 4], 2))) == [1, 3, 3]


@given(lengths=LENGTHS, ranks=st.integers(2, 4), at_once=st.integers(1, 120), replay=st.integers(1, 5))
def test_ranks_that_hold_the_base_together_pass_through_it_equally_often(
    lengths: list[int], ranks: int, at_once: int, replay: int
) -> None:
    """Their parts make up the step: each answer's token once, divided by the whole step's; idle ones hold no row."""
    examples = [Example(str(n), tuple(range(size + 1)), 1, n % replay == 0) for n, size in enumerate(lengths)]
    batches = Batches(examples, 0, hold=True, at_once=at_once)
    rows = list(range(len(examples)))
    of_ranks = [batches.share(rows, Team(rank, ranks, sharded=True)) for rank in range(ranks)]
    assert len({len(parts) for parts in of_ranks}) == 1
    real = [part for parts in of_ranks for part in parts if not part.idle]
    assert sorted(row for part in real for row in part.held_rows) == [n for n in rows if n % replay == 0]
    held = sum(size for n, size in enumerate(lengths) if n % replay == 0)
    assert {(part.total_targets, part.total_held) for part in real} == {(sum(lengths) - held, held)}
    assert sum(len(part.at) for part in real) == sum(lengths)
    assert all(not part.held_rows for parts in of_ranks for part in parts if part.idle)
    apart = [batches.share(rows, Team(rank, ranks)) for rank in range(ranks)]
    assert not any(part.idle for parts in apart for part in parts)
    assert len(batches.share(rows, ALONE)) == len(batches(rows))
    dealt = shares(rows, batches.lengths, ranks)
    assert most_parts(dealt, batches.lengths, at_once) == max(len(parts) for parts in apart)


def test_one_card_has_no_launcher_and_the_digest_knows_no_cards(tmp_path: Path) -> None:
    """A run may go on with another number of cards; sharing out the base alone needs the launcher on one card."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert not CardsSpec().launched
    assert not CardsSpec(sharding="replicate").launched
    assert CardsSpec(gpus=2).launched
    assert CardsSpec(sharding="fsdp").launched
    one, two = spec_of(tmp_path), spec_of(tmp_path, cards={"gpus": 2, "sharding": "fsdp"})
    assert run_digest(one) == run_digest(two)
    with pytest.raises(ValidationError, match="finish_share must be 0"):
        spec_of(tmp_path, cards={"sharding": "fsdp"}, schedule={"finish_share": 0.1})


def test_the_recipe_is_rendered_for_its_cards(tmp_path: Path) -> None:
    """No finish where the base is shared out; preferences as answers."""

    def rendered(method: Any = "sft", **recipe: Any) -> TrainSpec:
        places: dict[str, Any] = {"base_dir": tmp_path, "data_dir": tmp_path, "out_dir": tmp_path}
        settings = TrainerSettings(**recipe)
        return render(settings, **places, base_name="b", base_digest="d", method=method)

    assert rendered().cards == CardsSpec()
    two = rendered(gpus=2)
    assert (two.cards, two.schedule.finish_share) == (CardsSpec(gpus=2), 0.25)
    shared = rendered(gpus=4, sharding="fsdp")
    assert (shared.cards.gpus, shared.cards.sharding, shared.schedule.finish_share) == (4, "fsdp", 0)
    assert rendered("kto", gpus=2).cards == two.cards
    assert rendered("dpo", gpus=4, sharding="fsdp").cards == shared.cards
    for wrong in ({"gpus": 0}, {"gpus": 65}, {"sharding": "zero2"}):
        with pytest.raises(ValidationError):
            TrainerSettings.model_validate(wrong)


@pytest.mark.parametrize("cards", [{"gpus": 2}, {"gpus": 8, "sharding": "fsdp"}, {"sharding": "fsdp"}])
def test_accelerates_own_launcher_takes_the_yaml(tmp_path: Path, cards: dict[str, Any]) -> None:
    """Its classes read every key, and its launcher would make the environment that its plugin reads."""
    spec = spec_of(tmp_path, cards=cards)
    path = write_config(spec, tmp_path, on_gpu=True)
    config = load_config_from_file(str(path))
    sharded = cards.get("sharding") == "fsdp"
    assert config.distributed_type == (DistributedType.FSDP if sharded else DistributedType.MULTI_GPU)
    assert config.num_processes == cards.get("gpus", 1)
    assert config.fsdp_config == (fsdp_config() if sharded else {})
    words = ["--config_file", str(path), "--num_cpu_threads_per_process", "1", "-m", "m", "s"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (arguments.use_fsdp, arguments.multi_gpu) == (sharded, not sharded)
    assert arguments.num_processes == config.num_processes
    assert arguments.mixed_precision == "no"


def test_accelerates_plugin_reads_what_its_launcher_tells(tmp_path: Path) -> None:
    """FSDP2, a layer gathered again in the backward pass, nothing offloaded."""
    path = write_config(spec_of(tmp_path, cards={"gpus": 2, "sharding": "fsdp"}), tmp_path, on_gpu=True)
    words = ["--config_file", str(path), "--num_cpu_threads_per_process", "1", "-m", "m", "s"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = {name: value for name, value in prepare_multi_gpu_env(arguments).items() if name.startswith("FSDP_")}
    plugin = Team(settings=told).sharding()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.ignored_modules


def test_zero3_is_as_transformers_reads_it(tmp_path: Path) -> None:
    """Stage 3, and every "auto" one that transformers fills in."""
    config = zero3_config(spec_of(tmp_path, schedule={"max_grad_norm": 0.3}), on_gpu=True)
    assert config["gradient_clipping"] == 0.3
    assert config["bf16"]["enabled"] is True
    assert config["zero_optimization"]["stage"] == 3
    assert json.loads(json.dumps(config)) == config
    filled = {
        *("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
        *("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"),
    }
    assert set(_autos(config)) == filled


def _autos(config: dict[str, Any]) -> list[str]:
    found = []
    for name, value in config.items():
        found += _autos(value) if isinstance(value, dict) else [name] * (value == "auto")
    return found


def test_a_rank_sees_its_own_card_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the libraries below see one process: what the launcher told is taken out."""
    assert take_seat() is None
    told = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4242", "FSDP_VERSION": "2", "ACCELERATE_USE_FSDP": "true"}
    ours = {CARDS: '["3", "GPU-5"]', STARTED: "12.5", ERRORS: str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    for name, value in {**told, **ours}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", "made")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_NCCL_ENABLE_MONITORING", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "")
    seat = take_seat()
    assert seat is not None
    assert (seat.rank, seat.size, seat.address, seat.port, seat.started) == (1, 2, "127.0.0.1", 4242, 12.5)
    assert (seat.card, seat.errors) == (0, tmp_path)
    assert seat.settings == {"FSDP_VERSION": "2", "ACCELERATE_USE_FSDP": "true"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-5"
    assert not {*told, CARDS} & os.environ.keys()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["UNSLOTH_COMPILE_LOCATION"]) == ("lo", "made-rank1")
    for name, value in {**told, **ours}.items():
        monkeypatch.setenv(name, value)
    beside = take_seat(apart=False)
    assert beside is not None
    assert (beside.card, os.environ["CUDA_VISIBLE_DEVICES"], os.environ["RANK"]) == (1, "3,GPU-5", "1")


def test_what_a_rank_says_is_read_whole(tmp_path: Path) -> None:
    say(PreflightFailed("a\nb", hint="c"), tmp_path, 3)
    said = Said.read(tmp_path / "3.json")
    assert (said.code, said.message, said.hint) == ("preflight_failed", "a\nb", "c")
    assert list(tmp_path.glob("*")) == [tmp_path / "3.json"]
    say(PreflightFailed("later"), tmp_path, 3)
    assert Said.read(tmp_path / "3.json") == said


def test_the_rank_that_failed_first_is_believed(tmp_path: Path) -> None:
    """A word for it before the others' surprise, and anything before having been told to stop; of a killed rank its
    fellows' surprise is no reason, unless it was killed because of them, for not ending."""
    now = time.monotonic()
    words = {0: ("trainer_error", now - 1), 1: ("out_of_memory", now - 2), 2: ("stopped", now - 3)}
    for rank, (code, at) in words.items():
        (tmp_path / f"{rank}.json").write_text(json.dumps({"at": at, "code": code, "message": code, "hint": None}))
    first = launcher._first(tmp_path, "ranks ended")
    assert (first.code, str(first)) == ("out_of_memory", "out_of_memory")
    assert launcher._explained(tmp_path)
    (tmp_path / "1.json").unlink()
    assert not launcher._explained(tmp_path)
    (tmp_path / "0.json").write_text(json.dumps({"at": now - 31, "code": "trainer_error", "message": "", "hint": None}))
    assert launcher._explained(tmp_path)
    (tmp_path / "0.json").unlink()
    assert launcher._first(tmp_path, "ranks ended").code == "stopped"
    (tmp_path / "2.json").unlink()
    assert str(launcher._first(tmp_path, "ranks ended")) == "ranks ended"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"backend": "unsloth", "gpus": 2, "sharding": "fsdp"}, "sft", "whole base on each card"),
    ({"backend": "peft", "gpus": 2, "sharding": "zero3"}, "sft", "DeepSpeed"),
    ({"backend": "unsloth", "gpus": 2, "sharding": "fsdp"}, "kto", "whole base on each card"),
    ({"backend": "axolotl", "python": "/p", "gpus": 3, "replay_loss": "ce"}, "sft", "not so divided by 3"),
    ({"backend": "axolotl", "python": "/p", "gpus": 8, "replay_share": 0}, "dpo", "not so divided by 8"),
]


@pytest.mark.parametrize(("recipe", "method", "reason"), REFUSED)
def test_what_cards_can_not_do_is_refused_with_a_cure(recipe: dict[str, Any], method: Any, reason: str) -> None:
    ((told, cure),) = limits(TrainerSettings(**recipe), method, continues=False, replay_rows=0).refused
    assert reason in told
    assert "Set trainer." in cure


def test_what_is_left_unused_is_told() -> None:
    """The finish of a base that is shared out; all cards are used, whatever the method."""

    def told(method: Any = "sft", **recipe: Any) -> str:
        found = limits(TrainerSettings(**recipe), method, continues=False, replay_rows=0)
        assert not found.refused
        return "; ".join(found.told)

    for method in ("sft", "dpo", "orpo", "kto", "sft+dpo"):
        assert "no card has the whole base" in told(method, gpus=2, sharding="fsdp")
        assert told(method, gpus=2) == told(method) == ""


def _driver(folder: Path, cards: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that knows these cards and how much each has free, in MiB."""
    tool = folder / "nvidia-smi"
    cases = "".join(f'*--id={name}*) echo "81920, {free}, H100";;\n' for name, free in cards.items())
    listed = "\\n".join(cards)
    tool.write_text(f'#!/bin/sh\ncase "$*" in\n*=index*) printf "{listed}\\n";;\n{cases}*) exit 6;;\nesac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        ("", []),
        ("1,-1,2", ["1"]),
        ("0,7,1", ["0"]),
        ("GPU-ab", ["GPU-ab"]),
    ],
)
def test_the_cards_that_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: list[str]
) -> None:
    """As CUDA counts them: up to the first name that is none."""
    _driver(tmp_path, {"0": 70000, "1": 50000, "2": 60000}, monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine_memory.visible_cards() == seen


def test_the_fullest_card_decides_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(tmp_path, {"0": 70000, "1": 50000, "2": 60000}, monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [machine_memory.this_machine(cards).free >> 20 for cards in (1, 2, 3)] == [70000, 50000, 50000]
    monkeypatch.setenv("PATH", "/nowhere")
    shared = machine_memory.this_machine(4)
    assert shared.device == "cpu"
    assert shared.free == pytest.approx(machine_memory.host().free / 4, rel=0.2)


async def test_more_cards_than_there_are_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason and the cure, before anything trains; one card needs none."""

    def look(**cards: Any) -> Any:
        return SimpleNamespace(spec=spec_of(tmp_path, cards=cards))

    _driver(tmp_path, {"0": 70000, "1": 50000}, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(PreflightFailed, match=r"gpus = 2, and 1 can be seen here \(CUDA_VISIBLE_DEVICES is '1'\)"):
        await machine_checks.cards(look(gpus=2))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (found,) = await machine_checks.cards(look(gpus=2))
    assert found.text == "2 cards train together, sharding auto"
    assert await machine_checks.cards(look()) == []
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PreflightFailed, match="none can be seen here"):
        await machine_checks.cards(look(gpus=2))
    (found,) = await machine_checks.cards(look(sharding="fsdp"))
    assert "1 card trains" in found.text


def test_the_base_is_shared_out_only_where_it_must_be(tmp_path: Path) -> None:
    """Left open: whole on each card as long as that fits, which is faster; then without a finish, and it is said."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
    base = write_base(tmp_path / "base", config=sizes | heads)
    messages = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "it"}]
    row = Row.model_validate({"id": "a", "kind": "label", "messages": messages})
    spec = spec_of(tmp_path, base_dir=base, quantisation="none", cards={"gpus": 4}, schedule={"finish_share": 0.25})
    large, small = (Machine("cuda", "card", free, free, 2) for free in (80 * GIB, 13 * GIB))
    whole, shared = (planned(spec, "peft", [row], machine) for machine in (large, small))
    assert (whole.spec.cards.sharding, whole.spec.schedule.finish_share) == ("replicate", 0.25)
    assert "4 x card" in whole.words
    assert "on each card" in whole.words
    assert (shared.spec.cards.sharding, shared.spec.schedule.finish_share) == ("fsdp", 0)
    assert shared.fits
    assert "shared out among the cards, so that finish_share is not used" in shared.words
    stays = planned(spec, "unsloth", [row], small)
    assert (stays.spec.cards.sharding, stays.hopeless) == ("replicate", True)
    alone = planned(spec_of(tmp_path, base_dir=base), "peft", [row], large)
    assert alone.spec.cards == CardsSpec()


def test_cards_share_rows_and_if_need_be_weights() -> None:
    """Adapters, table and head stay whole; a sharded layer is whole while it is at work."""
    setup, work = Setup(NAMED["8B"], method="lora", backend="peft"), Workload(8192, 4096, 4096)
    one, two = estimate(setup, work, "on"), estimate(replace(setup, gpus=2), work, "on")
    assert two.weights == one.weights
    assert two.total > one.total  # what cards need to talk to each other
    shared = estimate(replace(setup, gpus=2, sharded=True), work, "on")
    linear = 2 * NAMED["8B"].linear_parameters
    assert one.weights - shared.weights == pytest.approx(linear / 2, rel=1e-6)
    assert (shared.adapter, shared.activations) == (one.adapter, one.activations)
    assert shared.workspace > one.workspace
    found = answer(Question(NAMED["32B"], "lora", 80 * GIB, gpus=2, batch=8))
    assert not found.question.sharded or found.plan.fits


def test_descendants_are_found_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with names that look like something else."""
    for process, parent, name in ((2, 1, "a"), (3, 2, ") S 1 ("), (4, 3, "b c"), (5, 9, "d")):
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "stat").write_text(f"{process} ({name}) S {parent} 1 1 0")
    (tmp_path / "7").mkdir()
    monkeypatch.setattr(process_tree, "PROC", tmp_path)
    assert process_tree.children(2) == [3]
    assert process_tree.descendants(1) == [2, 3, 4]
    assert process_tree.descendants(8) == []


def test_the_yaml_is_the_whole_of_what_is_launched(tmp_path: Path) -> None:
    """On a CPU, too, where the ranks share the processor."""
    spec = spec_of(tmp_path, cards={"gpus": 2})
    config = yaml.safe_load(write_config(spec, tmp_path, on_gpu=False).read_text())
    assert config == accelerate_config(spec, on_gpu=False)
    assert (config["use_cpu"], config["num_machines"], config["main_process_port"]) == (True, 1, 0)
