"""Near-duplicates among many texts at once: what the exact comparison finds is proposed, whatever lies beside it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling.near_duplicates import NearDuplicates, _shingle_hashes, normalised_prompt, repeated
from loop.digests import read_jsonl

ROOT = Path(__file__).parents[2]
PROMPTS = [row["prompt"] for row in read_jsonl(ROOT / "loop" / "replay_prompts" / "general.jsonl")][:400]


@given(st.text(max_size=80))
def test_normalising_is_the_same_for_every_alphabet(text: str) -> None:
    """Letters and digits of the folded text, other characters as one space; plain ASCII only takes a shorter way."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    expected = " ".join("".join(char if char.isalnum() else " " for char in folded).split())
    assert normalised_prompt(text) == expected


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=()), max_size=12), max_size=6))
def test_any_texts_can_be_looked_through(texts: list[str]) -> None:
    """Empty, short, surrogates: one answer a text, and equal texts are always found."""
    assert len(repeated(texts)) == len(texts)
    assert repeated([*texts, *texts]).all()


@pytest.mark.parametrize("shingle", [3, 5])
def test_texts_do_not_run_into_each_other(shingle: int) -> None:
    """What is cut from many texts together is what is cut from each alone."""
    texts = ["who founded it", "where", "x" * shingle, "éàü wer"]
    alone = np.concatenate([_shingle_hashes([text], shingle) for text in texts])
    np.testing.assert_array_equal(_shingle_hashes(texts, shingle), alone)
    assert len(alone) == sum(len(text) - shingle + 1 for text in texts)
    assert len(set(alone.tolist())) == len(alone), "different runs, different numbers"


def test_all_that_the_exact_comparison_finds_is_proposed() -> None:
    """400 prompts, and each again with a slip in the middle; few of the prompts alone."""
    slips = [f"{text[: len(text) // 2]}x{text[len(text) // 2 :]}" for text in PROMPTS]
    near: NearDuplicates[int] = NearDuplicates(0.75)
    for number, text in enumerate(PROMPTS):
        near.add(number, text)
    found = [number for number, slip in enumerate(slips) if near.find(slip) is not None]
    assert len(found) > 250
    flags = repeated([*PROMPTS, *slips])
    assert all(flags[len(PROMPTS) + number] for number in found)
    assert repeated(PROMPTS[:60]).mean() < 0.6
    assert not repeated(["an orange sunset", "who wrote the book"]).any()
