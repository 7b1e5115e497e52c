"""What a night could train on and be examined with: labels, good answers and thumbs, as today's redaction has them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from labeling.redaction.redactor import redactor
from labeling.settings import RedactionSettings
from labeling.tables import GoodAnswer, Verdict
from loop import preference_examples as preferences
from loop import training_examples as examples
from loop.methods import Method, OnHand
from loop.preference_examples import Thumbs
from loop.stage import StageContext
from loop.trainers.preference_rows import Pair


@dataclass(frozen=True)
class Sources:
    """What a night could train on and be examined with, redacted. `good`: as many as both may want."""

    chosen: examples.ChosenLabels
    good: list[GoodAnswer]
    thumbs: Thumbs

    def __len__(self) -> int:
        chosen = self.chosen
        return len(chosen.trained) + len(chosen.held_out) + len(self.good) + len(self.thumbs.bad)

    def for_method(self, method: Method, most_examined: int) -> Sources:
        """Thumbs train kto alone; then the good answers that are trained on are not examined."""
        if method != "kto":
            return replace(self, good=self.good[:most_examined], thumbs=Thumbs())
        examined = [answer for answer in self.good if not preferences.is_trained(answer.id)]
        return replace(self, good=examined[:most_examined])


async def read_sources(context: StageContext) -> Sources:
    project = context.project
    share = project.labeling.annotators.share_of_delta
    thumbs_count = project.trainer.method in ("auto", "kto")
    async with context.clients.database.read() as session:
        chosen = await examples.choose_labels(
            session, project.name, project.replay.max_rows, share, project.gate.earlier_fixes
        )
        # Twice as many where chance may give half of them to training.
        good = await examples.good_answers(session, project.name, project.gate.good_answers * (1 + thumbs_count))
        thumbs = (
            await preferences.choose_thumbs(session, project.name, good, project.labeling) if thumbs_count else Thumbs()
        )
    return Sources(chosen, good, thumbs)


def redacted(found: Sources, settings: RedactionSettings) -> Sources:
    """What is trained on, examined and archived; changes nothing that was redacted by the same settings before."""
    by = redactor(settings)
    chosen = found.chosen
    new, replay, held_out, earlier = (
        examples.redacted_labels(labels, by) for labels in (chosen.new, chosen.replay, chosen.held_out, chosen.earlier)
    )
    return Sources(
        replace(chosen, new=new, replay=replay, held_out=held_out, earlier=earlier),
        examples.redacted_good_answers(found.good, by),
        preferences.redacted_thumbs(found.thumbs, by),
    )


def on_hand(sources: Sources, pairs: Sequence[Pair], kept: Container[str] | None = None) -> OnHand:
    """Of `kept` ids only, where given."""
    chosen = sources.chosen
    new = [label for label in chosen.new if kept is None or label.id in kept]
    preferred = sum(label.verdict is Verdict.PREFERRED for label in new)
    good, bad = sources.thumbs.new(kept)
    newest = {label.id for label in new}
    return OnHand(
        corrections=len(new) - preferred,
        preferences=preferred,
        pairs=sum(preferences.label_of(pair) in newest for pair in pairs),
        good_thumbs=good,
        bad_thumbs=bad,
        older_labels=len(chosen.replay),
        older_corrections=sum(label.verdict is not Verdict.PREFERRED for label in chosen.replay),
    )
