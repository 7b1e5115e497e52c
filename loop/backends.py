"""What a training backend can't do, said before the night trains: refused where the outcome would be another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loop.methods import Method
from loop.settings import TrainerSettings
from loop.trainers.preference_rows import units_a_step


@dataclass(frozen=True)
class Limits:
    """`refused`: (what, cure) each; `told`: settings of the recipe that this backend leaves unused."""

    refused: tuple[tuple[str, str], ...] = ()
    told: tuple[str, ...] = ()


FULL_ON_ONE_CARD = (
    "a full fine-tune is trained on one card here",
    'Set trainer.gpus = 1 and trainer.sharding = "auto", or trainer.finetuning_type = "lora".',
)


def limits(recipe: TrainerSettings, method: Method, *, continues: bool, replay_rows: int) -> Limits:
    """`continues`: from an adapter. `replay_rows`: of the base's own answers in this night."""
    refused = [*_full_elsewhere(recipe), *_beyond_its_cards(recipe, method)]
    if recipe.backend == "axolotl":
        refused += _beyond_axolotl(recipe, method, continues, replay_rows)
    return Limits(tuple(refused), tuple(_unused(recipe)))


def _full_elsewhere(recipe: TrainerSettings) -> Iterator[tuple[str, str]]:
    if recipe.finetuning_type == "full" and recipe.backend != "peft":
        yield (
            f"a full fine-tune by {recipe.backend} trains embeddings, norms and head too, which no adapter can carry, "
            "and keeps no base to hold the model to",
            'Set trainer.backend = "peft", or trainer.finetuning_type = "lora".',
        )
    if recipe.finetuning_type == "full" and (recipe.gpus > 1 or recipe.sharding in ("fsdp", "zero3")):
        yield FULL_ON_ONE_CARD


def _unused(recipe: TrainerSettings) -> Iterator[str]:
    if recipe.finetuning_type == "full" and recipe.dropout:
        yield f"trainer.dropout = {recipe.dropout:g} is not used: a full fine-tune has no adapter to drop out of"
    if recipe.quantisation == "nf4" and recipe.finish_share:
        why = ""
        if recipe.backend != "peft":
            why = f"the {recipe.backend} backend trains on the quantised base to the end"
        elif recipe.sharding == "fsdp":
            why = "no card has the whole base to exchange it"
        if why:
            yield f"trainer.finish_share = {recipe.finish_share:g} is not used: {why}"


def _beyond_its_cards(recipe: TrainerSettings, method: Method) -> Iterator[tuple[str, str]]:
    if recipe.backend == "unsloth" and recipe.sharding in ("fsdp", "zero3"):
        yield (
            "Unsloth's kernels need the whole base on each card",
            'Set trainer.sharding = "auto" or "replicate", or trainer.backend = "peft".',
        )
    if recipe.backend == "peft" and recipe.sharding == "zero3":
        yield (
            'trainer.sharding = "zero3" is DeepSpeed\'s, which the axolotl backend alone trains with',
            'Set trainer.sharding = "fsdp", which shares out the same, or trainer.backend = "axolotl".',
        )
    rows = units_a_step(method, recipe.batch_size)
    if recipe.backend == "axolotl" and recipe.gpus > 1 and rows % recipe.gpus:
        yield (
            f"axolotl gives every card as many rows, and a step of {rows} is not so divided by {recipe.gpus}",
            f"Set trainer.batch_size to a multiple of {recipe.gpus if method == 'sft' else 2 * recipe.gpus}.",
        )


def _beyond_axolotl(
    recipe: TrainerSettings, method: Method, continues: bool, replay_rows: int
) -> Iterator[tuple[str, str]]:
    if not recipe.python:
        yield (
            "axolotl does not live in our environment",
            "Run `make axolotl`; trainer.python is .venv-axolotl/bin/python.",
        )
    if method in ("orpo", "sft+dpo"):
        yield (
            f"axolotl does not train {method!r} here",
            'Set trainer.method = "sft", "dpo" or "kto", or backend = "peft".',
        )
    if continues:
        yield "axolotl starts from the base here", 'Set trainer.start = "base", or trainer.backend = "peft".'
    if not replay_rows:
        return
    if method != "sft":
        yield (
            f"axolotl's {method} takes no replay rows: nothing would hold the model to the base",
            'Set trainer.replay_share = 0 to train without replay, or trainer.backend = "peft".',
        )
    elif recipe.replay_loss == "kl":
        yield (
            'axolotl knows no KL to the base, which trainer.replay_loss = "kl" holds the model with',
            'Set trainer.replay_loss = "ce" (it forgets more: docs/recipe.md), or trainer.backend = "peft".',
        )
