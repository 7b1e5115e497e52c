"""What a training backend can't do, said before the night trains: refused where the outcome would be another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loop.methods import Method
from loop.settings import TrainerSettings


@dataclass(frozen=True)
class Limits:
    """`refused`: (what, cure) each; `told`: settings of the recipe that this backend leaves unused."""

    refused: tuple[tuple[str, str], ...] = ()
    told: tuple[str, ...] = ()


def limits(recipe: TrainerSettings, method: Method, *, continues: bool, replay_rows: int) -> Limits:
    """`continues`: from an adapter. `replay_rows`: of the base's own answers in this night."""
    refused = list(_full_elsewhere(recipe))
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


def _unused(recipe: TrainerSettings) -> Iterator[str]:
    if recipe.finetuning_type == "full" and recipe.dropout:
        yield f"trainer.dropout = {recipe.dropout:g} is not used: a full fine-tune has no adapter to drop out of"
    if recipe.backend != "peft" and recipe.quantisation == "nf4" and recipe.finish_share:
        yield (
            f"trainer.finish_share = {recipe.finish_share:g} is not used: the {recipe.backend} backend trains on the "
            "quantised base to the end"
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
