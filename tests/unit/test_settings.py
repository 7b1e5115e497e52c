"""One settings file: every mistake in one go, secrets by reference, paths relative to the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from labeling.errors import InvalidInput
from service.settings import Settings, SettingsError, load
from tests.running import settings_for

EXAMPLE = Path(__file__).parents[2] / "service" / "commands" / "nightschool.example.toml"
GOOD = """
data_dir = "data"
[[projects]]
name = "support-bot"
base_dir = "models/base"
base_name = "base"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "nightschool.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_smallest_file(tmp_path: Path) -> None:
    """Defaults are those of one machine: loopback, SQLite in the data directory, relative paths from the file."""
    settings = load(written(tmp_path, GOOD))
    assert settings.http.host == "127.0.0.1"
    assert settings.data_dir == tmp_path / "data"
    assert settings.database_url == f"sqlite+aiosqlite:///{tmp_path / 'data' / 'nightschool.db'}"
    assert settings.project("support-bot").base_dir == tmp_path / "models" / "base"


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    """Unknown key, out of bounds, wrong kind, plain secret, missing variable: one error names them all."""
    text = """
        unknown = 1
        http.port = 99999
        http.max_body_bytes = "many"
        database.url = "mysql://x"
        mlflow.password = "hunter2"
        mlflow.url = "localhost:5000"
        vllm.api_key = "env:NIGHTSCHOOL_TEST_IS_NOT_SET"
        object_store.secret_key = "file:not-there"
        [[projects]]
        name = "Support Bot"
        base_dir = "x"
        base_name = "base"
        schedule.time_zone = "Mars"
    """
    with pytest.raises(SettingsError) as caught:
        load(written(tmp_path, text))
    told = str(caught.value)
    places = (
        "unknown",
        "http.port",
        "http.max_body_bytes",
        "database",
        "mlflow.password",
        "mlflow.url",
        "vllm.api_key",
    )
    for place in (*places, "object_store.secret_key", "projects.0.name", "projects.0.schedule.time_zone"):
        assert place in told
    assert "hunter2" not in told


@pytest.mark.parametrize("text", ["", "projects = []", "=", '[[projects]]\nname = "a"', "data_dir = '\\x'\n\xff"])
def test_files_that_are_not_settings(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError):
        load(written(tmp_path, text))


def test_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    """Both say which file, and what to do."""
    with pytest.raises(SettingsError, match=r"nightschool\.toml") as caught:
        load(tmp_path / "nightschool.toml")
    assert "nightschool init" in caught.value.hint
    (tmp_path / "nightschool.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not TOML"):
        load(tmp_path / "nightschool.toml")


def test_secrets_come_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a variable or a file beside the settings; they do not show when printed."""
    monkeypatch.setenv("NIGHTSCHOOL_TEST_TOKEN", "swordfish")
    (tmp_path / "key").write_text("opensesame\n", encoding="utf-8")
    references = 'vllm.api_key = "file:key"\nmlflow.password = "env:NIGHTSCHOOL_TEST_TOKEN"\n'
    settings = load(written(tmp_path, references + GOOD))
    assert settings.vllm.api_key is not None
    assert settings.vllm.api_key.get_secret_value() == "opensesame"
    assert settings.mlflow.password is not None
    assert settings.mlflow.password.get_secret_value() == "swordfish"
    assert "swordfish" not in repr(settings)
    assert "opensesame" not in repr(settings)


def test_projects_must_fit_together() -> None:
    """Distinct names, one base; an unknown one is told with those that there are."""
    with pytest.raises(ValueError, match="must differ"):
        settings_for([], ["a", "a"])
    project = {"name": "a", "base_dir": "/x", "base_name": "x"}
    with pytest.raises(ValueError, match="share one base"):
        Settings.model_validate({"projects": [project, {**project, "name": "b", "base_dir": "/y"}]})
    with pytest.raises(InvalidInput) as caught:
        settings_for([], ["a", "b"]).project("c")
    assert "a, b" in caught.value.hint


def test_example_file_is_valid(tmp_path: Path) -> None:
    """What `nightschool init` writes loads as it stands."""
    load(written(tmp_path, EXAMPLE.read_text(encoding="utf-8")))
