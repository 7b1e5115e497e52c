"""The tokenizer at work: templates that change a text, ends that are not learnt, text that becomes control."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from loop.preflight.child_results import Audit, audit_path
from loop.trainers.audit import EndNotLearnt, TokensBeyondEmbedding, audit, end_is_learnt, trained_tokens
from loop.trainers.child import load_tokenizer, stop_ids
from loop.trainers.rows import Example, UnfitTemplate, tokenise
from loop.trainers.spec import TrainSpec, read_rows
from tests.bases import TEMPLATE, WORDS, write_base

END = WORDS.index("<end>")


def write_rows(folder: Path, *answers: str) -> None:
    rows = [
        {
            "id": f"l{number}",
            "kind": "label",
            "messages": [{"role": "user", "content": "who founded it"}, {"role": "assistant", "content": answer}],
        }
        for number, answer in enumerate(answers, 1)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def spec_of(folder: Path, *answers: str, own: str | None = None, **base: Any) -> TrainSpec:
    """`base`: of write_base."""
    write_rows(folder, *(answers or ("Ines did", "it did")))
    template = folder / "own.jinja" if own is not None else None
    if template is not None and own is not None:
        template.write_text(own)
    return TrainSpec(
        base_dir=write_base(folder / "base", **base),
        base_name="base",
        base_digest="sha256:0",
        data_dir=folder,
        chat_template=template,
        out_dir=folder / "out",
    )


def audited(folder: Path, spec: TrainSpec) -> Audit:
    audit(spec, folder, cast("Any", None))
    return Audit.model_validate_json(audit_path(folder).read_bytes())


def test_a_sound_tokenizer_is_told(tmp_path: Path) -> None:
    """What engines must repeat is there: the fixed conversations and some of the night's rows, in tokens."""
    found = audited(tmp_path, spec_of(tmp_path))
    assert (found.rows, found.stop_ids, found.warnings, found.differences) == (2, (END,), (), ())
    assert found.rendered[0].tokens[-1] == WORDS.index("<bot>")
    assert found.rendered[-1].messages[-1]["content"] == "it did"
    assert len(found.rendered) == 6


def test_the_projects_template_is_the_one_that_counts(tmp_path: Path) -> None:
    """Instead of the base's, which may be missing."""
    own = TEMPLATE.replace("<user> ", "<after> ")
    found = audited(tmp_path, spec_of(tmp_path, own=own, template=None))
    assert found.rendered[0].tokens[0] == WORDS.index("<after>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template"),
        (
            TEMPLATE.replace("{% if add", "{% if messages|length > 1 %}<after>{% endif %}{% if add")
            .replace("{% for", "{% if messages|length > 1 %}<after>{% endif %}{% for", 1),
            "renders an answered prompt otherwise, from character 1 on",
        ),
        (TEMPLATE.replace("m.content }}", "m.content | lower }}"), "changes the answer 'Ines did' into 'ines did"),
        (TEMPLATE.replace("<end>", ""), "ends no answer with one of the base's stop tokens"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_carry_the_answer_is_refused(tmp_path: Path, template: str | None, said: str) -> None:
    """What is trained would be another text than what is asked and answered."""
    with pytest.raises(UnfitTemplate, match=said) as refused:
        audited(tmp_path, spec_of(tmp_path, template=template))
    assert refused.value.hint


def test_a_template_that_trims_is_told(tmp_path: Path) -> None:
    """Harmless: both sides do it."""
    trimming = TEMPLATE.replace("m.content }}", "m.content | trim }}")
    found = audited(tmp_path, spec_of(tmp_path, " Ines did", "it did", template=trimming))
    assert found.differences == ("the template trims spaces around 1 of 2 answers",)


def test_a_tokenizer_that_grew_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    """transformers adds tokens that only tokenizer_config.json names."""
    added = {"12": {"content": "<tool>", "special": True}}
    with pytest.raises(TokensBeyondEmbedding, match=r"'<tool>' \(12\)"):
        audited(tmp_path, spec_of(tmp_path, rows=12, tokenizer={"added_tokens_decoder": added}))


def test_text_that_becomes_a_control_token_is_named(tmp_path: Path) -> None:
    """An answer that quotes <after> would be trained as that token."""
    found = audited(tmp_path, spec_of(tmp_path, "Ines did", "Ines <after> did"))
    assert found.warnings == ("1 rows hold the text of a control token, which trains as that token: l2 (<after>)",)


def masking_padding_by_id(examples: Sequence[Example], pad_id: int) -> list[list[int]]:
    """What common collators do: with pad = eos, the end of every answer leaves the loss."""
    return [[token for token in row if token != pad_id] for row in trained_tokens(examples, pad_id)]


def covering_padding(examples: Sequence[Example], pad_id: int) -> list[list[int]]:
    return [[*row, pad_id] for row in trained_tokens(examples, pad_id)]


@pytest.mark.parametrize(
    ("trained", "said"),
    [(masking_padding_by_id, "leaves out tokens of the answer, or its end"), (covering_padding, "covers padding")],
)
def test_padding_with_the_end_keeps_the_end_in_the_loss(tmp_path: Path, trained: Any, said: str) -> None:
    """Ours does; one that masks by id, or not at all, is found out."""
    spec = spec_of(tmp_path, "Ines did", "it did it did it", tokenizer={"pad_token": "<end>"})
    tokenizer = load_tokenizer(spec)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == END
    stops = stop_ids(spec.base_dir, tokenizer)
    examples = list(tokenise(read_rows(spec.data_dir), tokenizer, stops, 1024))
    end_is_learnt(examples, stops, END, trained_tokens)
    with pytest.raises(EndNotLearnt, match=said):
        end_is_learnt(examples, stops, END, trained)


def test_without_any_end_nothing_is_trained() -> None:
    """A base whose files name none would talk for ever."""
    with pytest.raises(EndNotLearnt, match="names a token that ends an answer"):
        end_is_learnt([], frozenset(), 0, trained_tokens)
