"""What `night watch` shows of a night, from the same JSON that the API gives: as a screen and as one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loop.nightly import EXAMINE, PROMOTE
from loop.states import AT_WORK

BAR_WIDTH = 50


def headline(night: Mapping[str, Any]) -> str:
    return f"{night['project']} {night['date']}: {night['state']}"


def screen(night: Mapping[str, Any]) -> RenderableType:
    """Stages, the running one's bar and figures, alarms; an ended night's reason and cure."""
    live = night["live"] or {}
    parts: list[RenderableType] = [Text(headline(night), style="bold"), _stages(night, live)]
    if night["state"] not in AT_WORK:
        return Group(*parts, Text(night["reason"] or ""), Text(night["hint"] or ""))
    if "total_steps" in live:
        parts.append(ProgressBar(total=live["total_steps"], completed=live["step"], width=BAR_WIDTH))
    if figures := _figures(live):
        table = Table.grid(padding=(0, 2))
        for name, value in figures.items():
            table.add_row(f"[dim]{name}[/]", escape(value))
        parts.append(table)
    parts += [Text(f"! {alarm}", style="yellow") for alarm in _alarms(night, live)]
    return Group(*parts)


def plain(night: Mapping[str, Any]) -> str:
    """One line without a cursor's tricks, for logs and pipes."""
    live = night["live"] or {}
    words = [headline(night)]
    if night["state"] in AT_WORK:
        words += [str(live.get("stage", "")), *(f"{name} {value}" for name, value in _figures(live).items())]
        words += [f"ALARM {alarm}" for alarm in live.get("alarms", ())]
    else:
        words.append(night["reason"] or "")
    return "  ".join(word for word in words if word)


def _stages(night: Mapping[str, Any], live: Mapping[str, Any]) -> Text:
    done = {stage["stage"]: stage["seconds"] for stage in night["stages"]}
    names = [stage.name for stage in (PROMOTE if night["state"] == "promoting" else EXAMINE)]
    text = Text()
    for name in names:
        if name in done:
            text.append(f"{name} {_time(done[name])}  ", style="green")
        else:
            text.append(f"{name}  ", style="bold" if name == live.get("stage") else "dim")
    return text


def _figures(live: Mapping[str, Any]) -> dict[str, str]:
    """In the order in which one looks; what is not known is left out."""
    found: dict[str, str] = {}
    if "doing" in live:
        found["doing"] = str(live["doing"])
    if "total_steps" in live:
        found["step"] = f"{live['step']}/{live['total_steps']}"
    formats = (
        ("loss", "loss", "{:.4f}"),
        ("gradient", "grad_norm", "{:.2f}"),
        ("rate", "learning_rate", "{:.2e}"),
        ("tokens/s", "tokens_per_s", "{:,.0f}"),
    )
    found |= {name: text.format(live[key]) for name, key, text in formats if live.get(key) is not None}
    if memory := _memory(live):
        found["memory"] = memory
    if live.get("utilisation") is not None:
        found["busy"] = f"{live['utilisation']:.0%}"
    if live.get("temperature_c") is not None:
        found["temperature"] = f"{live['temperature_c']:.0f} C"
    if live.get("power_w") is not None:
        cap = f" of {live['power_cap_w']:.0f}" if live.get("power_cap_w") else ""
        found["power"] = f"{live['power_w']:.0f}{cap} W"
    if live.get("seconds_left") is not None:
        limited = ", fitted into the hours allowed" if live.get("time_limited") else ""
        found["left"] = f"{_time(live['seconds_left'])}{limited}"
    for word in ("paused", "slowed_by"):
        if live.get(word):
            found[word.replace("_", " ")] = str(live[word])
    return found


def _memory(live: Mapping[str, Any]) -> str:
    used, total = live.get("gpu_memory_bytes"), live.get("gpu_memory_total_bytes")
    if used is None:
        used, total = live.get("memory_bytes"), live.get("host_memory_total_bytes")
    if used is None:
        return ""
    return f"{used / 1e9:.1f} of {total / 1e9:.0f} GB" if total else f"{used / 1e9:.1f} GB"


def _alarms(night: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Those that go on, and what was done because of earlier ones."""
    acted = [event for event in night["events"] if event["kind"] == "alarm" and event["action"] != "warn"]
    told = [f"{one['action'].replace('_', ' ')}: {one['message']}" for one in acted if not one["over"]]
    return [*live.get("alarms", ()), *told[-3:]]


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
