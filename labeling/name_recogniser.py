"""People's names in texts, found by a model in a child process: presidio-analyzer over spaCy, which may import torch.

One child for each model folder, started with the first text and kept; after a crash the next text starts another. It
ends when its stdin does, so also when this process is killed. Whoever asks gets an answer or an error, never "no names"
where nobody looked. Nothing is logged of a text, and the child's own output is thrown away.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from labeling.errors import InvalidInput, NightschoolError, Unavailable

CHILD = Path(__file__).parent / "name_recogniser_child.py"
ENVIRONMENT = ".venv-names"
START_SECONDS = 180.0  # alone 4 s; beside a training run on two cores ten times that
ANSWER_SECONDS = 60.0  # for REQUEST_CHARACTERS, which take 3 s alone
RETRY_SECONDS = 10.0  # after a failed start: whoever asks sooner gets the same answer
PIECE_CHARACTERS = 10_000  # a longer text is read in pieces
REQUEST_CHARACTERS = 50_000
REQUEST_TEXTS = 256
MAX_ANSWER_BYTES = 16 << 20
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD")
GIVEN = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
CURE = (
    "names_model_dir must name the local folder of a spaCy pipeline that finds persons, such as that of "
    "en_core_web_sm (docs/redaction.md); leave it out, and names stay."
)

# Two halves in a row would arrive as one character, and all places behind it be wrong.
_SURROGATE = re.compile("[\ud800-\udfff]")

Ranges = list[tuple[int, int]]
FAILURES: Counter[str] = Counter()  # since this process began, by the error's code


class NameModelUnfit(InvalidInput):
    code: ClassVar[str] = "name_model_unfit"
    default_hint = CURE


class NameRecogniserMissing(InvalidInput):
    code: ClassVar[str] = "name_recogniser_missing"
    default_hint = (
        "Run `make names`, or install the extra nightschool[names] in this environment; leave names_model_dir out, and "
        "names stay."
    )


class NamesUnavailable(Unavailable):
    """The child could not be started."""

    code: ClassVar[str] = "names_unavailable"
    default_hint = (
        "Until it starts, feedback waits and is not folded. It is tried again by itself; the reason stands here."
    )


class NamesNotRead(Unavailable):
    """The child was there, but gave no answer for these texts."""

    code: ClassVar[str] = "names_not_read"
    default_hint = "What these texts belong to waits, and is tried again by itself; others are not held up."


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    about: str = ""

    def ask(self, question: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        """One line out, one line back. Empty where the child ended, hung or wrote no JSON object."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # Killed, it closes both pipes: that ends a write and a read which would wait for ever.
        overdue = threading.Timer(seconds, self.kill)
        overdue.start()
        try:
            if question is not None:
                self.process.stdin.write(json.dumps(question).encode() + b"\n")
                self.process.stdin.flush()
            told = json.loads(self.process.stdout.readline(MAX_ANSWER_BYTES))
        except (OSError, ValueError):
            return {}
        finally:
            overdue.cancel()
        return told if isinstance(told, dict) else {}

    def kill(self) -> None:
        """With whatever it started itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> str:
        """How it ended: a word on its status."""
        self.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return f"signal {-status}" if status < 0 else f"status {status}"


class NameRecogniser:
    """For one model folder. Any thread may ask; one is served at a time."""

    def __init__(
        self,
        model_dir: Path,
        *,
        python: str = "",
        start_seconds: float = START_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._model_dir, self._python = model_dir, python
        self._start_seconds, self._answer_seconds = start_seconds, answer_seconds
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._refused: NightschoolError | None = None
        self._refused_at = 0.0

    def find(self, texts: Sequence[str]) -> list[Ranges]:
        """Of each text, in order, where names stand as the model sees them.

        Raises NameModelUnfit, NameRecogniserMissing, NamesUnavailable or NamesNotRead; each is counted.
        """
        found: dict[str, Ranges] = {text: [] for text in texts if text}
        pieces = [piece for text in found for piece in _pieces(text)]
        try:
            with self._lock:
                for request in _requests(pieces):
                    for piece, ranges in zip(request, self._ask(request), strict=True):
                        found[piece.text] += [(start + piece.offset, end + piece.offset) for start, end in ranges]
        except NightschoolError as error:
            FAILURES[error.code] += 1
            raise
        return [found.get(text, []) for text in texts]

    def check(self) -> str:
        """Starts it, where it does not run; gives the model's name and version, or raises as `find`."""
        with self._lock:
            return self._running().about

    def last_known(self) -> str:
        """As `check`, without waiting for anything: what the latest start said."""
        child, refused = self._child, self._refused
        if refused is not None:
            raise refused
        return child.about if child is not None else "not asked yet"

    def close(self) -> None:
        """At once: who waits for an answer gets an error."""
        if (child := self._child) is not None:
            child.kill()
        with self._lock:
            self._end()

    def _ask(self, request: Sequence[_Piece]) -> list[Ranges]:
        child = self._running()
        told = child.ask({"texts": [piece.characters for piece in request]}, self._answer_seconds)
        if "error" in told:
            raise NamesNotRead(f"the recogniser of names failed on a text: {_message(told)}")
        names = _checked(told.get("names"), request)
        if names is None:
            how = self._end()
            raise NamesNotRead(
                f"the recogniser of names gave no usable answer in {self._answer_seconds:g} s, and was ended ({how})"
            )
        return names

    def _running(self) -> _Child:
        if self._child is not None and self._child.process.poll() is None:
            return self._child
        self._end()
        if self._refused is not None and time.monotonic() - self._refused_at < RETRY_SECONDS:
            raise self._refused
        try:
            self._child = self._start()
        except NightschoolError as error:
            self._refused, self._refused_at = error, time.monotonic()
            raise
        self._refused = None
        return self._child

    def _start(self) -> _Child:
        folder = model_folder(self._model_dir)
        seconds = max(self._start_seconds, self._answer_seconds)
        # Isolated: no file of the working folder or of the user is imported in a package's place.
        command = (self._python or names_python(), "-I", str(CHILD), str(folder), str(int(seconds) + 5))
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a library's warning may quote a text
                env={**{name: os.environ[name] for name in INHERITED if name in os.environ}, **GIVEN},
                start_new_session=True,  # out of reach of our terminal's Ctrl-C, and killed as a whole
            )
        except OSError as error:
            raise NameRecogniserMissing(f"{command[0]} could not be started: {error.strerror}") from None
        child = _Child(process)
        told = child.ask(None, self._start_seconds)
        ready = told.get("ready")
        if isinstance(ready, dict):
            child.about = f"{ready.get('name')} {ready.get('version')} (spaCy {ready.get('spacy')})"
            return child
        how = child.end()
        raise self._not_started(told, how)

    def _not_started(self, told: dict[str, Any], how: str) -> NightschoolError:
        match told.get("error", {}).get("code") if isinstance(told.get("error"), dict) else None:
            case "missing":
                return NameRecogniserMissing(f"names can't be recognised: {_message(told)}")
            case "unfit":
                return NameModelUnfit(f"{self._model_dir} can't be used: {_message(told)}")
        return NamesUnavailable(
            f"the recogniser of names ended ({how}) while it started, or was not ready within {self._start_seconds:g} s"
        )

    def _end(self) -> str:
        child, self._child = self._child, None
        return child.end() if child is not None else ""


