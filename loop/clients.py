"""The outside systems that one installation's stages may talk to; the service composes them, tests their own."""

from __future__ import annotations

from dataclasses import dataclass

from labeling.database import Database
from labeling.label_studio import LabelStudioServer
from loop.aliases import AliasSwitch
from loop.executors import Executor
from loop.mlflow_registry import Registry
from loop.object_store import ObjectStore
from loop.vllm import Replica


@dataclass(frozen=True)
class Clients:
    database: Database
    label_studio: LabelStudioServer
    registry: Registry
    objects: ObjectStore
    executor: Executor
    replicas: tuple[Replica, ...]
    aliases: AliasSwitch
