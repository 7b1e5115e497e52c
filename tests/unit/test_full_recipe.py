"""A full fine-tune as a recipe: what it asks for, where it is refused, how it is planned, what is told of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from loop.backends import limits
from loop.machine_memory import Machine
from loop.memory_estimate import GIB, Setup, Workload, estimate
from loop.model_card import model_card
from loop.model_shape import NAMED
from loop.plain_lora import weights
from loop.plan_advice import Question, answer
from loop.preflight.machine import worst_case_bytes
from loop.report import report, summary
from loop.run_plan import plans_of, setup_of
from loop.settings import LINEAR_LAYERS, BadRecipe, TrainerSettings
from loop.trainers import axolotl, child
from loop.trainers.progress import Channel
from loop.trainers.spec import BadSpec, LoraSpec, Row, TrainSpec, read_spec, render, run_digest
from loop.training_cures import cures
from tests.adapters import TINY
from tests.unit.test_memory_plan import LLAMA
from tests.unit.test_preflight_machine import spec_of
from tests.unit.test_report import facts

FULL = {"finetuning_type": "full", "quantisation": "none"}


def spec_in(folder: Path, **recipe: Any) -> TrainSpec:
    (folder / "config.json").write_text(json.dumps(LLAMA))
    settings = TrainerSettings.model_validate(recipe)
    places = {"base_dir": folder, "data_dir": folder, "out_dir": folder / "out"}
    return render(settings, base_name="base", base_digest="sha256:0", **places)  # type: ignore[arg-type]


def test_four_bits_and_a_full_fine_tune_exclude_each_other(tmp_path: Path) -> None:
    """Said with the cure: in the settings, in a night's recipe, and in a spec from elsewhere."""
    with pytest.raises(ValidationError, match='set quantisation = "none" too'):
        TrainerSettings(finetuning_type="full")
    with pytest.raises(BadRecipe, match=r'trainer: .*set quantisation = "none" too'):
        TrainerSettings().with_recipe({"finetuning_type": "full"})
    with pytest.raises(BadRecipe, match="finetuning_type"):
        TrainerSettings().with_recipe({"finetuning_type": "freeze"})
    assert TrainerSettings().with_recipe(FULL).finetuning_type == "full"
    fields = json.loads(spec_in(tmp_path, **FULL).model_dump_json()) | {"quantisation": "nf4"}
    (tmp_path / "spec.json").write_text(json.dumps(fields))
    with pytest.raises(BadSpec, match='quantisation must be "none"'):
        read_spec(tmp_path / "spec.json")


def test_it_has_learning_rates_of_its_own(tmp_path: Path) -> None:
    """An adapter's would wreck the weights; and it is another run than an adapter's."""
    full, lora = spec_in(tmp_path, **FULL), spec_in(tmp_path, quantisation="none")
    assert (full.schedule.learning_rate, full.preference.learning_rate) == (1e-4, 1e-5)
    assert (lora.schedule.learning_rate, lora.preference.learning_rate) == (2e-3, 2e-4)
    given = spec_in(tmp_path, **FULL, learning_rate=3e-5, preference_learning_rate=4e-6)
    assert (given.schedule.learning_rate, given.preference.learning_rate) == (3e-5, 4e-6)
    same = full.model_copy(update={"schedule": lora.schedule, "preference": lora.preference})
    assert run_digest(same) != run_digest(lora)


@pytest.mark.parametrize("backend", ["unsloth", "axolotl"])
def test_only_peft_does_it(backend: str, tmp_path: Path) -> None:
    """Refused before the night, with the reason and the cure; and by a trainer that gets such a spec all the same."""
    recipe = TrainerSettings.model_validate({**FULL, "backend": backend, "python": "/p", "replay_loss": "ce"})
    ((what, cure),) = limits(recipe, "sft", continues=False, replay_rows=9).refused
    assert f"by {backend} trains embeddings, norms and head too, which no adapter can carry" in what
    assert 'trainer.backend = "peft"' in cure
    spec = spec_in(tmp_path, **FULL)
    (tmp_path / "train.jsonl").write_text(_row().model_dump_json() + "\n")
    if backend == "axolotl":
        with pytest.raises(axolotl.NotByAxolotl, match="no full fine-tune"):
            axolotl.run(spec, tmp_path, Channel())
    else:
        other = child.Backend(start=_never, load=_never, name=backend)
        with pytest.raises(child.NotByThisBackend, match="no full fine-tune"):
            child.run(spec, other, Channel())


@pytest.mark.parametrize("cards", [{"gpus": 2}, {"sharding": "fsdp"}])
def test_it_is_done_on_one_card(cards: dict[str, Any], tmp_path: Path) -> None:
    """Refused before the night, and by a trainer that gets such a spec all the same: ranks would train an adapter."""
    ((what, _),) = limits(TrainerSettings.model_validate(FULL | cards), "sft", continues=False, replay_rows=9).refused
    assert "on one card" in what
    (tmp_path / "train.jsonl").write_text(_row().model_dump_json() + "\n")
    with pytest.raises(child.NotByThisBackend, match="on one card"):
        child.run(spec_in(tmp_path, **FULL, **cards), child.Backend(start=_never, load=_never), Channel())


def test_peft_does_it_and_says_what_it_leaves_unused() -> None:
    found = limits(TrainerSettings.model_validate({**FULL, "dropout": 0.1}), "sft", continues=True, replay_rows=9)
    assert found.refused == ()
    assert any("trainer.dropout = 0.1 is not used" in told for told in found.told)


