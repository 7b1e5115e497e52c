"""What the demo shows: steps with their seconds, bars, the night stage by stage, a before/after table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.demo.app import Asked


@dataclass
class Screen:
    console: Console

    def title(self, text: str) -> None:
        self.console.rule(f"[bold]{escape(text)}")

    def say(self, text: str) -> None:
        self.console.print(f"  {escape(text)}")

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        started = time.monotonic()
        with self.console.status(escape(text)):
            yield
        self.console.print(f"[green]✓[/] {escape(text)} [dim]{time.monotonic() - started:.1f} s[/]")

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(escape(text), total=total)
            yield lambda done: progress.update(task, completed=done)
        self.console.print(f"[green]✓[/] {escape(text)} ({total}) [dim]{time.monotonic() - started:.1f} s[/]")

    @contextmanager
    def night(self, title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Each finished stage is a line that stays; the running one shows its progress."""
        self.console.print(f"[bold]{escape(title)}[/]")
        seen: set[str] = set()
        with self.console.status("claimed") as status:

            def show(night: dict[str, Any]) -> None:
                for stage in night["stages"]:
                    if stage["stage"] not in seen:
                        seen.add(stage["stage"])
                        self.console.print(f"  [green]✓[/] {stage['stage']} [dim]{stage['seconds']:.1f} s[/]")
                status.update(escape(_live(night)))

            yield show

    def before_after(self, before: list[Asked], after: list[Asked], general: list[Asked], later: list[Asked]) -> None:
        table = Table(
            "Question", "Before", "After", title="Before and after, through the same client", show_lines=False
        )
        for old, new in list(zip(before, after, strict=True))[:: max(1, len(before) // 12)]:
            table.add_row(escape(old.question.text), _mark(old), _mark(new))
        self.console.print(table)
        for name, olds, news in (("about the company", before, after), ("general", general, later)):
            right, now = sum(a.right for a in olds), sum(a.right for a in news)
            self.say(f"{name}: {right}/{len(olds)} right before, {now}/{len(news)} after")

    def summary(self, summary: dict[str, Any]) -> None:
        self.console.rule("[bold]Summary")
        self.console.print_json(json.dumps(summary))

    def stay(self, ready: dict[str, Any]) -> None:
        self.console.rule("[bold]Everything stays up until Ctrl-C")
        self.say(f"Nightschool   {ready['url']}   (admin key in {ready['admin_key_file']})")
        login = f"{ready['label_studio_username']} / {ready['label_studio_password']}"
        self.say(f"Label Studio  {ready['label_studio_url']}   ({login})")
        self.say(f"MLflow        {ready['mlflow_url']}   (no log-in)")


def _live(night: dict[str, Any]) -> str:
    live = night.get("live") or {}
    stage = live.get("stage") or night["state"]
    if "total_steps" in live:
        return f"{stage}: step {live['step']}/{live['total_steps']}, loss {live['loss']:.3f}"
    return f"{stage}: {live['doing']}" if "doing" in live else str(stage)


def _mark(asked: Asked) -> str:
    colour = "green" if asked.right else "red"
    return f"[{colour}]{escape(' '.join(asked.answer.split())[:70])}[/]"
