"""Memory plans: estimates hold against measured peaks, the fastest that fits is chosen, the next one takes less."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loop import machine_memory
from loop.heaviest_step import RowSize, heaviest_batch, heaviest_step
from loop.machine_memory import Machine
from loop.memory_estimate import GIB, Setup, Workload, estimate
from loop.memory_plan import Plan, halves, itemised, ladder, plan_for, plans_by_speed, seconds
from loop.memory_record import MemoryOutcome, MemoryRecord, fall_back, in_words, read_record, write_record
from loop.model_shape import NAMED, UnknownShape, find_shape, read_shape, shape_of
from loop.plan_advice import Question, answer
from loop.run_plan import plans_of, row_sizes
from loop.trainers.spec import MemorySpec, Row, TrainSpec, run_digest

ROOT = Path(__file__).parent.parent.parent
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# One H100, 8B Llama shape, rank 16 on all linear layers, 8-bit AdamW, the model's own loss over every token:
# backend, method, checkpointing, rows of 4096, tokens a second, GiB at the peak.
MEASURED = (
    ("peft", "qlora", "on", 2, 7300, 19.5),
    ("peft", "lora", "on", 2, 6785, 29.1),
    ("unsloth", "qlora", "offload", 2, 10264, 7.3),
    ("unsloth", "lora", "offload", 2, 10461, 16.8),
    ("unsloth", "qlora", "off", 1, 12675, 19.9),
    ("unsloth", "qlora", "off", 2, 13379, 34.0),
    ("unsloth", "lora", "off", 1, 14545, 29.4),
    ("unsloth", "lora", "off", 2, 13649, 43.6),
)
MEASURED_SETUP = Setup(NAMED["8B"], optimizer="adamw_8bit", loss="model")
BATCH = Workload(tokens=8 * 4096, length=4096, scored=8 * 1024, replay_scored=1024)
SETUP = Setup(NAMED["8B"])


@pytest.mark.parametrize(("backend", "method", "mode", "rows", "speed", "peak"), MEASURED)
def test_estimates_hold_against_what_was_measured(
    backend: Any, method: Any, mode: Any, rows: int, speed: float, peak: float
) -> None:
    """Peaks within 15 %, and really within 5; tokens a second within 10 %."""
    setup = replace(MEASURED_SETUP, backend=backend, method=method)
    work = Workload(tokens=rows * 4096, length=4096, scored=rows * 4096)
    assert estimate(setup, work, mode).allocated / GIB == pytest.approx(peak, rel=0.05)
    assert work.tokens / seconds(setup, work, mode) == pytest.approx(speed, rel=0.1)


# The same card through the trainer, packed: model, method, rows a step, mean and longest row, measured tokens a second.
SHORT = (
    ("8B", "qlora", 32, 178, 400, 14328),
    ("8B", "qlora", 8, 175, 400, 6317),
    ("135M", "lora", 16, 60, 60, 5993),
    ("135M", "lora", 64, 60, 60, 23490),
)


@pytest.mark.parametrize(("model", "method", "rows", "mean", "longest", "speed"), SHORT)
def test_short_rows_speed_is_a_usual_batchs(
    model: str, method: Any, rows: int, mean: int, longest: int, speed: float
) -> None:
    """Within 10 %: no time goes into the padding of the worst batch, which is what memory is planned for."""
    small = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    tied = {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
    shape = NAMED["8B"] if model == "8B" else shape_of(LLAMA | small | tied, "x")
    lengths = [2 * mean - longest, longest] * (rows // 2)
    batch = heaviest_batch([RowSize(tokens, round(0.7 * tokens), replay=False) for tokens in lengths], rows)
    assert batch.tokens == rows * longest
    plan = plan_for(Setup(shape, method=method), batch, "off", batch.tokens, 80 * GIB)
    assert plan.tokens_per_s == pytest.approx(speed, rel=0.1)


def test_parameters_are_the_models_own() -> None:
    """Against the published counts; an adapter against PEFT's for this shape (41,943,040)."""
    published = {"1B": 1.236e9, "3B": 3.213e9, "7B": 6.738e9, "8B": 8.030e9, "13B": 13.016e9, "32B": 32.76e9}
    for name, count in published.items():
        assert NAMED[name].parameters == pytest.approx(count, rel=2e-3), name
    assert NAMED["8B"].adapter_parameters(16, list(NAMED["8B"].sides())) == 41_943_040


