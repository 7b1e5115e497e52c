"""What every check of a preflight is given."""

from __future__ import annotations

from dataclasses import dataclass

from loop.chat_template import ChatTemplate
from loop.stage import StageContext
from loop.trainers.spec import TrainSpec


@dataclass(frozen=True)
class Look:
    """`spec` as the trainer will get it, written already; `template` is what trainer, gate and engines must share."""

    context: StageContext
    spec: TrainSpec
    template: ChatTemplate
