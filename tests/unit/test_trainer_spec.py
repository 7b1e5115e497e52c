"""What a trainer is told, how rows become tokens, and in which order they are trained."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loop.settings import TrainerSettings
from loop.trainers.checkpoints import (
    CHECKPOINTS,
    forget_after,
    forget_incomplete,
    last_complete,
    mark_complete,
    phase_folder,
)
from loop.trainers.rows import UnfitTemplate, heaviest, plan_batches, rows_drawn, tokenise
from loop.trainers.spec import (
    BadRows,
    BadSpec,
    Row,
    ScheduleSpec,
    TrainSpec,
    read_rows,
    read_spec,
    render,
    run_digest,
    write_spec,
)

WORDS = ("<unk>", "<end>", "<user>", "<bot>", "<after>", "who", "founded", "it", "Ines", "did")
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}<end><after>{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
QUESTION = {"role": "user", "content": "who"}
END = frozenset({WORDS.index("<end>")})


def _tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>", "<after>"]})
    wrapped.chat_template = template
    return wrapped


def _row(name: str = "l1", question: str = "who founded it", answer: str = "Ines did", kind: str = "label") -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row.model_validate({"id": name, "kind": kind, "messages": messages})


def _spec(folder: Path, **changed: Any) -> TrainSpec:
    fields: dict[str, Any] = {
        "base_dir": folder / "base",
        "base_name": "base",
        "base_digest": "sha256:0",
        "data_dir": folder,
        "out_dir": folder / "out",
    }
    return TrainSpec.model_validate(fields | changed)


def _write_rows(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_spec_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Paths, nested values and defaults survive the file."""
    spec = _spec(tmp_path, lora={"rank": 4}, schedule={"max_steps": 3}, threads=1)
    write_spec(spec, tmp_path / "spec.json")
    assert read_spec(tmp_path / "spec.json") == spec


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("version",), 2),
        (("surprise",), 1),
        (("method",), "ppo"),
        (("quantisation",), "int3"),
        (("lora", "rank"), 0),
        (("lora", "target_modules"), []),
        (("schedule", "learning_rate"), 0),
        (("schedule", "batch_size"), 0),
        (("schedule", "scheduler"), "zigzag"),
        (("lengths", "max_length"), 4),
        (("seed",), -1),
    ],
)
def test_a_wrong_spec_is_refused_by_the_name_of_its_field(tmp_path: Path, where: tuple[str, ...], value: Any) -> None:
    """Unknown keys, other versions and values out of bounds never reach a model."""
    spec = json.loads(_spec(tmp_path).model_dump_json())
    inner = spec[where[0]] if len(where) == 2 else spec
    inner[where[-1]] = value
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(BadSpec, match=r"\.".join(where)):
        read_spec(tmp_path / "spec.json")


def test_every_mistake_of_a_spec_is_told_at_once(tmp_path: Path) -> None:
    """Two wrong fields, one message."""
    (tmp_path / "spec.json").write_text(_spec(tmp_path).model_dump_json().replace('"seed":0', '"seed":-1,"oh":1'))
    with pytest.raises(BadSpec, match=r"seed: .*oh: "):
        read_spec(tmp_path / "spec.json")
    with pytest.raises(BadSpec, match="no training spec"):
        read_spec(tmp_path / "elsewhere.json")


def test_a_projects_recipe_becomes_a_spec(tmp_path: Path) -> None:
    """Nothing of the recipe is lost on the way."""
    recipe = TrainerSettings(rank=3, learning_rate=0.5, epochs=2.5, max_length=99, replay_loss="ce", threads=7, seed=5)
    spec = render(recipe, base_dir=tmp_path, base_name="b", base_digest="d", data_dir=tmp_path, out_dir=tmp_path)
    assert (spec.lora.rank, spec.schedule.learning_rate, spec.schedule.epochs) == (3, 0.5, 2.5)
    assert (spec.lengths.max_length, spec.schedule.replay_loss, spec.threads, spec.seed) == (99, "ce", 7, 5)


@pytest.mark.parametrize(
    "row",
    [
        {"id": "x", "kind": "label", "messages": [QUESTION]},
        {"id": "x", "kind": "label", "messages": [QUESTION, QUESTION]},
        {"id": "x", "kind": "other", "messages": _row().model_dump()["messages"]},
        {**_row().model_dump(), "weight": 2},
        {"id": "x", "kind": "label", "messages": [QUESTION, {"role": "assistant", "content": "  "}]},
    ],
)
def test_a_row_without_an_answer_to_train_is_named_by_its_line(tmp_path: Path, row: dict[str, Any]) -> None:
    """No answer, an empty one, an unknown kind or key: the line is told."""
    _write_rows(tmp_path, _row().model_dump(), row)
    with pytest.raises(BadRows, match="line 2"):
        read_rows(tmp_path)


