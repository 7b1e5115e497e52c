"""Finds people's names, in a process of its own: presidio-analyzer over a spaCy pipeline from a local folder.

Started by path, in an environment that holds both and needs nothing of ours: `name_recogniser_child.py FOLDER SECONDS`.
A JSON line on stdin, {"texts": [...]}, is answered by one on stdout, {"names": [[[start, end], ...], ...]}, in turn;
the first line on stdout says what was loaded, or why it was not. Texts go nowhere else. It ends when stdin does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

BATCH = 32
SAMPLE = "Anna Smith wrote to Peter Brown on Monday."
# They have no part in finding names, and cost most of the time.
NOT_NEEDED = (
    *("tagger", "morphologizer", "parser", "senter", "sentencizer", "attribute_ruler"),
    *("lemmatizer", "trainable_lemmatizer", "textcat", "textcat_multilabel"),
)

Names = list[list[tuple[int, int]]]
Finder = Callable[[list[str]], Names]


class Unfit(Exception):
    """The folder holds nothing that finds names."""


def main() -> int:
    folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
    channel = _own_stdout()
    # Ends us even within a library's endless loop, and when our parent is no longer there to do it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    sys.addaudithook(_stay_offline)
    try:
        find, about = _load(folder)
        find([SAMPLE])
    except ImportError as error:
        return _refuse(channel, "missing", f"{error.name or error} is not installed")
    except Exception as error:  # noqa: BLE001 - any library may refuse a folder in its own way; no user's text is known yet
        return _refuse(channel, "unfit", f"{type(error).__name__}: {error}")
    _tell(channel, {"ready": about})
    signal.alarm(0)
    for line in sys.stdin:
        signal.alarm(seconds)
        _tell(channel, _answer(find, line))
        signal.alarm(0)
    return 0


def _own_stdout() -> TextIO:
    """What libraries print goes to stderr, and nothing of it between our lines."""
    channel = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return channel


def _stay_offline(event: str, _arguments: tuple[Any, ...]) -> None:
    if event in {"socket.connect", "socket.getaddrinfo", "socket.sendto"}:
        raise PermissionError("the recogniser of names works offline")


def _load(folder: Path) -> tuple[Finder, dict[str, str]]:
    # Imported here, so that a missing package is an answer; and late, since the two take seconds.
    import spacy
    from presidio_analyzer import AnalyzerEngine, BatchAnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine
    from presidio_analyzer.predefined_recognizers import SpacyRecognizer

    pipeline = spacy.load(folder, exclude=list(NOT_NEEDED))
    engine = SpacyNlpEngine()
    engine.nlp = {pipeline.lang: pipeline}  # its own load() would download what it can't find
    _need_persons(pipeline, engine.ner_model_configuration.model_to_presidio_entity_mapping)
    _drop_idle_vectors(pipeline)
    languages = {"supported_languages": [pipeline.lang]}
    recogniser = SpacyRecognizer(supported_language=pipeline.lang, supported_entities=["PERSON"])
    registry = RecognizerRegistry(recognizers=[recogniser], **languages)
    analyzer = BatchAnalyzerEngine(AnalyzerEngine(registry=registry, nlp_engine=engine, **languages))

    def find(texts: list[str]) -> Names:
        found = analyzer.analyze_iterator(texts, language=pipeline.lang, batch_size=BATCH, entities=["PERSON"])
        return [sorted((one.start, one.end) for one in of_text) for of_text in found]

    meta = pipeline.meta
    return find, {"name": f"{meta['lang']}_{meta['name']}", "version": meta["version"], "spacy": spacy.__version__}


def _need_persons(pipeline: Any, mapping: dict[str, str]) -> None:
    labels = {label for of_pipe in pipeline.pipe_labels.values() for label in of_pipe}
    if not any(mapping.get(label) == "PERSON" for label in labels):
        parts = ", ".join(pipeline.pipe_names) or "nothing"
        raise Unfit(f"the pipeline ({parts}) has no label for persons (PERSON or PER)")


def _drop_idle_vectors(pipeline: Any) -> None:
    """The shared layer, where the part that finds names brings its own."""
    if pipeline.has_pipe("tok2vec") and not pipeline.get_pipe("tok2vec").listening_components:
        pipeline.disable_pipe("tok2vec")


def _answer(find: Finder, line: str) -> dict[str, Any]:
    try:
        return {"names": find(json.loads(line)["texts"])}
    except Exception as error:  # noqa: BLE001 - its message may quote the text: only its kind is told
        return {"error": {"code": "not_read", "message": type(error).__name__}}


def _refuse(channel: TextIO, code: str, message: str) -> int:
    _tell(channel, {"error": {"code": code, "message": message[:2000]}})
    return 1


def _tell(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


if __name__ == "__main__":
    sys.exit(main())
