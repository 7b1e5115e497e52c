"""`python -m loop.trainers.smoke SPEC`: a moment of training's own work on the very device, a 4-bit product and back.

Writes `smoke.json` beside the spec: driver, CUDA and package versions, free memory. A library that only loads, or a
card that another process fills, shows here and not in hour two.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

from labeling.errors import NightschoolError
from loop.digests import write_durably
from loop.preflight.child_results import DeviceFacts, Smoke, smoke_path
from loop.trainers.child import live
from loop.trainers.gpu_facts import DriverTooOld, card_there, diagnose, gather
from loop.trainers.progress import Channel
from loop.trainers.spec import TrainSpec

WIDTH, ROWS = 256, 64
AT_MOST_OFF = 0.05  # bfloat16 rounds at 0.004; a kernel that computes something else is off by 1


class CardTaken(NightschoolError):
    code = "card_taken"


class NoDeepSpeed(NightschoolError):
    code = "no_deepspeed"
    default_hint = 'Install deepspeed there, or set trainer.sharding = "fsdp", which shares out the same.'


class KernelFailed(NightschoolError):
    code = "kernel_failed"
    default_hint = "torch, bitsandbytes and the driver do not fit together: take the versions of deploy/environments."


class KernelWrong(NightschoolError):
    code = "kernel_wrong"
    default_hint = "Do not train on this machine until it is right: try another bitsandbytes, then the card's memory."


def main() -> int:
    return live("Try the kernels that a spec would train with.", smoke)


def smoke(spec: TrainSpec, folder: Path, channel: Channel) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # as the trainers do
    import torch

    import loop.trainers.sft_loop  # noqa: F401  # whatever of trl and its kind is missing or broken shows here

    facts = gather(torch)
    if spec.cards.sharding == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise NoDeepSpeed('the trainer\'s environment lacks deepspeed, which trainer.sharding = "zero3" needs')
    needs_4bit = spec.quantisation == "nf4"
    diagnose(facts, card_there=card_there(visible), needs_gpu=spec.needs_gpu, needs_4bit=needs_4bit)
    since = time.monotonic()
    try:
        off = product(torch, needs_4bit)
    except RuntimeError as error:
        raise explained(error, facts) from error
    if not off <= AT_MOST_OFF:
        raise KernelWrong(f"a product on {facts.device} is off by {off:.2g} of its size, {AT_MOST_OFF} at most")
    found = Smoke(facts=facts, seconds=round(time.monotonic() - since, 3), off=round(off, 6))
    write_durably(smoke_path(folder), found.model_dump_json(indent=1).encode())


def product(torch: Any, needs_4bit: bool) -> float:
    """Forward, backward and an adapter's step beside the layer; by how much, relative, it differs from plain math."""
    from loop.trainers.planned_run import compute_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    layer, weight = (_in_4bit if needs_4bit else _as_is)(torch, plain, device, compute_dtype())
    rows = torch.randn(ROWS, WIDTH, device=device, dtype=compute_dtype(), requires_grad=True)
    adapter = torch.nn.Parameter(torch.zeros(WIDTH, WIDTH, device=device))
    optimizer = torch.optim.AdamW([adapter], lr=1e-3, fused=True)
    result = layer(rows) + (rows.float() @ adapter).to(rows.dtype)
    result.float().square().sum().backward()
    optimizer.step()
    expected = rows.detach().float() @ weight.t()
    gradient = 2 * expected @ weight
    if device == "cuda":
        torch.cuda.synchronize()
    offs = (_off(result.detach(), expected), _off(rows.grad, gradient))
    return max(offs) if bool(torch.isfinite(adapter).all()) else float("inf")


def _in_4bit(torch: Any, plain: Any, device: str, dtype: Any) -> tuple[Any, Any]:
    """The layer, and its weight as it is once taken out of 4 bits again."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(device)
    return layer, dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def _as_is(torch: Any, plain: Any, device: str, dtype: Any) -> tuple[Any, Any]:
    layer = plain.to(device, dtype).requires_grad_(False)
    return layer, layer.weight.float()


def _off(found: Any, expected: Any) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def explained(error: RuntimeError, facts: DeviceFacts) -> NightschoolError:
    """Cause and cure of what CUDA raises; its own first line stays in the message."""
    text = str(error)
    said = text.splitlines()[0][:300] if text else type(error).__name__
    if "out of memory" in text.lower():
        held = facts.memory_bytes - facts.memory_free_bytes
        others = ", ".join(facts.others) or "another process (a container may hide which)"
        return CardTaken(
            f"no memory left on {facts.device}: {held / 2**30:.1f} of {facts.memory_bytes / 2**30:.1f} GiB are held by "
            f"{others}",
            hint="End that process, or move it to another card. A vLLM beside the trainer needs a smaller "
            "--gpu-memory-utilization.",
        )
    if "driver version is insufficient" in text:
        return DriverTooOld(
            f"driver {facts.driver} is too old for CUDA {facts.torch_cuda}: {said}",
            hint=f"Install a driver for CUDA {facts.torch_cuda} or newer, or a torch built for an older CUDA.",
        )
    if "no kernel image" in text:
        return KernelFailed(
            f"{facts.device} (compute capability {facts.capability}) is none that this build was made for: {said}",
            hint="Install builds of torch and bitsandbytes that name this card's compute capability.",
        )
    packages = ", ".join(f"{name} {version}" for name, version in facts.packages.items())
    return KernelFailed(f"{said} (driver {facts.driver or 'none'}, CUDA {facts.torch_cuda or 'none'}, {packages})")


if __name__ == "__main__":
    sys.exit(main())