def test_no_rows_and_no_file_are_told_apart(tmp_path: Path) -> None:
    """An empty file is no silent success."""
    with pytest.raises(BadRows, match="there are no training rows"):
        read_rows(tmp_path)
    _write_rows(tmp_path)
    with pytest.raises(BadRows, match="holds no rows"):
        read_rows(tmp_path)


def test_the_run_digest_follows_what_decides_the_adapter(tmp_path: Path) -> None:
    """Other rows or another rate: another digest. Another folder or number of threads: the same."""
    _write_rows(tmp_path, _row().model_dump())
    digest = run_digest(_spec(tmp_path))
    assert run_digest(_spec(tmp_path, out_dir=tmp_path / "other", threads=9)) == digest
    limits = {"seconds": 60, "save_minutes": 1, "rate_scale": 0.5, "memory_share": 0.4}
    assert run_digest(_spec(tmp_path, limits=limits)) == digest, "a roll back goes on from the run's own checkpoints"
    assert run_digest(_spec(tmp_path, schedule={"learning_rate": 0.01})) != digest
    _write_rows(tmp_path, _row(answer="did Ines").model_dump())
    assert run_digest(_spec(tmp_path)) != digest


def test_the_answer_and_its_end_are_trained_and_nothing_else() -> None:
    """Prompt and generation prompt stay out; the end-of-turn token is in; what the template writes after it is not."""
    example = next(tokenise([_row()], _tokenizer(TEMPLATE), END, 64))
    words = [WORDS[token] for token in example.tokens]
    assert words[: example.answer_start] == ["<user>", "who", "founded", "it", "<end>", "<after>", "<bot>"]
    assert words[example.answer_start :] == ["Ines", "did", "<end>"]


def test_a_template_whose_prompt_is_no_prefix_is_refused() -> None:
    """Otherwise the loss would be on the wrong tokens."""
    with pytest.raises(UnfitTemplate, match=r"row l1.*not the beginning"):
        list(tokenise([_row()], _tokenizer(TEMPLATE.replace("<bot> {% endif", "<user> {% endif")), END, 64))


def test_a_template_that_never_ends_an_answer_is_refused() -> None:
    """A model trained on it would never stop."""
    with pytest.raises(UnfitTemplate, match="ends no answer"):
        list(tokenise([_row()], _tokenizer(TEMPLATE.replace("<end><after>", "")), END, 64))


