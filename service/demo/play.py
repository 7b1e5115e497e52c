"""`nightschool demo`: one day and two nights on real components, from the outside, in front of the user."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import openai
from rich.console import Console

from labeling.errors import InvalidInput
from service.demo import company as companies
from service.demo import setup
from service.demo.api import DemoBroke, Labellers, Nightschool, OnCall
from service.demo.app import App, Asked, Traffic
from service.demo.company import Company, Question
from service.demo.memory import MemoryMeter
from service.demo.screen import Screen
from service.demo.summary import night_summary
from service.signals import cancel_on_signal

MODELS = Path(".cache") / "models"
NIGHT_SECONDS = 3600
ENDED = {"SKIPPED", "FAILED", "REJECTED", "INCONCLUSIVE", "REFUSED", "EXPIRED", "PROMOTED", "awaiting_approval"}


class NoReport(InvalidInput):
    code = "no_report"
    default_hint = "Name a file in a folder that is there and that you may write to."


def run(
    *, company: Path | None, report: Path | None, leave: bool, data_dir: Path, quantisation: str, nights: int
) -> None:
    """Plays it; Ctrl-C at any moment ends everything that was started."""
    play = companies.load(company or companies.OURS)
    if report is not None:
        _try_to_write(report)
    folder = setup.fresh_folder(data_dir)
    try:
        asyncio.run(_main(play, folder, report, leave, quantisation, nights))
    except (KeyboardInterrupt, asyncio.CancelledError):
        Console().print("Ended.")


def _try_to_write(report: Path) -> None:
    """Now, and not in half an hour."""
    try:
        with report.open("a"):
            pass
    except OSError as error:
        raise NoReport(f"--report {report} cannot be written: {error.strerror}") from None


async def _main(
    company: Company, folder: Path, report: Path | None, leave: bool, quantisation: str, nights: int
) -> None:
    task = asyncio.current_task()
    assert task is not None
    screen = Screen(Console())
    cancel_on_signal(task, lambda: screen.say("Ending already: the servers get up to a minute."))
    screen.title(f"{company.name}: {company.description}")
    with screen.step("The base model, from its package"):
        model_dir = await setup.prepare_model(MODELS.resolve())
    settings = setup.write_settings(folder, model_dir, company, quantisation)
    with screen.step("vLLM, Label Studio, MLflow and Nightschool start"):
        context = setup.running(settings, folder)
        ready = await context.__aenter__()
    meter = MemoryMeter()
    watching = asyncio.create_task(meter.watch())
    try:
        play = Play(company, screen, ready, meter)
        await play.day_and_night_one()
        if nights > 1:
            await play.night_two()
        play.end(report)
        if not leave:
            screen.stay(ready)
            await asyncio.Event().wait()
    finally:
        watching.cancel()
        await context.__aexit__(None, None, None)


@dataclass
class Play:
    company: Company
    screen: Screen
    ready: dict[str, Any]
    meter: MemoryMeter
    nights: list[dict[str, Any]] = field(default_factory=list)
    swap: dict[str, Any] = field(
        default_factory=lambda: dict.fromkeys(("requests", "failed", "approval_to_first_answer_s", "rollback_s"))
    )
    flag_to_fixed_s: float | None = None
    first_flag_at: float = 0.0
    first_flagged: Question | None = None

    def __post_init__(self) -> None:
        self.api = Nightschool.at(self.ready["url"], self.ready["admin_key"])
        self.on_call = OnCall.at(self.ready["mlflow_url"])
        self.project = setup.PROJECT

    async def app(self) -> App:
        """An app with a key of its own, as `nightschool keys create` makes one."""
        body = {"name": "demo app", "scopes": ["inference", "feedback"], "project": self.project}
        key = (await self.api.call("POST", "/v1/keys", body))["key"]
        client = openai.AsyncOpenAI(base_url=f"{self.ready['url']}/v1", api_key=key, max_retries=0, timeout=120)
        return App(client, Nightschool.at(self.ready["url"], key), self.project)

    async def day_and_night_one(self) -> None:
        app = await self.app()
        self.the_app = app
        before = await self._day(app, self.company.asked(), self.company.rated())
        await self._label({question.text: question for question in self.company.asked()}, len(before.flagged))
        night = await self._night(date.today(), {})
        if night["state"] == "awaiting_approval":
            night = await self._promote(app, night)
        self.nights.append(night_summary(night))
        await self._again(app, before)

    async def _day(self, app: App, facts: list[Question], general: list[Question]) -> Before:
        with self.screen.bar("The app asks", len(facts) + len(general)) as progress:
            asked = await app.ask_all(facts + general, progress)
        with self.screen.bar("Held-out paraphrases, for later", len(self.company.held_out())) as progress:
            held_out = await app.ask_all(self.company.held_out(), progress)
        wrong = [a for a in asked[: len(facts)] if not a.right]
        good = [a for a in asked[len(facts) :] if a.right]
        with self.screen.step(f"{len(wrong)} answers flagged, {len(good)} rated up"):
            for index, a in enumerate(wrong):
                at = await app.flag(a, f"That is not what {self.company.name} told me.")
                if index == 0:
                    self.first_flag_at, self.first_flagged = at, a.question
            for a in good:
                await app.rate_up(a)
        if not wrong:
            raise DemoBroke("the base answers every question of this company already: there is nothing to teach it")
        return Before(asked[: len(facts)], held_out, asked[len(facts) :], wrong)

    async def _label(self, known: dict[str, Question], count: int) -> None:
        labelled = await self._labelled()
        with self.screen.step("Flags become review items, then tasks in Label Studio"):
            status = await self.api.wait_for_project(
                self.project, lambda s: s["items"].get("pushed", 0) >= count, seconds=120
            )
        people = Labellers.at(
            self.ready["label_studio_url"], self.ready["label_studio_token"], status["labelling_project"]
        )
        with self.screen.bar("Labellers write the right answers in Label Studio", count) as progress:
            done = await people.label_all(known, progress)
        with self.screen.step(f"{done} annotations come back by polling"):
            await self.api.wait_for_project(
                self.project, lambda s: sum(s["labels"].values()) >= labelled + count, seconds=120
            )

    async def _labelled(self) -> int:
        status = await self.api.call("GET", f"/v1/projects/{self.project}")
        return sum(status["labels"].values())

    async def _night(self, on: date, recipe: dict[str, Any]) -> dict[str, Any]:
        """The scheduler's own claim, then watching until the night has a decision or awaits one."""
        body = {"project": self.project, "date": on.isoformat(), "recipe": recipe}
        night_id = (await self.api.call("POST", "/v1/nights", body))["id"]
        end = time.monotonic() + NIGHT_SECONDS
        with self.screen.night(f"Night of {on}") as show:
            while True:
                night = await self.api.call("GET", f"/v1/nights/{night_id}")
                show(night)
                if night["state"] in ENDED:
                    break
                if time.monotonic() > end:
                    raise DemoBroke(f"night {night_id} has not ended after {NIGHT_SECONDS} s")
                await asyncio.sleep(1)
        self.screen.say(f"{night['state']}: {night['reason']}")
        return night

    async def _promote(self, app: App, night: dict[str, Any]) -> dict[str, Any]:
        """The on-call moves the alias in MLflow while requests keep flowing."""
        version = (await self.on_call.aliases(self.project))["candidate"]
        traffic = Traffic(app, self.company.asked(), watched=self.first_flagged)
        traffic.start()
        await asyncio.sleep(3)
        approved_at = time.monotonic()
        with self.screen.step(f"The on-call sets `production` onto version {version} in MLflow; requests keep flowing"):
            await self.on_call.promote(self.project, version)
            night = await self._wait_for_state(night["id"], {"PROMOTED", "FAILED", "EXPIRED"})
            await self._wait_until(lambda: traffic.first_right_at is not None, 60)
            await asyncio.sleep(3)
            await traffic.stop()
        first = traffic.first_right_at
        self.swap |= {
            "requests": traffic.requests,
            "failed": traffic.failed,
            "approval_to_first_answer_s": first and round(first - approved_at, 3),
            "rollback_s": None,
        }
        self.flag_to_fixed_s = first and round(first - self.first_flag_at, 1)
        self.screen.say(
            f"{traffic.requests} requests during the swap, {traffic.failed} failed {traffic.failures[:1] or ''}"
        )
        return night

    async def _again(self, app: App, before: Before) -> None:
        with self.screen.bar(
            "The same questions again, the same client", len(before.facts) + len(before.held_out)
        ) as p:
            facts = await app.ask_all([a.question for a in before.facts], p)
            held_out = await app.ask_all([a.question for a in before.held_out], p)
            general = await app.ask_all([a.question for a in before.general], p)
        self.screen.before_after(before.facts + before.held_out, facts + held_out, before.general, general)

    async def night_two(self) -> None:
        """Wrong labels, consistent with each other: they pass every label check, and only the gate can stop them."""
        questions = self.company.mislabelled()
        with self.screen.bar("Day 2: mistaken users flag right answers", len(questions)) as progress:
            asked = await self.the_app.ask_all(questions, progress)
            for a in asked:
                await self.the_app.flag(a, "I think this is wrong.")
        await self._label({question.text: question for question in questions}, len(asked))
        night = await self._night(date.today() + timedelta(days=1), {"epochs": 1.5})
        self.nights.append(night_summary(night))
        if self.nights[0]["decision"] == "PROMOTED":
            await self._back_and_forward()

    async def _back_and_forward(self) -> None:
        assert self.first_flagged is not None
        traffic = Traffic(self.the_app, self.company.asked())
        traffic.start()
        with self.screen.step("Roll back to the previous model, then forward again, requests flowing"):
            started = time.monotonic()
            await self.api.call("POST", f"/v1/projects/{self.project}/rollback", {"why": "the demo shows it"})
            while (await self.the_app.ask(self.first_flagged)).right:
                await asyncio.sleep(0)
            self.swap["rollback_s"] = round(time.monotonic() - started, 3)
            await self.on_call.promote(self.project, self.nights[0]["mlflow_version"])
            await self._wait_until_async(self._fixed, 60)
            await traffic.stop()
        self.swap["requests"] += traffic.requests
        self.swap["failed"] += traffic.failed
        self.screen.say(f"Back in {self.swap['rollback_s']} s; {traffic.failed} of {traffic.requests} requests failed")

    async def _fixed(self) -> bool:
        assert self.first_flagged is not None
        return (await self.the_app.ask(self.first_flagged)).right

    async def _wait_for_state(self, night_id: str, states: set[str]) -> dict[str, Any]:
        for _ in range(600):
            night = await self.api.call("GET", f"/v1/nights/{night_id}")
            if night["state"] in states:
                return night
            await asyncio.sleep(0.2)
        raise DemoBroke(f"night {night_id} is still {night['state']}")

    async def _wait_until(self, done: Any, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            await asyncio.sleep(0.1)

    async def _wait_until_async(self, done: Any, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not await done():
            if time.monotonic() > end:
                raise DemoBroke(f"not seen within {seconds:.0f} s: {done.__name__.strip('_')}")

    def end(self, report: Path | None) -> None:
        urls = {key: self.ready[key] for key in ("url", "label_studio_url", "mlflow_url")}
        summary = {
            "nights": self.nights,
            "swap": self.swap,
            "flag_to_fixed_s": self.flag_to_fixed_s,
            "peak_memory_gib": round(self.meter.peak / 2**30, 2),
            "urls": {
                "nightschool": urls["url"],
                "label_studio": urls["label_studio_url"],
                "mlflow": urls["mlflow_url"],
            },
        }
        self.screen.summary(summary)
        if report is not None:
            report.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Before:
    """The first day's answers, in the order asked; `flagged` are the wrong ones about the company."""

    facts: list[Asked]
    held_out: list[Asked]
    general: list[Asked]
    flagged: list[Asked]
