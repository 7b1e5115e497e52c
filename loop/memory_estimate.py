"""How much memory a training step needs at its peak, item by item, from the model's sizes alone. No torch.

Bytes are counted as autograd keeps them; the few constants that can't be counted are marked and calibrated on measured
peaks (docs/trainer.md has the table, tests/unit/test_memory_plan.py compares).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from loop.model_shape import ALL_LAYERS, ModelShape

Method = Literal["qlora", "lora", "full"]
Checkpointing = Literal["off", "on", "offload"]
Optimizer = Literal["adamw", "adamw_8bit"]
Loss = Literal["chunked", "model"]

MIB, GIB = 2**20, 2**30
# NF4 with double quantisation: one byte for 64 weights, and four bytes for 256 of those (arXiv:2305.14314, section 3).
CONSTANT_BYTES = 1 / 64 + 4 / (64 * 256)
CUDA_CONTEXT = 600 * MIB  # kernels and libraries on the card before the first tensor: seen on an H100
NCCL_BUFFERS = 400 * MIB  # beside the context, where cards talk to each other
GATHERED = 3
FRAGMENTS = 0.04  # of all that comes and goes: blocks that the allocator holds and can't hand out
HOST_FRAGMENTS = 0.6  # the same of the C library's allocator and of kernels on a CPU: seen with 30M and 135M models
HOST_LIBRARIES = 700 * MIB  # resident after importing torch, transformers, peft and trl
MATMUL_WORKSPACE = 64 * MIB  # cuBLAS
LOSS_CHUNK = 256 * MIB  # logits in float32 that the trainers' loss makes at once, in tiles of so many tokens
LOSS_TILE = 128
HELD_STATES = 256 * MIB  # of the base's hidden states that are prepared ahead for rows held to it


@dataclass(frozen=True)
class Workload:
    """One step's largest micro-batch: `tokens` in all, in rows of at most `length`, `scored` of them under the loss.

    Memory is that of the worst batch, speed of a usual one: `usual` is the mean row's length to the longest one's.
    """

    tokens: int
    length: int
    scored: int
    replay_scored: int = 0  # of these, held to the base by KL: their log-probabilities under the base are kept
    usual: float = 1.0
    together: int = 1  # rows that can't be parted: 2 of a pair
    ahead: int = 32  # steps at most whose base states are prepared beforehand; 1: those of a part, as it comes

    @property
    def least(self) -> int:
        """Tokens that go through the model at once at the least."""
        return min(self.together * self.length, self.tokens)

    def half(self, tokens: int) -> int:
        """In whole rows or pairs, at least one: of three, a half is one, and takes no more memory than one."""
        return max(-(-tokens // self.least) // 2, 1) * self.least


@dataclass(frozen=True)
class Setup:
    """What is trained and how. `compute_bytes` is the width of matrix products: 2 in bfloat16, 4 in float32.

    "full" trains the weights of `targets`, of which an adapter is extracted (loop/trainers/full_finetuning.py).
    Each of `gpus` trains its share of a batch; `sharded`: and holds its share of every layer, instead of all of it.
    """

    shape: ModelShape
    method: Method = "qlora"
    backend: Literal["peft", "unsloth"] = "unsloth"
    rank: int = 16
    targets: tuple[str, ...] = ALL_LAYERS
    optimizer: Optimizer = "adamw"
    loss: Loss = "chunked"
    compute_bytes: int = 2
    device: Literal["cuda", "cpu"] = "cuda"
    gpus: int = 1
    sharded: bool = False
    eager_attention: bool = False

    @property
    def trained_parameters(self) -> int:
        if self.method == "full":
            return self.shape.target_parameters(self.targets)
        return self.shape.adapter_parameters(self.rank, self.targets)

    @property
    def shards(self) -> int:
        return self.gpus if self.sharded else 1


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak, on one card or of the process on a CPU; `host` is pinned memory beside it, not in the sum."""

    weights: int
    quantisation_constants: int
    adapter: int
    gradients: int
    optimizer_states: int
    activations: int
    attention: int
    logits: int
    workspace: int
    framework: int
    host: int
    moment: str  # the part of the step where the peak is

    @property
    def allocated(self) -> int:
        """What the allocator hands out: `torch.cuda.max_memory_allocated`."""
        return sum(getattr(self, item) for item in ITEMS if item != "framework")

    @property
    def total(self) -> int:
        return self.allocated + self.framework