@cache
def name_recogniser(model_dir: Path) -> NameRecogniser:
    """One for all projects with the same model; the process's end ends it."""
    _KNOWN.append(NameRecogniser(model_dir))
    return _KNOWN[-1]


_KNOWN: list[NameRecogniser] = []


def close_all() -> None:
    """Those that are asked again start again."""
    for one in _KNOWN:
        one.close()


def names_python() -> str:
    """Of .venv-names beside our environment or the checkout; without one, our own, which may have the packages too."""
    for folder in (Path(sys.prefix).parent, Path(__file__).resolve().parent.parent):
        found = folder / ENVIRONMENT / "bin" / "python"
        if found.exists():
            return str(found)
    return sys.executable


def model_folder(given: Path) -> Path:
    """Where config.cfg lies: the folder itself, or the one that an unpacked or installed model package keeps it in."""
    inner = sorted(given.glob("*/config.cfg")) if (given / "meta.json").is_file() else []
    folder = given if (given / "config.cfg").is_file() or len(inner) != 1 else inner[0].parent
    missing = [name for name in ("config.cfg", "meta.json") if not (folder / name).is_file()]
    if missing:
        raise NameModelUnfit(f"{given} is no spaCy pipeline: {', '.join(missing)} missing")
    return folder


@dataclass(frozen=True)
class _Piece:
    """A part of a text, `offset` characters from its beginning."""

    text: str
    offset: int
    characters: str


def _pieces(text: str) -> Iterator[_Piece]:
    """Cut between lines, else between sentences, else between words: a name is seldom cut, a piece never too long."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            cuts = (text.rfind(mark, end - PIECE_CHARACTERS // 10, end) for mark in ("\n", ". ", " "))
            end = next((cut + 1 for cut in cuts if cut >= 0), end)
        piece = _SURROGATE.sub("\ufffd", text[start:end])
        if any(map(str.isalpha, piece)):
            yield _Piece(text, start, piece)
        start = end


def _requests(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    request: list[_Piece] = []
    characters = 0
    for piece in pieces:
        if request and (len(request) == REQUEST_TEXTS or characters + len(piece.characters) > REQUEST_CHARACTERS):
            yield request
            request, characters = [], 0
        request.append(piece)
        characters += len(piece.characters)
    if request:
        yield request


def _checked(names: Any, request: Sequence[_Piece]) -> list[Ranges] | None:
    """None unless it is one list of places for each piece."""
    if not isinstance(names, list) or len(names) != len(request):
        return None
    checked = []
    for ranges, piece in zip(names, request, strict=True):
        try:
            places = [(start, end) for start, end in ranges]
            fit = all(type(p) is int for both in places for p in both)
            fit = fit and all(0 <= start < end <= len(piece.characters) for start, end in places)
        except (TypeError, ValueError):
            return None
        if not fit:
            return None
        checked.append(places)
    return checked


def _message(told: Mapping[str, Any]) -> str:
    error = told["error"]
    return str(error.get("message")) if isinstance(error, dict) else "no reason given"