def test_a_shape_is_read_from_config_json(tmp_path: Path) -> None:
    """Also of a multimodal model's text part; heads need not share the width, the head may be the table."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert replace(read_shape(tmp_path), name="8B") == NAMED["8B"]
    assert find_shape(str(tmp_path)) == read_shape(tmp_path)
    assert find_shape("8b") == NAMED["8B"]
    wide = shape_of({"text_config": {**LLAMA, "model_type": "gemma", "head_dim": 256}}, "x")
    assert (wide.query_width, wide.tied) == (32 * 256, True)
    assert not shape_of({**LLAMA, "model_type": "starcoder2"}, "x").gated


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts"),
        ({"model_type": "mamba2"}, "family 'mamba2'"),
        ({"model_type": None}, "family None"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ],
)
def test_what_is_not_known_is_refused_with_the_reason(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(UnknownShape, match=why):
        shape_of({**LLAMA, **changed}, "x")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    for content in (None, "no JSON", "[]"):
        if content:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UnknownShape, match=str(tmp_path)):
            read_shape(tmp_path)
    with pytest.raises(UnknownShape, match="num_hidden_layers"):
        shape_of({key: value for key, value in LLAMA.items() if key != "num_hidden_layers"}, "x")


@given(
    name=st.sampled_from(sorted(NAMED)),
    tokens=st.integers(16, 1 << 20),
    backend=st.sampled_from(["peft", "unsloth"]),
    method=st.sampled_from(["qlora", "lora", "full"]),
)
def test_less_is_kept_from_mode_to_mode(name: str, tokens: int, backend: Any, method: Any) -> None:
    """Off keeps most, offloading least; more tokens need more; the items make up the sum."""
    setup = Setup(NAMED[name], method=method, backend=backend)
    work = Workload(tokens=tokens, length=16, scored=tokens // 2)
    off, on, offload = (estimate(setup, work, mode) for mode in ("off", "on", "offload"))
    assert off.total > on.total > offload.total
    assert estimate(setup, replace(work, tokens=2 * tokens), "on").total > on.total
    assert on.total == sum(value for key, value in vars(on).items() if key not in {"host", "moment"})
    assert (on.host, offload.host > 0) == (0, True)


def test_four_bits_less_a_parameter_and_eight_less_a_moment() -> None:
    """NF4 takes 0.516 bytes a weight; the 8-bit optimizer a quarter; of two cards that share it, each half a base."""
    four, sixteen = (estimate(replace(SETUP, method=method), BATCH, "on") for method in ("qlora", "lora"))
    linear = NAMED["8B"].linear_parameters
    assert sixteen.weights - four.weights - four.quantisation_constants == pytest.approx(linear * (2 - 0.516), rel=1e-3)
    eight = estimate(replace(SETUP, optimizer="adamw_8bit"), BATCH, "on")
    assert eight.optimizer_states * 4 == four.optimizer_states
    halves = estimate(replace(SETUP, method="lora", gpus=2, sharded=True), BATCH, "on")
    assert sixteen.weights - halves.weights == pytest.approx(linear, rel=1e-6)


@pytest.mark.parametrize(
    ("budget", "mode", "tokens"), [(80, "off", 16384), (40, "off", 8192), (24, "off", 4096), (18, "on", 16384)]
)
def test_the_fastest_that_fits_is_taken(budget: int, mode: str, tokens: int) -> None:
    """Checkpointing goes off where it fits, and more tokens at once come next; the recipe's batch stays whole."""
    first = ladder(plans_by_speed(SETUP, BATCH, budget * GIB))[0]
    assert (first.checkpointing, first.micro_tokens) == (mode, tokens)
    assert first.micro_batches * first.micro_tokens >= BATCH.tokens
    assert first.fits


@given(budget=st.integers(1, 120), tokens=st.integers(1, 64), device=st.sampled_from(["cuda", "cpu"]))
def test_each_rung_takes_clearly_less(budget: int, tokens: int, device: Any) -> None:
    """Slower and smaller from rung to rung, down to the leanest of all, which is there even where nothing fits."""
    setup = replace(SETUP, device=device)
    plans = plans_by_speed(setup, Workload(tokens * 512, 512, tokens * 128), budget * GIB)
    rungs = ladder(plans)
    assert all(above.estimated_bytes > below.estimated_bytes for above, below in pairwise(rungs))
    assert all(above.tokens_per_s >= below.tokens_per_s for above, below in pairwise(rungs))
    assert all(above.estimated_bytes * 0.87 >= below.estimated_bytes for above, below in pairwise(rungs[:-1]))
    assert rungs[-1].estimated_bytes == min(plan.estimated_bytes for plan in plans)
    assert [plan.fits for plan in rungs[:-1]] == [True] * (len(rungs) - 1)
    assert device == "cuda" or all(plan.checkpointing != "offload" for plan in plans)


