"""What will be trained can be served: rank and modules that the engine takes, the same base, the same chat template."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from loop.adapter_files import base_digest, read_base_config
from loop.plain_lora import BLOCK_OF, expected_shapes
from loop.preflight.child_results import Audit, audit_path
from loop.preflight.finding import Finding, PreflightFailed
from loop.preflight.look import Look
from loop.settings import VLLM_RANKS
from loop.vllm import Replica, RequestRefused

OLDEST_VLLM = (0, 26)  # with which the product was tried
TOKENS_SHOWN = 6


async def adapter_servable(look: Look) -> list[Finding]:
    """vLLM serves plain LoRA up to --max-lora-rank, on the modules that its model class knows (vllm#9280)."""
    rank, largest = look.spec.lora.rank, look.context.engine.max_lora_rank
    if rank > largest:
        raise PreflightFailed(
            f"trainer.rank {rank} is above vLLM's max_lora_rank {largest}: it could never be served",
            hint="Lower projects.trainer.rank, or raise vllm.max_lora_rank and start vLLM with it.",
        )
    if largest not in VLLM_RANKS:
        raise PreflightFailed(
            f"vllm.max_lora_rank {largest} is none that vLLM takes: {', '.join(map(str, VLLM_RANKS))}",
            hint=f"Set it to {min(known for known in VLLM_RANKS if known >= rank)}.",
        )
    unknown = sorted(set(look.spec.lora.target_modules) - BLOCK_OF.keys())
    if unknown:
        raise PreflightFailed(
            f"trainer.target_modules names {unknown[0]!r}, which engines do not serve",
            hint=f"Name some of {', '.join(BLOCK_OF)}.",
        )
    shapes = dict(expected_shapes(read_base_config(look.spec.base_dir), look.spec.lora.target_modules, rank))
    modules = len(look.spec.lora.target_modules)
    return [Finding(f"adapter servable: rank {rank} of {largest}, {modules} modules, {len(shapes)} tensors")]


async def same_base(look: Look) -> list[Finding]:
    """Every replica serves this very base: by name, and by bytes where its folder can be seen from here."""
    return [await _same_base(look, replica) for replica in look.context.clients.replicas]


async def _same_base(look: Look, replica: Replica) -> Finding:
    project = look.context.project
    served = {model.name: model for model in await replica.served_models()}
    version = await replica.version()
    if project.base_name not in served:
        raise PreflightFailed(
            f"{replica.url} does not serve {project.base_name!r}; it serves {', '.join(sorted(served)) or 'nothing'}",
            hint="Set projects.base_name to the name that vLLM's --served-model-name gives.",
        )
    if (found := _version(version)) and found < OLDEST_VLLM:
        raise PreflightFailed(
            f"{replica.url} runs vLLM {version}, which is older than {'.'.join(map(str, OLDEST_VLLM))}",
            hint="Update it: adapters loaded into older ones may be served wrongly.",
        )
    by = f"{replica.url} (vLLM {version or 'of unknown version'}) serves {project.base_name}"
    folder = Path(served[project.base_name].root)
    if not (folder / "config.json").is_file():
        return Finding(f"{by}; its folder cannot be seen from here: trusted by name and tokens")
    if await asyncio.to_thread(base_digest, folder) != look.spec.base_digest:
        raise PreflightFailed(
            f"{replica.url} serves {project.base_name!r} from {folder}, which is not the model in {project.base_dir}",
            hint="Point projects.base_dir at the folder that vLLM serves, or start vLLM from base_dir.",
        )
    return Finding(f"{by} with the same bytes")


async def same_tokens(look: Look) -> list[Finding]:
    """Every replica renders the audit's conversations into the trainer's very tokens: same template, same tokenizer."""
    audit = Audit.model_validate_json(audit_path(look.context.folder).read_bytes())
    return [await _same_tokens(look, replica, audit) for replica in look.context.clients.replicas]


async def _same_tokens(look: Look, replica: Replica, audit: Audit) -> Finding:
    name = look.context.project.base_name
    compared = 0
    for one in audit.rendered:
        try:
            there = await replica.tokens(name, one.messages, answered=one.answered)
        except RequestRefused as error:
            raise PreflightFailed(
                f"{replica.url} can't render a conversation that the trainer can: {error}", hint=_cure(look)
            ) from error
        if tuple(there) != one.tokens:
            raise PreflightFailed(f"{replica.url} {_difference(there, one.tokens)}", hint=_cure(look))
        compared += 1
    return Finding(f"{replica.url} renders {compared} conversations into the trainer's tokens: same chat template")


def _difference(there: list[int], here: tuple[int, ...]) -> str:
    place = next((n for n, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
    shown = [", ".join(map(str, tokens[place : place + TOKENS_SHOWN])) or "nothing" for tokens in (there, here)]
    return (
        f"renders a conversation otherwise than the trainer, from token {place} on: {shown[0]} there, {shown[1]} here. "
        "Its chat template or its tokenizer is another"
    )


def _cure(look: Look) -> str:
    """For our own engine a restart: it is started with the template of the settings."""
    own = look.context.project.chat_template
    if look.context.engine.managed:
        return "Restart `nightschool up`: its vLLM still has the chat template with which it was started."
    if own is None:
        return (
            "Start that vLLM without --chat-template, from the folder projects.base_dir; or set projects.chat_template "
            "to the file with which it was started."
        )
    return f"Start that vLLM with --chat-template {own.resolve()} (as it finds it), or correct projects.chat_template."


def _version(text: str) -> tuple[int, ...]:
    """Empty where it is no released version."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else ()
