"""The chat template in force, the project's own file or the base's: one text, one digest, in trainer, gate and vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from labeling.errors import Conflict, InvalidInput
from loop.adapter_files import BASE_FILES
from loop.digests import digest_bytes, digest_json
from loop.settings import ProjectSettings

OWN_FILE = "chat_template.jinja"
MAX_BYTES = 1_000_000


class BadTemplateFile(InvalidInput):
    code: ClassVar[str] = "bad_template_file"
    default_hint = "projects.chat_template must name a Jinja file, as vLLM's --chat-template takes it."


class TemplateChanged(Conflict):
    code: ClassVar[str] = "template_changed"
    default_hint = "Put the old file back, or start the night anew: `nightschool night run` with another date."


@dataclass(frozen=True)
class ChatTemplate:
    """`source` is where it stands: a file, or `tokenizer_config.json` of the base."""

    text: str
    digest: str
    source: Path


def chat_template(base_dir: Path, own: Path | None = None) -> ChatTemplate | None:
    """`own` before the base's; of the base's, the file before the tokenizer's key, as transformers does. None: none."""
    if own is not None:
        return _template(_text(own), own)
    found = [template for template in of_base(base_dir) if template is not None]
    return found[0] if found else None


def of_base(base_dir: Path) -> tuple[ChatTemplate | None, ChatTemplate | None]:
    """The base's own: from its file, and from its tokenizer's configuration."""
    path, config = base_dir / OWN_FILE, base_dir / "tokenizer_config.json"
    in_file = _template(_text(path), path) if path.is_file() else None
    text = _of_config(config)
    return in_file, _template(text, config) if text else None


def template_digest(project: ProjectSettings) -> str:
    """Empty where there is no template at all."""
    found = chat_template(project.base_dir, project.chat_template)
    return found.digest if found else ""


def answering_digest(project: ProjectSettings, base_digest: str) -> str:
    """Of all that decides the base's answers. The base's digest covers its own template, not the project's."""
    own = project.chat_template
    return base_digest if own is None else digest_json([base_digest, template_digest(project)])


def require_same_template(project: ProjectSettings, digest: str) -> None:
    """TemplateChanged where the file was edited since the preflight: trained in one, nothing is judged in another."""
    now = template_digest(project)
    if digest and now != digest:  # none was recorded by an older release
        raise TemplateChanged(f"the chat template is {now[:19]}… now; this night was trained with {digest[:19]}…")


def tokenizer_folder(base_dir: Path, own: Path | None, folder: Path) -> Path:
    """The base's folder or, with a template of the project's own, one of its tokenizer's files beside that template."""
    if own is None:
        return base_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name in BASE_FILES:
        if name != OWN_FILE and (base_dir / name).is_file():
            (folder / name).write_bytes((base_dir / name).read_bytes())
    (folder / OWN_FILE).write_text(_text(own), encoding="utf-8", newline="")
    return folder


def _template(text: str, source: Path) -> ChatTemplate:
    return ChatTemplate(text, digest_bytes(text.encode()), source)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if len(data) > MAX_BYTES:
            raise BadTemplateFile(f"{path} has {len(data)} bytes, {MAX_BYTES} at most")
        text = data.decode()
    except OSError as error:
        raise BadTemplateFile(f"cannot read the chat template {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadTemplateFile(f"the chat template {path} is not text in UTF-8") from error
    if not text.strip():
        raise BadTemplateFile(f"the chat template {path} is empty")
    return text


def _of_config(path: Path) -> str:
    """A text, or a list of named ones of which `default` counts."""
    try:
        found: Any = json.loads(path.read_bytes()).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return ""
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""
