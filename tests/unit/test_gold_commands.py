"""Gold questions, labellers and accepted labels as an operator meets them: the command line over the HTTP API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labeling.gold import UnknownGold
from service.commands import gold, labels
from service.commands.gold import NoGoldFile
from service.commands.local_api import Answered

SETTINGS = """
data_dir = "data"
[label_studio]
url = "http://127.0.0.1:9"
token = "file:token"
[mlflow]
url = "http://127.0.0.1:9"
[[vllm.replicas]]
url = "http://127.0.0.1:9"
[[projects]]
name = "support-bot"
base_dir = "base"
base_name = "base"
"""
GOOD = {"question": "Who founded it?", "answer": "Mina Ruiz.", "verdict": "good"}
PAIR = {"question": "Which?", "chosen": "No.", "rejected": "Yes."}


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("0" * 40, encoding="utf-8")
    path = tmp_path / "nightschool.toml"
    path.write_text(SETTINGS, encoding="utf-8")
    return path


def written(path: Path, *questions: object) -> Path:
    path.write_text("\n".join(json.dumps(one) for one in questions) + "\n\n", encoding="utf-8")
    return path


def test_gold_questions_are_added_listed_and_retired(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a file or a folder; twice is once."""
    folder = tmp_path / "gold"
    folder.mkdir()
    written(folder / "a.jsonl", GOOD)
    written(folder / "b.jsonl", PAIR)
    gold.add(settings, folder, project=None)
    gold.add(settings, folder / "a.jsonl", project=None)
    assert capsys.readouterr().out == (
        "2 gold questions added, 0 known already.\n0 gold questions added, 1 known already.\n"
    )
    gold.show(settings, project=None, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert sorted((row["answer"], row["other_answer"], row["verdict"]) for row in rows) == [
        ("Mina Ruiz.", None, "good"),
        ("Yes.", "No.", "preferred"),
    ]
    gold.retire(settings, rows[0]["id"], project=None)
    gold.show(settings, project=None, as_json=True)
    after = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert [row["retired"] for row in after] == [True, False]
    gold.show(settings, project=None, as_json=False)
    assert rows[0]["id"] in capsys.readouterr().out
    with pytest.raises(Answered) as caught:
        gold.retire(settings, "gq_none", project=None)
    assert caught.value.hint == UnknownGold.default_hint


def test_every_mistake_of_a_gold_file_is_named_and_nothing_is_added(settings: Path, tmp_path: Path) -> None:
    """By file and line, blank lines counted."""
    file = written(tmp_path / "gold.jsonl", GOOD, {**GOOD, "verdict": "maybe"}, PAIR)
    file.write_text(file.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    with pytest.raises(NoGoldFile) as caught:
        gold.add(settings, file, project=None)
    assert all(part in str(caught.value) for part in ("nothing was added", "line 2: ", "line 5 is no JSON"))
    with pytest.raises(NoGoldFile, match="cannot read"):
        gold.add(settings, tmp_path / "none.jsonl", project=None)
    with pytest.raises(NoGoldFile, match="no gold question"):
        gold.add(settings, written(tmp_path / "empty.jsonl"), project=None)


def test_reports_before_anybody_labelled(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said in words, not as an empty table."""
    labels.annotators(settings, project=None, as_json=False)
    labels.accepted(settings, project=None, as_json=False)
    assert capsys.readouterr().out == "Nobody has labelled yet.\nNo label is accepted yet.\n"
    labels.accepted(settings, project=None, as_json=True)
    assert json.loads(capsys.readouterr().out) == []
