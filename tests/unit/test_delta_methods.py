"""The delta of each method over a real database: which labels, pairs and thumbs train, and what is examined."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import structlog

from labeling.database import Database, now
from labeling.tables import (
    Feedback,
    FeedbackKind,
    GoodAnswer,
    ItemMember,
    ItemState,
    Label,
    LabelState,
    ReviewItem,
    Verdict,
)
from loop.adapter_files import adapter_digest
from loop.digests import read_jsonl
from loop.held_labels import confirm, hold
from loop.night_view import held_labels
from loop.outputs import Delta, SyncedLabels
from loop.preference_examples import is_trained
from loop.settings import EngineSettings, ProjectSettings
from loop.stage import NightEnds, StageContext
from loop.stages import build_delta
from loop.start import CannotContinue, starting_adapter
from loop.tables import Adapter, LabelUse, Night, NightState, Serving
from loop.vllm import Replica
from tests.adapters import TINY, write_adapter
from tests.fakes.vllm import FakeVllm
from tests.promoting import tiny_base
from tests.running import PROJECT, offline_clients, rows

RECIPE = {"min_thumbs": 3, "replay_share": 0.0}
SYNCED = SyncedLabels(accepted=0, disputed=0, refused=0, not_in_current=0)


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base")


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    async with FakeVllm() as fake:
        found = Replica(fake.url)
        yield found
        await found.close()


class Nights:
    """Labels and ratings in, one stage out."""

    def __init__(self, database: Database, replica: Replica, folder: Path, base_dir: Path) -> None:
        self.database, self._replica, self._folder, self._base_dir = database, replica, folder, base_dir
        self._number = 0
        self.settings: dict[str, Any] = {}

    async def store(self, *stored: Any) -> None:
        """What others refer to comes first."""
        first = (Night, ReviewItem, Feedback)
        async with self.database.write() as session:
            for rows_ in ([r for r in stored if isinstance(r, first)], [r for r in stored if not isinstance(r, first)]):
                session.add_all(rows_)
                await session.flush()

    def context(self, **recipe: Any) -> StageContext:
        self._number += 1
        folder = self._folder / f"night{self._number}"
        folder.mkdir()
        project = ProjectSettings.model_validate(
            {
                "name": PROJECT,
                "base_dir": self._base_dir,
                "base_name": "base",
                "min_labels": 2,
                "trainer": {**RECIPE, **recipe},
                "gate": {"general_probes": False},
                "labeling": {"annotators": {"share_of_delta": 1.0}},
                **self.settings,
            }
        )
        return StageContext(
            night_id=f"ni_{self._number}",
            project=project,
            engine=EngineSettings(),
            date=date(2026, 1, self._number),
            folder=folder,
            data_dir=self._folder,
            clients=offline_clients(self.database, self._folder, [self._replica]),
            log=structlog.get_logger(),
            progress=lambda line: None,
            inputs={SyncedLabels: SYNCED},
        )

    async def delta(self, **recipe: Any) -> tuple[Delta, Path]:
        context = self.context(**recipe)
        await self.store(Night(id=context.night_id, project=PROJECT, date=context.date, due_at=now()))
        return await build_delta.run(context), context.folder


@pytest.fixture
def nights(database: Database, replica: Replica, tmp_path: Path, base_dir: Path) -> Nights:
    return Nights(database, replica, tmp_path, base_dir)


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def item(name: str, **values: Any) -> ReviewItem:
    return ReviewItem(
        **{
            "id": f"it_{name}",
            "project": PROJECT,
            "prompt_digest": f"digest of {name}",
            "messages": asked(f"What about {name}?"),
            "answer": f"Nothing is known of {name}.",
            "state": ItemState.PUSHED,
            **values,
        }
    )


def labelled(name: str, verdict: Verdict = Verdict.WRONG, **values: Any) -> list[Any]:
    one = item(name, state=ItemState.LABELLED)
    label = Label(
        **{
            "item_id": one.id,
            "id": f"lb_{name}",
            "project": PROJECT,
            "state": LabelState.ACCEPTED,
            "verdict": verdict,
            "messages": one.messages,
            "flagged_answer": one.answer,
            "correction": f"All of {name} is green.",
            "rejected": [one.answer],
            "annotators": ["ada"],
            **values,
        }
    )
    return [one, label]


def said_of(one: ReviewItem, kind: FeedbackKind = FeedbackKind.FLAG, value: Any = None, name: str = "fb") -> list[Any]:
    feedback = Feedback(
        id=f"{name}_{one.id}", project=PROJECT, kind=kind, value=value, messages=one.messages, answer="x"
    )
    return [feedback, ItemMember(feedback_id=feedback.id, item_id=one.id)]


def good_answers(count: int) -> list[GoodAnswer]:
    return [
        GoodAnswer(
            id=f"ga_{n}",
            project=PROJECT,
            prompt_digest=f"good {n}",
            messages=asked(f"Tell me of {'abcdefghijklmnopqrstuvwxyz'[n] * 9}"),
            answer=f"It is {n}.",
        )
        for n in range(count)
    ]


async def bad_thumbs(nights: Nights, count: int) -> None:
    items = [item(f"{'zyxwvutsrq'[n] * 7}") for n in range(count)]
    await nights.store(*items)
    await nights.store(*(row for one in items for row in said_of(one)))


async def test_corrections_stay_with_sft_and_leave_no_other_file(nights: Nights) -> None:
    """As before there were methods, whatever thumbs lie beside them."""
    await nights.store(*labelled("tea"), *labelled("wool"), *good_answers(20))
    await bad_thumbs(nights, 5)
    delta, folder = await nights.delta()
    assert (delta.method, delta.label_rows, delta.pairs, delta.bad_thumbs) == ("sft", 2, 0, 0)
    assert {path.name for path in folder.iterdir()} == {
        "train.jsonl",
        "trained.jsonl",
        "earlier_fixes.jsonl",
        "held_out.jsonl",
        "good_answers.jsonl",
    }
    assert len(read_jsonl(folder / "good_answers.jsonl")) == 20


async def test_preferences_alone_train_dpo_a_pair_for_each_answer_beaten(nights: Nights) -> None:
    """And the digest covers the pairs; a tool call beaten is left out by name."""
    call = '[{"name":"door","arguments":"{}"}]'
    await nights.store(
        *labelled("tea", Verdict.PREFERRED, rejected=["No tea.", "Tea?"]),
        *labelled("wool", Verdict.PREFERRED, rejected=[call]),
        *labelled("silk", Verdict.PREFERRED),
    )
    delta, folder = await nights.delta()
    assert (delta.method, delta.label_rows, delta.pairs) == ("dpo", 3, 3)
    assert any("lb_wool#0 left out of pairs" in note for note in delta.notes)
    pairs = read_jsonl(folder / "pairs.jsonl")
    assert [pair["id"] for pair in pairs] == ["lb_tea#0", "lb_tea#1", "lb_silk#0"]
    assert pairs[0]["chosen"] == "All of tea is green."
    assert pairs[0]["rejected"] == "No tea."
    again, _ = await nights.delta(method="sft")
    assert again.digest != delta.digest


async def test_corrections_give_pairs_where_a_project_asks_for_them(nights: Nights) -> None:
    """sft+dpo has both files; held-out labels give none."""
    await nights.store(*labelled("tea"), *labelled("wool"), *labelled("moss", held_out=True))
    delta, folder = await nights.delta(method="sft+dpo")
    assert (delta.method, delta.pairs, delta.held_out_items) == ("sft+dpo", 2, 1)
    assert delta.method_why == "trainer.method = 'sft+dpo'"
    assert {pair["id"] for pair in read_jsonl(folder / "pairs.jsonl")} == {"lb_tea#0", "lb_wool#0"}
    assert len(read_jsonl(folder / "train.jsonl")) == 2


async def test_bare_thumbs_train_kto_and_are_kept_apart_from_the_exam(nights: Nights) -> None:
    """What users complained of and nobody settled; half of the good answers; what is trained is not examined."""
    settled = [
        labelled("praised", Verdict.GOOD, correction=None, rejected=[]),
        labelled("unclear", Verdict.CANNOT_TELL, correction=None, rejected=[]),
    ]
    rated = [item("rateddown"), item("ratedup")]
    hidden = [item("heldout", held_out=True), item("sampled"), item("pairshown", other_answer="The other.")]
    await nights.store(*(row for rows_ in settled for row in rows_), *rated, *hidden, *good_answers(20))
    await nights.store(
        *said_of(settled[0][0]),
        *said_of(settled[1][0]),
        *said_of(rated[0], FeedbackKind.RATING, 0.1),
        *said_of(rated[1], FeedbackKind.RATING, 0.9),
        *said_of(hidden[0]),
        *said_of(hidden[1], name="sa"),
        *said_of(hidden[2]),
    )
    await bad_thumbs(nights, 3)
    delta, folder = await nights.delta()
    thumbs = read_jsonl(folder / "thumbs.jsonl")
    bad = {thumb["id"] for thumb in thumbs if not thumb["good"]}
    good = {thumb["id"] for thumb in thumbs if thumb["good"]}
    assert delta.method == "kto"
    assert bad == {"it_rateddown", *(f"it_{c * 7}" for c in "zyx")}
    assert good == {f"ga_{n}" for n in range(20) if is_trained(f"ga_{n}")}
    assert (delta.good_thumbs, delta.bad_thumbs) == (len(good), 4)
    examined = {row["id"] for row in read_jsonl(folder / "good_answers.jsonl")}
    assert examined == {f"ga_{n}" for n in range(20)} - good
    assert 5 <= len(examined) <= 15
    trained = {row["id"]: row for row in read_jsonl(folder / "trained.jsonl")}
    assert set(trained) == bad
    assert trained["it_rateddown"]["not_again"] == "Nothing is known of rateddown."


async def test_too_few_of_a_kind_skip_the_night_with_the_number(nights: Nights) -> None:
    """Whether asked for or by the data."""
    await nights.store(*labelled("tea"), *good_answers(20))
    await bad_thumbs(nights, 2)
    with pytest.raises(NightEnds, match="2 thumbs down; 3 are needed: 1 more") as ended:
        await nights.delta(method="kto")
    assert ended.value.state is NightState.SKIPPED
    with pytest.raises(NightEnds, match=r"1 new labels; 2 are needed: 1 more \(or thumbs"):
        await nights.delta()
    with pytest.raises(NightEnds, match="1 new labels beat an answer that was shown; 2 are needed"):
        await nights.delta(method="orpo")


async def test_thumbs_of_a_rejected_night_wait_for_a_person(nights: Nights) -> None:
    """Held like labels, listed with what they say, freed by the same command; the next night does without them."""
    await nights.store(*good_answers(20))
    await bad_thumbs(nights, 4)
    await nights.delta()
    async with nights.database.write() as session:
        await hold(session, "ni_1")
    with pytest.raises(NightEnds, match="0 thumbs down"):
        await nights.delta(method="kto")
    held = {row["id"]: row for row in await held_labels(nights.database, PROJECT)}
    assert held["it_zzzzzzz"]["flagged_answer"] == "Nothing is known of zzzzzzz."
    assert held["it_zzzzzzz"]["night"] == "ni_1"
    assert await confirm(nights.database, PROJECT, held) == len(held)
    delta, _ = await nights.delta(method="kto")
    assert delta.bad_thumbs == 4


async def test_what_the_serving_adapter_has_seen_is_not_new(nights: Nights) -> None:
    """Thumbs it was trained on are trained again, but make no night by themselves."""
    await nights.store(*good_answers(20))
    await bad_thumbs(nights, 4)
    await nights.delta()
    adapter = Adapter(name="v2", project=PROJECT, version=2, digest="d", base_digest="b", night_id="ni_1")
    await nights.store(adapter)
    await nights.store(Serving(project=PROJECT, current="v2"))
    with pytest.raises(NightEnds, match="0 thumbs down; 3 are needed"):
        await nights.delta(method="kto")
    more = [item(name) for name in ("mmmmmmm", "nnnnnnn", "ooooooo")]
    await nights.store(*more)
    await nights.store(*(row for one in more for row in said_of(one)))
    fresh = [f"ga_{n}" for n in range(20, 26)]
    await nights.store(*good_answers(26)[20:])
    delta, folder = await nights.delta(method="kto", min_thumbs=2)
    assert delta.bad_thumbs == 7
    assert ids(folder, "trained") == {one.id for one in more}
    assert ids(folder, "earlier_fixes") == {f"it_{c * 7}" for c in "zyxw"}
    uses = {use.label_id: use.role for use in await rows(nights.database, LabelUse) if use.night_id == "ni_3"}
    assert uses["it_zzzzzzz"] == "thumb again"
    assert uses["it_mmmmmmm"] == "thumb"
    assert {uses[name] for name in fresh if is_trained(name)} == {"thumb"}


async def test_what_the_serving_adapter_was_taught_is_examined_apart(nights: Nights) -> None:
    """Whether it is trained again or not, thumbs too; no more of it than asked for."""
    old = [f"old{letter * 3}" for letter in "abcdefgh"]
    await nights.store(*(row for name in old for row in labelled(name)))
    await nights.delta()
    adapter = Adapter(name="v2", project=PROJECT, version=2, digest="d", base_digest="b", night_id="ni_1")
    await nights.store(adapter)
    await nights.store(Serving(project=PROJECT, current="v2"), *labelled("tea"), *labelled("wool"))
    nights.settings = {"replay": {"max_rows": 2}}
    delta, folder = await nights.delta()
    assert (delta.label_rows, delta.replay_rows) == (2, 2)
    assert ids(folder, "trained") == {"lb_tea", "lb_wool"}
    assert ids(folder, "earlier_fixes") == {f"lb_{name}" for name in old}
    nights.settings["gate"] = {"general_probes": False, "earlier_fixes": 3}
    _, folder = await nights.delta()
    assert len(ids(folder, "earlier_fixes")) == 3


def ids(folder: Path, name: str) -> set[str]:
    return {row["id"] for row in read_jsonl(folder / f"{name}.jsonl")}


async def test_going_on_needs_an_adapter_of_this_very_shape(nights: Nights, tmp_path: Path) -> None:
    """The base while nothing serves; name and digest afterwards; another rank or changed files are refused."""
    context = nights.context(start="current", rank=4, alpha=8)
    assert (await starting_adapter(context, "b"))[0] is None
    folder = write_adapter(tmp_path / "adapter", TINY)
    digest = adapter_digest(folder)
    row = Adapter(name="v2", project=PROJECT, version=2, digest=digest, base_digest="b", folder=str(folder))
    await nights.store(row)
    await nights.store(Serving(project=PROJECT, current="v2"))
    start, told = await starting_adapter(context, "b")
    assert start is not None
    assert (start.name, start.digest, start.folder) == ("v2", digest, folder)
    assert digest in told
    assert (await starting_adapter(nights.context(start="base"), "b"))[0] is None
    with pytest.raises(CannotContinue, match=r"rank 4 there, 8 here; alpha 8.0 there, 16.0 here"):
        await starting_adapter(nights.context(start="current", rank=8, alpha=16), "b")
    with pytest.raises(CannotContinue, match="target_modules"):
        await starting_adapter(nights.context(start="current", rank=4, alpha=8, target_modules=["q_proj"]), "b")
    with pytest.raises(CannotContinue, match="another base"):
        await starting_adapter(context, "other")
    (folder / "adapter_model.safetensors").write_bytes(
        (write_adapter(tmp_path / "else", TINY, seed=5) / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(CannotContinue, match="not those that were registered"):
        await starting_adapter(context, "b")