ITEMS = tuple(field.name for field in fields(Estimate) if field.type == "int" and field.name != "host")


def estimate(setup: Setup, work: Workload, checkpointing: Checkpointing) -> Estimate:
    """The peak of a step: at the loss, or in a layer's backward pass."""
    at_loss, in_layer = _moments(setup, work, checkpointing)
    peak = at_loss if at_loss.bytes > in_layer.bytes else in_layer
    weights, constants = _weights(setup)
    workspace = peak.workspace + _held_states(setup, work) + _gathered(setup)
    workspace += MATMUL_WORKSPACE if setup.device == "cuda" else 0
    return Estimate(
        weights=weights,
        quantisation_constants=constants,
        adapter=4 * _trained(setup),
        gradients=4 * _trained(setup),
        optimizer_states=_optimizer_bytes(setup) * _trained(setup),
        activations=peak.activations,
        attention=peak.attention,
        logits=peak.logits,
        workspace=workspace,
        framework=_framework(setup, peak.bytes),
        host=_boundaries(setup, work) if checkpointing == "offload" else 0,
        moment=peak.name,
    )


@dataclass(frozen=True)
class _Moment:
    name: str
    activations: int
    attention: int
    logits: int
    workspace: int

    @property
    def bytes(self) -> int:
        return self.activations + self.attention + self.logits + self.workspace


def _moments(setup: Setup, work: Workload, checkpointing: Checkpointing) -> tuple[_Moment, _Moment]:
    """All layers' activations are there at both without checkpointing; with it, one layer's, and only in the second."""
    layer, attention = work.tokens * kept_per_token(setup), _attention(setup, work)
    logits, workspace = _logits(setup, work), _layer_workspace(setup, work)
    if checkpointing == "off":
        kept, attention = setup.shape.layers * layer, setup.shape.layers * attention
        return _Moment("loss", kept, attention, logits, 0), _Moment("backward", kept, attention, 0, workspace)
    boundary = work.tokens * setup.shape.hidden * setup.compute_bytes
    held = _boundaries(setup, work) if checkpointing == "on" else 2 * boundary  # one coming back, one going out
    return _Moment("loss", held, 0, logits, 0), _Moment("backward", held + layer, attention, 0, workspace)


