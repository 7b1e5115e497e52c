"""A small vLLM on a real port, with faults on demand: same paths, ids, error bodies and status codes as vLLM 0.32.

An answer tells which model gave it, and log-probabilities depend on the adapter's bytes (all-zero lora_B: the base's),
so that mixed-up adapters show. Use it in a test's own loop (`async with FakeVllm() as fake`) or as a process
(`python -m tests.fakes.vllm --port 8001`); faults can also be set with POST /faults.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import struct
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from aiohttp import web

MAX_RANK = 16
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, float("inf"))


@dataclass
class Faults:
    """What goes wrong with completions from now on."""

    slow_seconds: float = 0.0  # before the answer
    chunk_seconds: float = 0.0  # between two chunks of a stream
    status: int = 0  # answer with this error
    drop_after_chunks: int | None = None  # cut the connection in mid-stream (0: before the first byte)
    load_has_no_effect: bool = False  # a load answers 200, and the adapter answers as the base
    unhealthy: bool = False
    no_sleep_mode: bool = False  # started without --enable-sleep-mode, or not in development mode


@dataclass(frozen=True)
class Adapter:
    name: str
    path: str
    shift: float  # of every log-probability; 0 = no effect


@dataclass
class Seen:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    aborted: bool = False


class VllmError(Exception):
    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param


def default_answer(model: str, prompt: str) -> str:
    return f"{model} answers: {prompt}"


@dataclass
class FakeVllm:
    base: str = "base"
    port: int = 0
    root: str = "/models/base"
    max_model_len: int = 1024
    version: str = "0.32.0"
    answer: Callable[[str, str], str] = default_answer  # (model, last message or prompt) -> text
    render: Callable[[dict[str, Any]], list[int]] | None = None  # body of /tokenize with messages -> ids; None: by word
    faults: Faults = field(default_factory=Faults)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    running: int = 0
    words: dict[int, str] = field(default_factory=dict)  # token id -> the word that it stood for
    asleep: bool = False
    naps: int = 0
    first_tokens: list[float] = field(default_factory=list)  # seconds of every request so far, for /metrics

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def aborted(self) -> int:
        return sum(seen.aborted for seen in self.seen)

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[_errors], client_max_size=64 * 1024 * 1024)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/version", self._version),
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._complete),
                web.post("/v1/completions", self._complete),
                web.post("/tokenize", self._tokenize),
                web.post("/v1/load_lora_adapter", self._load),
                web.post("/v1/unload_lora_adapter", self._unload),
                web.post("/faults", self._set_faults),
                web.post("/sleep", self._sleep),
                web.post("/wake_up", self._wake_up),
                web.get("/metrics", self._metrics),
            ]
        )
        # A client that hangs up cancels its handler, as vLLM aborts its request.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if self.faults.unhealthy else 200)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    async def _set_faults(self, request: web.Request) -> web.Response:
        known = {f.name for f in fields(Faults)}
        self.faults = Faults(**{key: value for key, value in (await request.json()).items() if key in known})
        return web.json_response({})

    async def _sleep(self, _: web.Request) -> web.Response:
        if self.faults.no_sleep_mode:
            return web.json_response({"detail": "Not Found"}, status=404)
        self.asleep, self.naps = True, self.naps + 1
        return web.Response()

    async def _wake_up(self, _: web.Request) -> web.Response:
        if self.faults.no_sleep_mode:
            return web.json_response({"detail": "Not Found"}, status=404)
        self.asleep = False
        return web.Response()

    async def _metrics(self, _: web.Request) -> web.Response:
        """The one histogram that anybody reads here, in vLLM's form."""
        name = "vllm:time_to_first_token_seconds"
        labels = f'engine="0",model_name="{self.base}"'
        lines = [f"# HELP {name} Histogram of time to first token in seconds.", f"# TYPE {name} histogram"]
        for bound in FIRST_TOKEN_BUCKETS:
            count = sum(seconds <= bound for seconds in self.first_tokens)
            le = "+Inf" if bound == float("inf") else str(bound)
            lines.append(f'{name}_bucket{{{labels},le="{le}"}} {float(count)}')
        lines.append(f"{name}_count{{{labels}}} {float(len(self.first_tokens))}")
        lines.append(f"{name}_sum{{{labels}}} {sum(self.first_tokens)}")
        return web.Response(text="\n".join([*lines, ""]), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _models(self, _: web.Request) -> web.Response:
        base: dict[str, Any] = {"id": self.base, "root": self.root, "parent": None, "max_model_len": self.max_model_len}
        loaded = [
            {"id": a.name, "root": a.path, "parent": self.base, "max_model_len": None} for a in self.adapters.values()
        ]
        common: dict[str, Any] = {"object": "model", "created": int(time.time()), "owned_by": "vllm"}
        return _json({"object": "list", "data": [{**common, **card} for card in [base, *loaded]]})

    async def _load(self, request: web.Request) -> web.Response:
        body = await _object(request)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not name or not path:
            raise VllmError(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if name == self.base:
            raise VllmError(400, "InvalidUserInput", f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.adapters and not body.get("load_inplace"):
            said = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set"
            raise VllmError(400, "InvalidUserInput", f"{said} 'load_inplace' to True.")
        shift = 0.0 if self.faults.load_has_no_effect else _read_adapter(name, Path(path))
        self.adapters[name] = Adapter(name, path, shift)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await _object(request)).get("lora_name")
        if not name:
            raise VllmError(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
        if name not in self.adapters:
            raise VllmError(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await _object(request)
        self.shift_of(body.get("model") or self.base)
        if self.render is not None and "messages" in body:
            tokens = self.render(body)
        else:
            tokens = self.tokens(body["prompt"] if "prompt" in body else _templated(body))
        return _json({"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens, "token_strs": None})

    def tokens(self, text: str) -> list[int]:
        """One a word."""
        found = [zlib.crc32(word.encode()) % 49152 for word in text.split(" ")]
        self.words.update(zip(found, text.split(" "), strict=True))
        return found

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await _object(request)
        seen = Seen(request.path, {k.lower(): v for k, v in request.headers.items()}, body)
        self.seen.append(seen)
        completion = Completion(self, request, body)
        self.running += 1
        try:
            await asyncio.sleep(self.faults.slow_seconds)
            if self.faults.status:
                raise VllmError(self.faults.status, "InternalServerError", "a fault on demand")
            if self.faults.drop_after_chunks == 0 and request.transport:
                request.transport.abort()
            return await completion.stream() if body.get("stream") else _json(completion.whole())
        except (asyncio.CancelledError, ConnectionResetError):
            seen.aborted = True
            raise
        finally:
            self.running -= 1

    def shift_of(self, model: str) -> float:
        """Raises vLLM's own 404 for a name that is not served."""
        if model == self.base:
            return 0.0
        if model not in self.adapters:
            raise VllmError(404, "NotFoundError", f"The model `{model}` does not exist.", "model")
        return self.adapters[model].shift


class Completion:
    """One answer, in chat or in text form."""

    def __init__(self, server: FakeVllm, request: web.Request, body: dict[str, Any]) -> None:
        self.server, self.request, self.body = server, request, body
        self.chat = request.path.endswith("/chat/completions")
        self.model = body.get("model") or server.base
        self.shift = server.shift_of(self.model)
        self.prompt = _prompt(body, self.chat, server.words)
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        self.id = prefix + request.headers.get("X-Request-Id", uuid.uuid4().hex)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 64
        self.tokens = server.answer(self.model, self.prompt).split(" ")
        self.finish = "length" if len(self.tokens) > limit else "stop"
        self.tokens = self.tokens[:limit]

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(index) for index in range(self.body.get("n") or 1)]
        usage = self._usage(len(choices))
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage}

    async def stream(self) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(self.request)
        for count, event in enumerate(self._events(), start=1):
            await response.write(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")
            if self.server.faults.drop_after_chunks == count:
                assert self.request.transport is not None
                self.request.transport.abort()
            await asyncio.sleep(self.server.faults.chunk_seconds)
        await response.write(b"data: [DONE]\n\n")
        return response

    def _events(self) -> list[dict[str, Any]]:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        events = []
        for index in range(self.body.get("n") or 1):
            if self.chat:
                events.append({**head, "choices": [self._delta(index, {"role": "assistant", "content": ""}, None)]})
            for position, token in enumerate(self.tokens):
                text = token if position == 0 else f" {token}"
                finish = self.finish if position == len(self.tokens) - 1 else None
                choice = self._delta(index, {"content": text}, finish) if self.chat else None
                events.append({**head, "choices": [choice or _text_choice(index, text, finish)]})
        if (self.body.get("stream_options") or {}).get("include_usage"):
            events.append({**head, "choices": [], "usage": self._usage(1)})
        return events

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}

    def _choice(self, index: int) -> dict[str, Any]:
        text = " ".join(self.tokens)
        if not self.chat:
            choice = _text_choice(index, text, self.finish)
            return {**choice, "prompt_logprobs": self._prompt_logprobs()}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": self.finish, "stop_reason": None}

    def _delta(self, index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _prompt_logprobs(self) -> list[dict[str, Any] | None] | None:
        if self.body.get("prompt_logprobs") is None:
            return None
        prompt = self.body.get("prompt")
        by_ids = isinstance(prompt, list) and all(isinstance(number, int) for number in prompt)
        numbers: list[int] = list(prompt or []) if by_ids else self.server.tokens(self.prompt)
        return [None, *(_logprob(number, self.server, self.shift) for number in numbers[1:])]

    def _usage(self, choices: int) -> dict[str, int]:
        prompt, answer = len(self.prompt.split()), len(self.tokens) * choices
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _text_choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}


def _logprob(number: int, server: FakeVllm, shift: float) -> dict[str, Any]:
    logprob = -0.5 - number % 997 / 100 + shift
    return {str(number): {"logprob": logprob, "rank": 1, "decoded_token": server.words.get(number, f"#{number}")}}


def _templated(body: dict[str, Any]) -> str:
    turns = [f"<|{m['role']}|> {m['content']}" for m in body.get("messages", [])]
    return " ".join([*turns, *(["<|assistant|>"] if body.get("add_generation_prompt", True) else [])])


def _prompt(body: dict[str, Any], chat: bool, words: dict[int, str]) -> str:
    if not chat:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return " ".join(words.get(number, f"#{number}") for number in prompt)
        first = prompt[0] if isinstance(prompt, list) and prompt else prompt
        if not isinstance(first, str):
            raise VllmError(400, "BadRequestError", "Either prompt or prompt_embeds must be provided.", "prompt")
        return first
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        raise VllmError(400, "BadRequestError", "1 validation error: messages: Field required", "messages")
    return str(messages[-1].get("content", ""))


def _read_adapter(name: str, folder: Path) -> float:
    """What the weights shift; raises what vLLM answers to a folder that it cannot load."""
    weights = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file() or not weights.is_file():
        raise VllmError(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {folder}")
    try:
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        data = weights.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        tensors = json.loads(data[8 : 8 + size])
    except (ValueError, KeyError, struct.error) as error:
        raise VllmError(500, "InternalServerError", f"Loading lora {name} failed: {error}") from error
    if rank > MAX_RANK:
        raise VllmError(500, "InternalServerError", f"LoRA rank {rank} is greater than max_lora_rank {MAX_RANK}.")
    spans = [t["data_offsets"] for key, t in tensors.items() if "lora_B" in key]
    effect = b"".join(data[8 + size + start : 8 + size + end] for start, end in spans)
    return (1 + hashlib.sha256(effect).digest()[0]) / 100 if effect.strip(b"\0") else 0.0


async def _object(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise VllmError(400, "BadRequestError", f"JSON decode error: {error}") from error
    if not isinstance(body, dict):
        raise VllmError(400, "BadRequestError", "Input should be a valid dictionary")
    return body


def _json(body: Any) -> web.Response:
    return web.json_response(body, dumps=lambda value: json.dumps(value, separators=(",", ":")))


@web.middleware
async def _errors(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except VllmError as error:
        body = {"message": str(error), "type": error.kind, "param": error.param, "code": error.status}
        return web.json_response({"error": body}, status=error.status)


async def _serve(base: str, port: int) -> None:
    async with FakeVllm(base=base, port=port) as fake:
        print(fake.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="base")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.base, arguments.port))
