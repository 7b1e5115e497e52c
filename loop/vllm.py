"""Boundary: one vLLM's control plane (load, unload, list, ask, log-probabilities). The data plane is the gateway's.

EngineUnavailable  down, slow, or answering 5xx to a request
AdapterRefused     vLLM will not load it: 500 with the reason in its text
UnknownModel       404: a name that this replica does not serve
RequestRefused     400, 401, 403, 413, 422: the request itself is wrong
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import httpx

from labeling.errors import InvalidInput, NotFound, Refused, Unavailable

T = TypeVar("T")
Message = dict[str, Any]
CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 2.0  # vLLM closes idle connections after 5: ours must be the first to let go
TOKENIZE_CONCURRENCY = 8


class EngineUnavailable(Unavailable):
    code = "engine_unavailable"
    default_hint = "Check that vLLM runs and answers GET /health; `nightschool doctor` looks at each replica."


class AdapterRefused(Refused):
    code = "adapter_refused"
    default_hint = "vLLM's own reason stands in the message; its rank, modules or files do not fit this engine."


class UnknownModel(NotFound):
    code = "unknown_model"
    default_hint = "GET /v1/models of that replica lists what it serves."


class RequestRefused(InvalidInput):
    code = "engine_refused_request"


@dataclass(frozen=True)
class Answer:
    text: str
    seconds: float
    finish_reason: str


@dataclass(frozen=True)
class ServedModel:
    """One line of /v1/models. `root` is the folder as vLLM sees it; `parent` is None for the base."""

    name: str
    root: str
    parent: str | None


class Replica:
    def __init__(
        self, url: str, *, adapter_dir: str = "", api_key: str | None = None, timeout_seconds: float = 300.0
    ) -> None:
        """`adapter_dir`: our adapters folder as that vLLM sees it; empty = the same path as here."""
        self.url = url.rstrip("/")
        self.adapter_dir = adapter_dir
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS)
        # trust_env off: a proxy of the machine must not see prompts.
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=timeout,
            limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def health(self) -> None:
        """EngineUnavailable unless the engine itself, not only its HTTP server, is well."""
        response = await self._send("GET", "/health", timeout=CONNECT_SECONDS)
        if response.status_code != 200:
            raise EngineUnavailable(f"vLLM at {self.url} is not well: {_reason(response)}")

    async def version(self) -> str:
        """Empty where the engine does not say."""
        response = await self._send("GET", "/version", timeout=CONNECT_SECONDS)
        try:
            return str(response.json()["version"]) if response.status_code == 200 else ""
        except (ValueError, KeyError, TypeError):
            return ""

    async def served_models(self) -> list[ServedModel]:
        response = await self._send("GET", "/v1/models")
        if response.status_code != 200:
            self._fail(response, "the list of models")
        try:
            cards = response.json()["data"]
            return [ServedModel(card["id"], card.get("root") or "", card.get("parent")) for card in cards]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineUnavailable(f"{self.url}/v1/models is not vLLM's list of models") from error

    async def models(self) -> list[str]:
        return [model.name for model in await self.served_models()]

    async def sleep(self) -> None:
        """Gives the GPU's memory back until `wake_up`: weights go to the host's memory (level 1), the cache is dropped.

        vLLM has it with --enable-sleep-mode, and over HTTP in its development mode only.
        """
        response = await self._send("POST", "/sleep", params={"level": 1})
        if response.status_code in {404, 405}:
            raise RequestRefused(
                f"vLLM at {self.url} has no sleep mode",
                hint="Start it with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1, its port private; "
                "a managed one: vllm.sleep_mode = true.",
            )
        if response.status_code != 200:
            self._fail(response, "sleep")

    async def wake_up(self) -> None:
        """Awake already is awake; an engine without sleep mode always is."""
        response = await self._send("POST", "/wake_up")
        if response.status_code not in {200, 404, 405}:
            self._fail(response, "wake_up")

    def path_there(self, folder: Path) -> str:
        """An adapter folder's path as this vLLM sees it."""
        return f"{self.adapter_dir.rstrip('/')}/{folder.name}" if self.adapter_dir else str(folder.resolve())

    async def load(self, name: str, folder: Path) -> None:
        """Registers a checked, installed adapter under its immutable name; done already is done.

        Never `load_inplace`: it re-reads the disk on every request (vllm#36373) and keeps old KV-cache blocks (#42125).
        """
        there = self.path_there(folder)
        response = await self._send("POST", "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": there})
        if response.status_code == 200:
            return
        reason = _reason(response)
        if response.status_code == 400 and "already been loaded" in reason:
            await self._same_adapter(name, there)
        elif response.status_code == 404 and "No adapter found" in reason:
            raise AdapterRefused(
                f"vLLM at {self.url} sees no adapter at {there}",
                hint="Set the replica's adapter_dir to our adapters folder as that vLLM sees it.",
            )
        elif response.status_code in {404, 405}:
            raise AdapterRefused(
                f"vLLM at {self.url} has no runtime LoRA loading",
                hint="Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.",
            )
        elif response.status_code in {400, 500}:
            raise AdapterRefused(f"vLLM at {self.url} refuses adapter {name}: {reason}")
        else:
            self._fail(response, f"loading {name}")

    async def unload(self, name: str) -> None:
        """Drain first: requests in flight name it. Unloaded already is done."""
        response = await self._send("POST", "/v1/unload_lora_adapter", json={"lora_name": name})
        if response.status_code not in {200, 404}:
            self._fail(response, f"unloading {name}")

    async def ask(self, served: str, messages: Sequence[Message], *, max_tokens: int, temperature: float = 0) -> Answer:
        started = time.monotonic()
        choice = (
            await self._post(
                "/v1/chat/completions",
                served,
                {"messages": list(messages), "max_tokens": max_tokens, "temperature": temperature},
            )
        )["choices"][0]
        text = choice["message"].get("content") or ""
        return Answer(text, time.monotonic() - started, choice.get("finish_reason") or "")

    async def ask_many(
        self,
        served: str,
        asked: Sequence[Sequence[Message]],
        *,
        max_tokens: int | Sequence[int],
        concurrency: int,
        temperature: float = 0,
    ) -> list[Answer]:
        """Answers in the order asked, of at most so many tokens each; the first failure cancels the rest."""
        gate = asyncio.Semaphore(concurrency)
        limits = [max_tokens] * len(asked) if isinstance(max_tokens, int) else max_tokens

        async def one(messages: Sequence[Message], limit: int) -> Answer:
            async with gate:
                return await self.ask(served, messages, max_tokens=limit, temperature=temperature)

        return await _all([one(messages, limit) for messages, limit in zip(asked, limits, strict=True)])

    async def tokens(self, served: str, messages: Sequence[Message], *, answered: bool = True) -> list[int]:
        """Token ids in the engine's own template; `answered`: the last message is the assistant's whole answer."""
        body = {"messages": list(messages), "add_generation_prompt": not answered}
        return list((await self._post("/tokenize", served, body))["tokens"])

    async def count_tokens(self, served: str, asked: Sequence[Sequence[Message]]) -> list[int]:
        """Of whole conversations, answer and template included."""
        gate = asyncio.Semaphore(TOKENIZE_CONCURRENCY)

        async def one(messages: Sequence[Message]) -> int:
            async with gate:
                return len(await self.tokens(served, messages))

        return await _all([one(messages) for messages in asked])

    async def log_probabilities(self, served: str, prompt: str | Sequence[int]) -> list[float]:
        """Of each prompt token but the first, in nats. Callers send one at a time: batching moves the numbers."""
        body = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        found = (await self._post("/v1/completions", served, body))["choices"][0]["prompt_logprobs"]
        return [float(next(iter(token.values()))["logprob"]) for token in found if token]

    async def _post(self, path: str, served: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._send("POST", path, json={"model": served, **body})
        if response.status_code != 200:
            self._fail(response, f"{path} of model {served!r}")
        try:
            answer = response.json()
        except ValueError as error:
            raise EngineUnavailable(f"vLLM at {self.url} answered {path} with something that is not JSON") from error
        assert isinstance(answer, dict)
        return answer

    async def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return await self._http.request(method, path, **options)
        except httpx.TimeoutException as error:
            raise EngineUnavailable(f"vLLM at {self.url} did not answer {path} in time") from error
        except httpx.TransportError as error:
            raise EngineUnavailable(f"vLLM at {self.url} is not reachable: {error}") from error

    async def _same_adapter(self, name: str, there: str) -> None:
        """An engine that knows the name already must know it for our folder: names are immutable."""
        root = {model.name: model.root for model in await self.served_models()}.get(name)
        if root != there:
            raise AdapterRefused(
                f"vLLM at {self.url} serves {name} from {root}, not from {there}",
                hint="Another installation uses this engine with the same project name: rename one, restart vLLM.",
            )

    def _fail(self, response: httpx.Response, what: str) -> NoReturn:
        """The vendor's error table, for everything but loading."""
        status, reason = response.status_code, _reason(response)
        if status == 404:
            raise UnknownModel(f"vLLM at {self.url} does not know {what}: {reason}")
        if status in {401, 403}:
            raise RequestRefused(
                f"vLLM at {self.url} refused our key for {what}", hint="Set vllm.api_key to vLLM's --api-key."
            )
        if status in {408, 429} or status >= 500:
            raise EngineUnavailable(f"vLLM at {self.url} failed {what} ({status}): {reason}")
        raise RequestRefused(f"vLLM at {self.url} refused {what} ({status}): {reason}")


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """In order; the first failure cancels the rest and is raised itself, not wrapped in a group."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _reason(response: httpx.Response) -> str:
    """vLLM's text, without its JSON wrapping."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:500]
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