def test_a_row_is_never_cut_into_parts() -> None:
    """The smallest part is the longest row, also where less was asked for."""
    plans = plans_by_speed(SETUP, BATCH, GIB, sizes=halves(BATCH, most=100))
    assert {plan.micro_tokens for plan in plans} == {4096}
    assert plan_for(SETUP, BATCH, "on", 10**9, GIB).micro_batches == 1


def test_an_answer_says_what_would_fit() -> None:
    """13B in bfloat16 on 24 GiB does not; each of the cures does, alone."""
    question = Question(shape=NAMED["13B"], method="lora", card_bytes=24 * GIB)
    found = answer(question)
    assert found.short == found.plan.estimated_bytes - found.plan.budget_bytes > 0
    assert found.items.total == found.plan.estimated_bytes
    assert found.cures[0] == "--method qlora"
    assert not answer(replace(question, method="qlora")).short
    assert "--gpus 2" in found.cures
    assert not answer(replace(question, gpus=2)).short
    size = int(found.cures[-1].removeprefix("--gpu ").removesuffix("GiB"))
    assert not answer(replace(question, card_bytes=size * GIB)).short
    assert answer(replace(question, card_bytes=(size - 1) * GIB)).short


def test_the_command_prints_the_usual_table_without_torch() -> None:
    """7B and 13B on one card, 32B on two, full fine-tuning; JSON has the same; a mistake is two lines."""
    table = _plan()
    assert table.returncode == 0, table.stderr
    assert all(word in table.stdout for word in ("7B", "13B", "32B", "full", "fits", "short by", "would fit with"))
    found = json.loads(_plan("--model", "32B", "--gpus", "2", "--method", "qlora", "--json").stdout)
    assert [(line["model"], line["gpus"], line["fits"]) for line in found] == [("32B", 2, True)]
    assert sum(found[0]["items"].values()) == found[0]["estimated_bytes"]
    for wrong in (("--gpu", "big"), ("--method", "dream"), ("--model", "no/such")):
        failed = _plan(*wrong)
        assert failed.returncode == 1
        assert len(failed.stderr.splitlines()) == 2


