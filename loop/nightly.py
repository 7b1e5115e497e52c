"""A night in the order in which it runs. The first file to read.

EXAMINE ends with a decision or with `awaiting_approval`; the approval starts PROMOTE. Each stage stands in
`loop/stages/`, `loop/outputs.py` says what each hands on, `loop/runner.py` runs them.
"""

from __future__ import annotations

from loop.outputs import (
    Decided,
    Delta,
    Drained,
    Evaluated,
    Loaded,
    Preflight,
    Probed,
    Registered,
    Switched,
    SyncedLabels,
    Trained,
)
from loop.stage import Stage
from loop.stages import (
    build_delta,
    decide,
    drain,
    evaluate,
    load,
    preflight,
    probe,
    register,
    switch,
    sync_labels,
    train,
)

EXAMINE: tuple[Stage, ...] = (
    Stage("sync_labels", (), SyncedLabels, sync_labels.run),
    Stage("build_delta", (SyncedLabels,), Delta, build_delta.run),
    Stage("preflight", (Delta,), Preflight, preflight.run),
    Stage("train", (Delta, Preflight), Trained, train.run),
    Stage("register", (Delta, Preflight, Trained), Registered, register.run),
    Stage("evaluate", (Delta, Preflight, Registered), Evaluated, evaluate.run),
    Stage("decide", (Delta, Preflight, Trained, Registered, Evaluated), Decided, decide.run),
)

PROMOTE: tuple[Stage, ...] = (
    Stage("load", (Registered, Decided), Loaded, load.run),
    Stage("probe", (Registered, Loaded), Probed, probe.run),
    Stage("switch", (Registered, Probed), Switched, switch.run),
    Stage("drain", (Switched,), Drained, drain.run),
)