def test_long_rows_are_refused_by_name_and_never_cut() -> None:
    """All of them in one message, with their lengths; one token less is allowed."""
    rows = [_row("short"), _row("long-1", answer="Ines did " * 6), _row("long-2", answer="Ines did " * 7)]
    tokenizer = _tokenizer(TEMPLATE)
    with pytest.raises(BadRows, match=r"2 of 3 rows .*long-1 \(20\), long-2 \(22\)"):
        list(tokenise(rows, tokenizer, END, 19))
    assert [len(example.tokens) for example in tokenise(rows, tokenizer, END, 22)] == [10, 20, 22]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80),
    batch_size=st.integers(1, 16),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_epoch_trains_every_row_once(lengths: list[int], batch_size: int, epochs: int, seed: int) -> None:
    """No row is left out or doubled, no batch is too big, and the same seed gives the same plan."""
    schedule = ScheduleSpec(epochs=epochs, batch_size=batch_size)
    plan = plan_batches(lengths, schedule, seed)
    assert plan == plan_batches(lengths, schedule, seed)
    assert all(1 <= len(batch) <= batch_size for batch in plan)
    assert len(plan) == -(-len(lengths) * epochs // batch_size)
    assert Counter(row for batch in plan for row in batch) == dict.fromkeys(range(len(lengths)), epochs)


@given(labels=st.integers(1, 60), replay=st.integers(1, 60), share=st.floats(0, 0.9), batch_size=st.integers(4, 16))
def test_replay_fills_its_share_of_every_batch(labels: int, replay: int, share: float, batch_size: int) -> None:
    """Labels are trained `epochs` times whatever the share; replay rows come equally often, spread over the run."""
    schedule = ScheduleSpec(epochs=2, batch_size=batch_size, replay_share=share)
    kinds = [False] * labels + [True] * replay
    plan = plan_batches([5] * len(kinds), schedule, 0, kinds)
    times = Counter(row for batch in plan for row in batch)
    assert [times[row] for row in range(labels)] == [2] * labels
    held = [times[row] for row in range(labels, labels + replay)]
    assert max(held) - min(held) <= 1
    assert sum(held) == round(2 * labels * share / (1 - share))
    whole = [sum(kinds[row] for row in batch) for batch in plan if len(batch) == batch_size]
    assert all(abs(count - batch_size * sum(held) / sum(times.values())) <= 2 for count in whole)


def test_replay_alone_is_trained_like_labels() -> None:
    assert len(plan_batches([5] * 8, ScheduleSpec(epochs=3, batch_size=8), 0, [True] * 8)) == 3


@given(labels=st.integers(1, 60), replay=st.integers(0, 60), share=st.floats(0, 0.9), least=st.integers(2, 90))
def test_few_labels_are_passed_over_more_often(labels: int, replay: int, share: float, least: int) -> None:
    """As many steps as asked for and hardly more, each label as often as any other."""
    schedule = ScheduleSpec(epochs=1, batch_size=8, replay_share=share, min_steps=least)
    plan = plan_batches([5] * (labels + replay), schedule, 0, [False] * labels + [True] * replay)
    without = plan_batches(
        [5] * (labels + replay), schedule.model_copy(update={"min_steps": 1}), 0, [False] * labels + [True] * replay
    )
    assert least - 1 <= len(plan) <= least + 1 if len(without) < least else plan == without
    times = Counter(row for batch in plan for row in batch)
    assert max(times[row] for row in range(labels)) - min(times[row] for row in range(labels)) <= 1


@given(labels=st.integers(1, 60), share=st.floats(0, 0.9), least=st.integers(1, 90), epochs=st.floats(0.5, 5))
def test_the_rows_drawn_are_known_before_there_are_any(labels: int, share: float, least: int, epochs: float) -> None:
    """So that no more of the base's answers are asked for than a night trains on."""
    schedule = ScheduleSpec(epochs=epochs, batch_size=8, replay_share=share, min_steps=least)
    of_labels, of_replay = rows_drawn(schedule, labels)
    plan = plan_batches([5] * (labels + 40), schedule, 0, [False] * labels + [True] * 40)
    drawn = Counter(row < labels for batch in plan for row in batch)
    assert (drawn[True], drawn[False]) == (of_labels, of_replay)
    assert rows_drawn(schedule.model_copy(update={"replay_share": 0.0}), labels)[1] == 0


def test_max_steps_ends_the_plan_early() -> None:
    """And never lengthens it."""
    assert len(plan_batches([5] * 40, ScheduleSpec(epochs=10, batch_size=8, max_steps=7), 0)) == 7
    assert len(plan_batches([5] * 40, ScheduleSpec(epochs=1, batch_size=8, max_steps=7), 0)) == 5


def test_like_lengths_share_a_batch() -> None:
    """Half of the rows are ten times as long: padding stays small; at random it would be near a half."""
    lengths = [10, 100] * 64
    plan = plan_batches(lengths, ScheduleSpec(epochs=1, batch_size=8), 0)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in plan)
    assert padded < 1.15 * sum(lengths)


def test_the_heaviest_batch_counts_its_padding() -> None:
    """Three rows padded to 9 need more than one of 20."""
    assert heaviest([[0], [1, 2, 3]], [20, 9, 2, 2]) == [1, 2, 3]


def test_only_a_complete_checkpoint_of_the_same_run_is_resumed(tmp_path: Path) -> None:
    """Not the newer one that was being written, and not one of other rows."""
    folder = tmp_path / CHECKPOINTS
    for step, digest in ((2, "mine"), (10, "mine"), (12, "other"), (14, None)):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        if digest:
            mark_complete(folder / f"checkpoint-{step}", digest)
    assert last_complete(folder, "mine") == folder / "checkpoint-10"
    assert last_complete(folder, "else") is None


def test_a_roll_back_counts_checkpoints_over_all_phases(tmp_path: Path) -> None:
    """Of two phases of 80 and 40 steps, the trouble began after step 92: checkpoint 12 of the second one stays."""
    first, second = phase_folder(tmp_path, 0, "sft"), phase_folder(tmp_path, 80, "dpo")
    folders = [first / CHECKPOINTS / "checkpoint-80", *(second / CHECKPOINTS / f"checkpoint-{n}" for n in (12, 13, 20))]
    for folder in folders:
        folder.mkdir(parents=True)
    forget_after(tmp_path, 92)
    assert [folder.exists() for folder in folders] == [True, True, False, False]
    forget_after(tmp_path, 80)
    assert [folder.exists() for folder in folders] == [True, False, False, False]


def test_a_roll_back_finds_a_run_of_one_phase_and_axolotls(tmp_path: Path) -> None:
    """Right below the folder, or in one that is named by the run."""
    for parent in (tmp_path, tmp_path / "axolotl-0123456789abcdef"):
        for step in (2, 4):
            (parent / CHECKPOINTS / f"checkpoint-{step}").mkdir(parents=True)
    forget_after(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.glob("**/checkpoint-*")) == ["checkpoint-2"] * 2


def test_a_checkpoint_whose_writing_was_cut_off_goes(tmp_path: Path) -> None:
    """For a trainer that would take the newest one."""
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_complete(tmp_path / "checkpoint-2", "mine")
    forget_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
