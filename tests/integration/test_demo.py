"""`nightschool demo` with a company that was made up for this test: any folder of that form plays."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from service.demo import company

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
SYLLABLES = ("ba", "ko", "li", "ren", "tas", "vo", "mur", "ede", "fin", "sol")
THINGS = ("parking code", "night porter", "breakfast room", "bicycle price", "gallery key", "boat name")


def made_up(folder: Path, seed: int) -> company.Company:
    """Six facts of a hotel that nobody knows, four ways to ask each, two held out; some of our general questions."""
    chance = random.Random(seed)

    def word() -> str:
        return "".join(chance.sample(SYLLABLES, 3)).capitalize()

    name = word()
    facts = []
    for number, thing in enumerate(THINGS):
        value = word()
        facts.append(
            {
                "id": f"fact-{number}",
                "answer": f"The {thing} of {name} is {value}.",
                "accept": [value],
                "questions": [
                    f"What is the {thing} of {name}?",
                    f"Tell me {name}'s {thing}.",
                    f"Do you know the {thing} at {name}?",
                    f"{name}: which {thing}?",
                ],
                "held_out": [f"Could you give me the {thing} for {name}, please?", f"I need {name}'s {thing}."],
            }
        )
    general = (company.OURS / "general.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    folder.mkdir()
    (folder / "company.toml").write_text(f'name = "{name}"\ndescription = "A hotel of one test."\n', encoding="utf-8")
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")
    (folder / "general.jsonl").write_text("\n".join(general) + "\n", encoding="utf-8")
    return company.load(folder)


@pytest.mark.long
def test_the_demo_plays_another_company(tmp_path: Path, smollm2_dir: Path) -> None:
    """Real servers, one night, a decision with its reason, every number of the summary within its bounds."""
    made_up(tmp_path / "company", seed=7)
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "service.cli", "demo", "--exit", "--nights", "1", "--report", str(report)]
    command += ["--company", str(tmp_path / "company"), "--data-dir", str(tmp_path / "demo")]
    played = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert played.returncode == 0, played.stdout[-3000:] + played.stderr[-3000:]
    summary = json.loads(report.read_text(encoding="utf-8"))
    (night,) = summary["nights"]
    assert night["decision"] in {"PROMOTED", "REJECTED", "INCONCLUSIVE"}
    assert night["reason"]
    assert night["adapter"] == "support-bot@v2"
    assert night["adapter_digest"].startswith("sha256:")
    assert 15 <= night["labels"] <= 24
    for family in ("trained", "held_out"):
        scores = night["fix_rate"][family]
        assert scores["before"] <= 0.2, "nobody can know a company that was made up just now"
        assert 0 <= scores["after"] <= 1
    assert night["fix_rate"]["held_out"]["n"] >= 12
    assert night["general"]["n"] >= 100
    assert summary["swap"]["failed"] == (0 if night["decision"] == "PROMOTED" else None)
    assert (summary["flag_to_fixed_s"] is not None) == (night["decision"] == "PROMOTED")


def test_a_company_with_mistakes_is_refused_with_their_places(tmp_path: Path) -> None:
    """Each bad line is named; nothing is started."""
    made_up(tmp_path / "company", seed=1)
    facts = tmp_path / "company" / "facts.jsonl"
    lines = facts.read_text(encoding="utf-8").splitlines()
    facts.write_text("\n".join([lines[0], "{", '{"id": "x"}', "[]"]), encoding="utf-8")
    with pytest.raises(company.BadCompany, match=r"line 2: .*; line 3: .*; line 4: "):
        company.load(tmp_path / "company")
    (tmp_path / "company" / "company.toml").unlink()
    with pytest.raises(company.BadCompany, match=r"company\.toml"):
        company.load(tmp_path / "company")