def _trained(setup: Setup) -> int:
    """On each card: adapters are trained whole on all of them."""
    return -(-setup.trained_parameters // setup.shards) if setup.method == "full" else setup.trained_parameters


def _on_a_card(setup: Setup) -> int:
    """Parameters: its share of the layers; table and head are whole on each, of a full fine-tune one of the two."""
    shape = setup.shape
    one_of_two = setup.method == "full" and setup.shards > 1
    table = shape.vocabulary * shape.hidden if one_of_two else shape.embedding_parameters
    return -(-shape.linear_parameters // setup.shards) + table


def _weights(setup: Setup) -> tuple[int, int]:
    """Bytes of weights and of NF4's constants, which are never shared out."""
    width = setup.compute_bytes
    if setup.method != "qlora":
        return width * _on_a_card(setup), 0
    linear = -(-setup.shape.linear_parameters // setup.shards)
    constants = round(CONSTANT_BYTES * setup.shape.linear_parameters)
    return linear // 2 + width * (_on_a_card(setup) - linear), constants


def _gathered(setup: Setup) -> int:
    """Layers that are whole for a moment: the one at work, the next on its way, and the buffer it comes through."""
    if not setup.sharded:
        return 0
    width = 0.5 if setup.method == "qlora" else setup.compute_bytes
    return round(GATHERED * width * setup.shape.linear_parameters / setup.shape.layers)


def _optimizer_bytes(setup: Setup) -> int:
    """Two moments, of 4 bytes each or of one."""
    return 2 if setup.optimizer == "adamw_8bit" else 8


def kept_per_token(setup: Setup) -> int:
    """Bytes that autograd keeps of one token in one layer for its backward pass, attention's statistics left out.

    Counted in the layers' code. Unsloth's fused kernels keep the inputs of norms (2h) and of projections (2h), query
    and attention's result (2q), key and value (2k), gate and up (2i). transformers and peft keep the norms' float32
    copies (2h of 4 bytes), an input of each adapted projection (3h, q, 2h, i), query and result (2q), key and value
    (2k), and gate, its activation and up (3i).
    """
    shape, width = setup.shape, setup.compute_bytes
    h, q, k, i = shape.hidden, shape.query_width, shape.key_width, shape.intermediate
    matrices = 2 if shape.gated else 1
    if setup.method == "full":  # one input, in the products' width, for all projections that read it
        return 2 * 4 * h + width * (2 * h + 3 * q + 2 * k + (matrices + 2) * i)
    if setup.backend == "unsloth":
        return width * (4 * h + 2 * q + 2 * k + matrices * i)
    sides = shape.sides()
    inputs = sum(sides[name][0] for name in set(setup.targets) if name in sides)
    return 2 * 4 * h + width * (inputs + 2 * q + 2 * k + (matrices + 1) * i)


def _boundaries(setup: Setup, work: Workload) -> int:
    return setup.shape.layers * work.tokens * setup.shape.hidden * setup.compute_bytes


def _attention(setup: Setup, work: Workload) -> int:
    """Of one layer: a float32 a head and token with fused kernels; the whole square (scores, softmax) without."""
    statistics = 4 * setup.shape.heads * work.tokens
    if not setup.eager_attention:
        return statistics
    return setup.shape.heads * work.tokens * work.length * (4 + 2 * setup.compute_bytes)


def _logits(setup: Setup, work: Workload) -> int:
    """`model`: transformers' own loss over every token. `chunked`: the trainers', over the scored tokens, whose logits
    are made a chunk at a time and of which only hidden states and their gradient stay."""
    vocabulary, width = setup.shape.vocabulary, setup.compute_bytes
    if setup.loss == "model":
        if setup.backend == "unsloth":
            return 0  # fused and in chunks that are small beside a layer's workspace
        return work.tokens * vocabulary * (2 * width + 2 * 4)
    state = setup.shape.hidden * width
    chunk = min(work.scored, max(LOSS_CHUNK // (4 * vocabulary) // LOSS_TILE, 1) * LOSS_TILE)
    # Logits, log-probabilities and the slope; for KL also the base's, and the products of both.
    copies = 2 * width + (4 * 4 + width if work.replay_scored else 4)
    return 2 * state * work.scored + chunk * vocabulary * copies


def _held_states(setup: Setup, work: Workload) -> int:
    return min(HELD_STATES, work.ahead * 2 * setup.shape.hidden * work.replay_scored)


def _layer_workspace(setup: Setup, work: Workload) -> int:
    """Gradients in flight in one layer's backward pass, and the largest matrix: of NF4 unpacked into the products'
    width; of a full fine-tune the changed weight, in float32 and in that width, and its gradient in both."""
    shape, width = setup.shape, setup.compute_bytes
    in_flight = work.tokens * width * (3 * shape.hidden + 2 * shape.intermediate)
    matrix = {"qlora": width, "lora": 0, "full": 2 * (4 + width)}[setup.method]
    return in_flight + matrix * shape.largest_linear


def _framework(setup: Setup, comes_and_goes: int) -> int:
    if setup.device == "cpu":
        return HOST_LIBRARIES + round(HOST_FRAGMENTS * comes_and_goes)
    return CUDA_CONTEXT + (NCCL_BUFFERS if setup.gpus > 1 else 0) + round(FRAGMENTS * comes_and_goes)