def test_its_memory_is_planned_as_a_full_fine_tunes(tmp_path: Path) -> None:
    """Of each trained weight the base's two bytes, the change, its gradient and two moments in float32: 18 in all."""
    card = Machine("cuda", "a card", 80 * GIB, 80 * GIB, 2)
    setup = setup_of(spec_in(tmp_path, **FULL), "peft", card, longest=512)
    assert setup.method == "full"
    shape = NAMED["1B"]
    found = estimate(Setup(shape, method="full", backend="peft"), Workload(512, 512, 128), "on")
    states = found.weights + found.adapter + found.gradients + found.optimizer_states
    assert states == 18 * shape.linear_parameters + 2 * shape.embedding_parameters
    two = estimate(Setup(shape, method="full", targets=("q_proj", "v_proj")), Workload(512, 512, 128), "on")
    assert two.adapter == 4 * shape.layers * shape.hidden * (shape.query_width + shape.key_width)


def test_where_it_does_not_fit_each_cure_alone_does(tmp_path: Path) -> None:
    """8B on 40 GiB: an adapter fits, also with quantisation; neither does an optimizer of 8 bits help."""
    spec, rows = spec_in(tmp_path, **FULL), [_row()]
    card = Machine("cuda", "a card", 40 * GIB, 40 * GIB, 2)
    told = cures(spec, "peft", rows, card)
    assert told[:-1] == ('finetuning_type = "lora"', 'finetuning_type = "lora" and quantisation = "nf4"')
    needed = float(told[-1].partition(" GiB")[0])
    work = Workload(128, 128, 64)
    assert not plans_of(spec, "peft", card, work)[-1].fits
    assert plans_of(spec, "peft", replace(card, free=int((needed + 1) / 0.9 * GIB)), work)[-1].fits
    assert cures(spec_in(tmp_path, **FULL), "peft", rows, replace(card, free=12 * GIB))[:-1] == (
        'finetuning_type = "lora" and quantisation = "nf4"',
    )
    small = cures(spec_in(tmp_path, quantisation="none"), "peft", rows, replace(card, free=12 * GIB))
    assert small[0] == 'quantisation = "nf4"'


def test_rows_go_together_where_they_fit(tmp_path: Path) -> None:
    """Each part passes over all weights once more, however short it is: also on a CPU."""
    batch = Workload(8 * 64, 64, 8 * 16)
    for machine in (Machine("cpu", "here", 80 * GIB, 80 * GIB, 4), Machine("cuda", "a card", 80 * GIB, 80 * GIB, 2)):
        small = spec_in(tmp_path, **FULL)
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 4}))
        assert plans_of(small, "peft", machine, batch)[0].micro_batches == 1


def test_plan_answers_for_it_with_cures() -> None:
    found = answer(Question(shape=NAMED["3B"], method="full", card_bytes=48 * GIB, length=1024))
    assert found.short > 0
    assert {"--method lora", "--optimizer adamw_8bit"} <= set(found.cures)
    assert not answer(replace(found.question, optimizer="adamw_8bit")).short


def test_checkpoints_of_whole_weights_need_room(tmp_path: Path) -> None:
    """Three of 12 bytes a weight; the adapters stay as small as they are."""
    lora = spec_of(tmp_path)
    full = lora.model_copy(update={**FULL, "lora": LoraSpec(rank=4)})
    trained = weights(TINY, LINEAR_LAYERS)
    hidden, inner = TINY["hidden_size"], TINY["intermediate_size"]
    keys = hidden * TINY["num_key_value_heads"] // TINY["num_attention_heads"]
    assert trained == TINY["num_hidden_layers"] * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    without = lora.model_copy(update={"lora": LoraSpec(rank=4, target_modules=("q_proj",))})
    q_alone = without.model_copy(update=FULL)
    layers = TINY["num_hidden_layers"]
    assert worst_case_bytes(q_alone) - worst_case_bytes(without) == 3 * 12 * layers * (hidden**2 - 4 * 2 * hidden)
    assert worst_case_bytes(full) > worst_case_bytes(lora)


@pytest.mark.parametrize(("share", "little"), [(0.82, False), (0.31, True)])
def test_what_the_adapter_keeps_is_told(share: float, little: bool, tmp_path: Path) -> None:
    """In the report and on the model card; where it is little also at the report's top, with the cure."""
    kept = {"kept_share": share, "least_kept_share": 0.12, "least_kept_layer": "model.layers.3.mlp.up_proj"}
    night = replace(facts(tmp_path), training={"finetuning_type": "full", "extraction": kept})
    text, card = report(night), model_card(night, "sha256:e")
    line = f"keeps {share:.0%} of the change (of its squared norm; 12% in model.layers.3.mlp.up_proj)"
    assert text.count(line) == (2 if little else 1)
    assert (line in text.partition("## Before and after")[0]) == little
    assert ("a higher trainer.rank keeps more" in text) == little
    assert f"| extraction | full fine-tune: the adapter out of it {line}" in card
    assert summary(night)["training"]["extraction"] == kept
    assert "extraction" not in model_card(facts(tmp_path / "lora"), "sha256:e")


def _row() -> Row:
    messages = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "Ines did"}]
    return Row.model_validate({"id": "a", "kind": "label", "messages": messages})


def _never(*_: Any) -> None:
    raise AssertionError("a spec that is refused loads nothing")