def _plan(*words: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys; from service.cli import main; sys.argv[0] = 'nightschool'\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    return subprocess.run(
        [sys.executable, "-c", script, "plan", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _spec(folder: Path, **changed: Any) -> TrainSpec:
    fields = {"base_dir": folder, "base_name": "b", "base_digest": "d", "data_dir": folder, "out_dir": folder / "out"}
    return TrainSpec.model_validate(fields | changed)


def test_a_run_is_planned_from_its_rows_and_its_budget(tmp_path: Path) -> None:
    """Short rows need no checkpointing; a budget of the settings, or a share of what is free, holds."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    card = Machine("cuda", "a card", 24 * GIB, 20 * GIB, 2)
    short = heaviest_batch([RowSize(64, 16, replay=False)] * 8, 8)
    assert plans_of(_spec(tmp_path), "unsloth", card, short)[0].checkpointing == "off"
    long = heaviest_batch([RowSize(4096, 512, replay=False)] * 8, 8)
    planned = plans_of(_spec(tmp_path), "unsloth", card, long)
    assert planned[0].budget_bytes == int(0.9 * 20 * GIB)
    assert planned[0].checkpointing != "off"
    given_budget = _spec(tmp_path, memory={"budget_gib": 10, "checkpointing": "offload"})
    assert {plan.budget_bytes for plan in plans_of(given_budget, "unsloth", card, long)} == {10 * GIB}
    assert {plan.checkpointing for plan in plans_of(given_budget, "unsloth", card, long)} == {"offload"}


def test_a_step_of_preferences_is_planned_by_its_pairs(tmp_path: Path) -> None:
    """Of eight places four are pairs of two rows, or thumbs of one: at most three beside replay rows, which go through
    apart; pairs stay whole."""

    def heaviest(method: str, replay: list[RowSize], preferences: list[RowSize]) -> Workload:
        spec = _spec(tmp_path, method=method, schedule={"batch_size": 8, "replay_share": 0.4})
        return heaviest_step(spec, replay, preferences)

    pairs = [RowSize(100 + number, 20 + number, replay=False) for number in range(12)]
    replay = [RowSize(60, 24, replay=True)] * 9
    dpo = heaviest("dpo", replay, pairs)
    assert (dpo.tokens, dpo.length, dpo.together, dpo.least) == (6 * 111, 111, 2, 222)
    assert (dpo.scored, dpo.replay_scored, dpo.ahead) == (sum(range(26, 32)), 2 * 24, 1)
    kto = heaviest("kto", replay, pairs)
    assert (kto.tokens, kto.together) == (3 * 111, 1)
    assert heaviest("orpo", [], pairs).tokens == 8 * 111
    few = heaviest("orpo", [], pairs[:2])
    assert (few.tokens, few.replay_scored) == (2 * 101, 0)
    long_replay = heaviest("dpo", [RowSize(900, 700, replay=True)] * 9, pairs)
    assert (long_replay.tokens, long_replay.scored, long_replay.least) == (2 * 900, 2 * 700, 1800)
    assert {plan.micro_tokens for plan in plans_by_speed(SETUP, dpo, GIB, sizes=halves(dpo, most=1))} == {222}


def test_a_card_is_planned_its_share_of_the_preferences(tmp_path: Path) -> None:
    """Pairs whole: of four, three cards have two at the most; replay rows likewise."""

    def heaviest(method: str, gpus: int, replay: int = 0) -> Workload:
        share = 0.5 if replay else 0.0
        spec = _spec(tmp_path, method=method, cards={"gpus": gpus}, schedule={"batch_size": 8, "replay_share": share})
        return heaviest_step(spec, [RowSize(900, 50, replay=True)] * replay, pairs)

    pairs = [RowSize(100, 40, replay=False)] * 24
    assert [heaviest("dpo", gpus).tokens for gpus in (1, 2, 3, 4, 8)] == [800, 400, 400, 200, 200]
    assert [heaviest("kto", gpus).tokens for gpus in (1, 2, 3, 8)] == [400, 200, 200, 100]
    for gpus in (1, 2, 4):  # as `nightschool plan` tells beforehand, which knows rows alone
        asked = Question(NAMED["8B"], "lora", GIB, gpus=gpus, length=100, batch=8)
        assert asked.work.tokens == heaviest("dpo", gpus).tokens
    assert [heaviest("dpo", gpus, replay=40).tokens for gpus in (1, 2, 3)] == [3 * 900, 2 * 900, 900]


@pytest.mark.parametrize(
    ("rows", "together", "most", "wanted"),
    [(8, 1, None, [8, 4, 2, 1]), (3, 1, None, [3, 1]), (6, 2, None, [6, 2]), (10, 2, 8, [8, 4, 2]), (1, 1, 9, [1])],
)
def test_what_goes_at_once_is_whole_rows_or_pairs(
    rows: int, together: int, most: int | None, wanted: list[int]
) -> None:
    """Half of three pairs is one pair: an estimate of three rows would be half too high."""
    work = Workload(rows * 100, 100, rows * 20, together=together)
    assert halves(work, most and most * 100) == [number * 100 for number in wanted]


def test_answers_that_are_shown_first_count_too(tmp_path: Path) -> None:
    """Of two phases the worse, whichever it is: sft's rows where they are longer, the pairs' two that stay together."""

    def heaviest(method: str, rows: list[RowSize]) -> Workload:
        spec = _spec(tmp_path, method=method, schedule={"batch_size": 8, "replay_share": 0.0})
        return heaviest_step(spec, rows, units)

    rows = [RowSize(300, 30, replay=False), *[RowSize(60, 24, replay=True)] * 9]
    units = [RowSize(100, 40, replay=False)] * 12
    both = heaviest("sft+dpo", rows)
    assert (both.tokens, both.length, both.least) == (8 * 300, 300, 600)
    assert (both.scored, both.ahead) == (8 * 40, 32)
    assert heaviest("kto", rows).tokens == 8 * 300
    assert heaviest("kto", rows[1:]).tokens == 4 * 100
    assert heaviest("dpo", rows).tokens == 8 * 100, "corrections are not shown by dpo"


def test_rows_are_measured_before_the_trainer_reads_them(tmp_path: Path) -> None:
    """Never fewer tokens than bytes could make, never more than a row may have."""
    answer_text = "Ines Okafor did."
    row = Row.model_validate(
        {
            "id": "a",
            "kind": "replay",
            "messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": answer_text}],
        }
    )
    (size,) = row_sizes([row], tmp_path, 1024)
    assert size.replay
    assert size.tokens >= size.answer >= len(answer_text)
    assert row_sizes([row], tmp_path, 40)[0].tokens == 40


def test_the_plan_does_not_make_another_run(tmp_path: Path) -> None:
    """So that a checkpoint is resumed after falling back."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    other = MemorySpec(budget_gib=3, plans=(_rung(5),))
    assert run_digest(_spec(tmp_path)) == run_digest(_spec(tmp_path).model_copy(update={"memory": other}))


def _rung(estimated: int, **changed: Any) -> Plan:
    fields = {"micro_tokens": 100, "estimated_bytes": estimated, "budget_bytes": 10, "device": "cpu", "tokens_per_s": 1}
    return Plan.model_validate(fields | changed)


def test_falling_back_goes_down_the_ladder_once_a_rung(tmp_path: Path) -> None:
    """What was given up is kept; at the bottom there is nothing left; without a record neither."""
    assert fall_back(tmp_path) is None
    write_record(tmp_path, MemoryRecord(run_digest="d", machine="m", plans=(_rung(9), _rung(5))))
    assert fall_back(tmp_path, 11) == _rung(5)
    assert fall_back(tmp_path) is None
    record = read_record(tmp_path, "d")
    assert record is not None
    assert [(a.plan, a.outcome, a.measured_bytes) for a in record.attempts] == [(_rung(9), "out_of_memory", 11)]
    assert read_record(tmp_path, "another run") is None
    (tmp_path / "memory.json").write_text("torn")
    assert read_record(tmp_path) is None


def test_an_outcome_is_told_in_one_line() -> None:
    plan = _rung(2 * GIB, checkpointing="on", micro_tokens=8192, micro_batches=2, budget_bytes=4 * GIB)
    record = {"plan": _rung(3 * GIB), "outcome": "out_of_memory", "measured_bytes": None}
    words = in_words(
        MemoryOutcome.model_validate({"plan": plan, "machine": "host", "measured_bytes": GIB, "attempts": [record]})
    )
    assert words == (
        "checkpointing on, at most 8,192 tokens at once, 2 micro-batches for the largest; estimated 2.0 GiB, measured "
        "1.0 GiB of 4.0 GiB (host); before that checkpointing off with 100 tokens (3.0 GiB estimated) ran out of memory"
    )


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only what the whole machine has; what the page cache holds can be had."""
    for name, text in {"memory.max": f"{4 * GIB}", "memory.current": f"{3 * GIB}"}.items():
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 2}\n")
    (tmp_path / "memory.events").write_text("oom 9\noom_kill 7\n")
    monkeypatch.setattr(machine_memory, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text(f"MemTotal: 64 kB\nMemAvailable: {9 * GIB // 1024} kB\n")
    monkeypatch.setattr(machine_memory, "PROC", tmp_path)
    assert machine_memory.available_bytes() == 3 * GIB // 2
    assert machine_memory.oom_kills() == 7
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_memory.available_bytes() == 9 * GIB


def test_a_card_is_asked_through_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that CUDA_VISIBLE_DEVICES names first; without a driver, or with none visible, it is the host."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=3*) echo "24576, 20000, NVIDIA A10G";; *) exit 6;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    machine = machine_memory.this_machine()
    assert machine == Machine("cuda", "NVIDIA A10G", 24576 << 20, 20000 << 20, 2)
    assert (machine.budget(None, 0.5), machine.budget(2, 0.5)) == (10000 << 20, 2 * GIB)
    assert machine.budget(100, 0.5) == machine.free
    for visible in ("7", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine_memory.this_machine().device == "cpu"


def test_itemised_is_the_plan_that_was_made() -> None:
    plan = plans_by_speed(SETUP, BATCH, 30 * GIB)[0]
    assert itemised(SETUP, BATCH, plan).total == plan.estimated_bytes
