"""How unsure a model was of answers that were flagged: asked afterwards, in the background, one request at a time.

The engine is the one that examines where that is a replica (`vllm.examination = "replica"`), else the first replica:
an engine started for a handful of numbers would cost more than they do. While a night is claimed, runs or is promoted,
nothing is asked. A client's request is never altered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta

import structlog
from sqlmodel import col, select

from labeling import uncertainty
from labeling.database import insert_or_nothing, now
from labeling.draws import in_share
from labeling.embeddings import embedder
from labeling.entry import UNLIKELY
from labeling.errors import InvalidInput, NotFound
from labeling.sampling import LOW_LOG_PROBABILITY, move_on, next_ids, own_flag
from labeling.tables import Exchange, ReviewItem
from loop.clients import Clients
from loop.examination import BYTES_A_TOKEN
from loop.serving import get_serving
from loop.settings import ProjectSettings
from loop.states import AT_WORK
from loop.tables import Night
from loop.vllm import Message, Replica

log = structlog.get_logger()
LONGEST_NIGHT = timedelta(days=8)
TEMPERATURE = 0.8
ANOTHER_ANSWER = "0"
LONGEST_SAMPLE_TOKENS = 256


async def measure(clients: Clients, project: ProjectSettings) -> int:
    """How many items were measured; raises EngineUnavailable when the engine is away: the next look tries again."""
    settings = project.labeling.selection
    if settings.measure_uncertainty == "off" or await _night_at_work(clients):
        return 0
    items = await uncertainty.next_unmeasured(clients.database, project.name, settings.measured_at_once)
    if not items:
        return 0
    replica = clients.replicas[0]
    served = set(await replica.models())
    current = project.served_name((await get_serving(clients, project.name)).current)
    measured = 0
    for item in items:
        if await _night_at_work(clients):
            break
        name = item.served or current
        value, final = await _of_item(replica, name, item, project) if name in served else (None, True)
        await uncertainty.record(clients.database, item, value, settings, final=final)
        measured += value is not None
    return measured


async def _of_item(
    replica: Replica, served: str, item: ReviewItem, project: ProjectSettings
) -> tuple[float | None, bool]:
    """The value, and whether asking again would be pointless."""
    try:
        if project.labeling.selection.measure_uncertainty == "self_consistency":
            return await _disagreement(replica, served, item, project), True
        mean = await mean_log_probability(replica, served, item.messages, item.answer)
        return (None if mean is None else 1 - math.exp(min(mean, 0.0))), True
    except (InvalidInput, NotFound) as error:  # too long, pictures, an adapter that was unloaded meanwhile
        log.info("uncertainty_not_measured", project=project.name, item=item.id, code=error.code, reason=str(error))
        return None, isinstance(error, InvalidInput)


async def mean_log_probability(replica: Replica, served: str, messages: Sequence[Message], answer: str) -> float | None:
    """Nats a token of the answer, without what the chat template puts around it; None where the answer is empty.

    `1 - exp(this)` is the length-normalised uncertainty of Malinin & Gales (2021).
    """
    if not answer.strip():
        return None
    whole = await replica.tokens(served, _answered(messages, answer))
    start = _shared(whole, await replica.tokens(served, messages, answered=False))
    other = await replica.tokens(served, _answered(messages, ANOTHER_ANSWER))
    end = len(whole) - _shared(whole[:start:-1], other[:start:-1])
    found = (await replica.log_probabilities(served, whole))[max(start - 1, 0) : max(end - 1, 0)]
    return sum(found) / len(found) if found and all(map(math.isfinite, found)) else None


def _answered(messages: Sequence[Message], answer: str) -> list[Message]:
    return [*messages, {"role": "assistant", "content": answer}]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens they begin with in common."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


async def _disagreement(replica: Replica, served: str, item: ReviewItem, project: ProjectSettings) -> float | None:
    """1 less the mean similarity of the answer and answers drawn again."""
    if not item.answer.strip():
        return None
    settings = project.labeling
    tokens = min(len(item.answer.encode()) // BYTES_A_TOKEN + 16, LONGEST_SAMPLE_TOKENS)
    answers = await replica.ask_many(
        served,
        [item.messages] * settings.selection.samples,
        max_tokens=tokens,
        concurrency=1,
        temperature=TEMPERATURE,
    )
    vectors = embedder(settings.embedding_model_dir).embed([item.answer, *(answer.text for answer in answers)])
    return float(1 - (vectors[1:] @ vectors[0]).mean())


async def find_unlikely(clients: Clients, project: ProjectSettings) -> int:
    """How many captured answers of low log-probability entered: the rule `low_log_probability`."""
    entry = project.labeling.entry
    if entry.low_log_probability is None or await _night_at_work(clients):
        return 0
    async with clients.database.write() as session:
        ids = await next_ids(session, project.name, LOW_LOG_PROBABILITY)
    if not ids:
        return 0
    replica = clients.replicas[0]
    served = set(await replica.models())
    looked_at = [one for one in ids if in_share(f"unlikely: {one}", entry.low_log_probability_share)]
    now_measured = looked_at[: project.labeling.selection.measured_at_once]
    entered = 0
    for exchange_id in now_measured:
        if await _night_at_work(clients):
            return entered
        entered += await _enters(clients, replica, project, exchange_id, served)
    if len(now_measured) == len(looked_at):
        async with clients.database.write() as session:
            await move_on(session, project.name, LOW_LOG_PROBABILITY, ids[-1])
    return entered


async def _enters(
    clients: Clients, replica: Replica, project: ProjectSettings, exchange_id: str, served: set[str]
) -> bool:
    async with clients.database.read() as session:
        exchange = await session.get(Exchange, exchange_id)
    threshold = project.labeling.entry.low_log_probability
    low = (
        exchange is not None
        and threshold is not None
        and exchange.served in served
        and await _is_below(replica, exchange, threshold)
    )
    async with clients.database.write() as session:
        if low and exchange is not None:
            await session.execute(insert_or_nothing(session, own_flag(exchange, UNLIKELY)))
        await move_on(session, project.name, LOW_LOG_PROBABILITY, exchange_id)
    return low


async def _is_below(replica: Replica, exchange: Exchange, threshold: float) -> bool:
    try:
        answer = exchange.answers[0] if exchange.answers else ""
        mean = await mean_log_probability(replica, exchange.served, exchange.messages, answer)
    except (InvalidInput, NotFound):
        return False
    return mean is not None and mean < threshold


async def _night_at_work(clients: Clients) -> bool:
    """Of any project: they share the engines. One that is long over, of a project no longer here, is none."""
    async with clients.database.read() as session:
        young = col(Night.created_at) > now() - LONGEST_NIGHT
        nights = select(Night.id).where(col(Night.state).in_(AT_WORK), young).limit(1)
        return (await session.execute(nights)).first() is not None
