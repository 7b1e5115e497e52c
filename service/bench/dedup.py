"""How fast near-duplicates are found among many texts, against datasketch's MinHashLSH, and whether all are.

Both get the same texts and do the same: normalise, cut into runs of 5 characters, sketch, index, ask for each text
whether another is like it. Same permutations, bands and rows; datasketch by its fastest documented way
(`MinHash.bulk`, an insertion session). Rounds of both alternate, so that other work on the machine hits both.
"""

from __future__ import annotations

import json
import random
import time
from importlib.resources import files
from typing import Any

from labeling.errors import NotFound
from labeling.near_duplicates import BANDS, PERMUTATIONS, SEED, normalised_prompt, repeated
from labeling.same_question import same_question
from service.bench.figure import Figure, Say
from service.bench.promises import held

SHINGLE = 5
TEXTS = 2_000  # a round
ROUNDS = 5
PLANTED = 0.1  # share of texts that are another one with some slips
SENTENCES = {"question": 1, "with its context": 18}
SLIPS = 0.01  # of the letters of a planted text


def run(say: Say) -> list[Figure]:
    rng = random.Random(1)  # noqa: S311  # texts, no secret
    seen = {name: _measured(sentences, rng, say) for name, sentences in SENTENCES.items()}
    ratio, recall, theirs = seen["with its context"]
    short, short_recall, _ = seen["question"]
    how = f"{PERMUTATIONS} permutations, {BANDS} bands"
    return [
        held("near_duplicates_vs_datasketch", ratio, f"texts of ~500 characters, {how}; of ~30: {short:.1f}"),
        held(
            "near_duplicate_recall",
            recall,
            f"planted pairs found; datasketch {theirs:.4f}; of ~30 characters {short_recall:.4f}. {_folding()}",
        ),
    ]


def _measured(sentences: int, rng: random.Random, say: Say) -> tuple[float, float, float]:
    """The ratio of throughputs, our recall, datasketch's recall."""
    ours = theirs = 0.0
    found = their_found = planted_pairs = 0
    for number in range(ROUNDS + 1):
        texts, planted = _texts(sentences, rng)
        start = time.perf_counter()
        flags = repeated(texts, SHINGLE)
        between = time.perf_counter()
        their_candidates = _datasketch(texts)
        end = time.perf_counter()
        if number == 0:  # caches and imports
            continue
        ours, theirs = ours + between - start, theirs + end - between
        planted_pairs += len(planted)
        # Each pair alone as well: in the crowd, one might be flagged for the sake of a third.
        alone = [repeated([texts[one], texts[other]], SHINGLE)[0] for one, other in planted]
        found += sum(
            bool(pair and flags[one] and flags[other]) for pair, (one, other) in zip(alone, planted, strict=True)
        )
        their_found += sum(other in their_candidates[one] for one, other in planted)
        per_text = (end - between) / TEXTS * 1e6, (between - start) / TEXTS * 1e6
        say(f"dedup: {len(texts[0])} characters: datasketch {per_text[0]:.0f} us a text, ours {per_text[1]:.1f}")
    return theirs / ours, found / planted_pairs, their_found / planted_pairs


def _texts(sentences: int, rng: random.Random) -> tuple[list[str], list[tuple[int, int]]]:
    """Texts made of our replay prompts, each with some words of its own; some are another with slips."""
    prompts = [
        json.loads(line)["prompt"]
        for line in files("loop").joinpath("replay_prompts", "general.jsonl").read_text().splitlines()
    ]
    texts = [f"{_made_up(rng)} {' '.join(rng.choices(prompts, k=sentences))}" for _ in range(TEXTS)]
    planted = []
    for place in range(0, TEXTS, round(2 / PLANTED)):
        texts[place + 1] = _with_slips(texts[place], rng)
        planted.append((place, place + 1))
    return texts, planted


def _made_up(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=12))


def _with_slips(text: str, rng: random.Random) -> str:
    letters = list(text)
    for place in rng.sample(range(len(letters)), max(1, round(SLIPS * len(letters)))):
        letters[place] = rng.choice("abcdefghijklmnopqrstuvwxyz")
    return "".join(letters)


def _datasketch(texts: list[str]) -> list[list[int]]:
    """The candidates of each text."""
    plain = [normalised_prompt(text) for text in texts]
    shingles = [{text[i : i + SHINGLE].encode() for i in range(max(1, len(text) - SHINGLE + 1))} for text in plain]
    library = _library()
    sketches = library.MinHash.bulk(shingles, num_perm=PERMUTATIONS, seed=SEED)
    index = library.MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS))
    with index.insertion_session() as session:
        for key, sketch in enumerate(sketches):
            session.insert(key, sketch, check_duplication=False)
    return [index.query(sketch) for sketch in sketches]


def _library() -> Any:
    try:
        import datasketch  # noqa: PLC0415  # of the extra `bench` only
    except ImportError as error:
        raise NotFound(
            "the bench `dedup` compares with datasketch, which is not installed", hint="Install nightschool[bench]."
        ) from error
    return datasketch


def _folding() -> str:
    """The labelled pairs that review items are folded by."""
    pairs = [
        json.loads(line) for line in files("service").joinpath("bench", "fold_pairs.jsonl").read_text().splitlines()
    ]
    said: dict[str, list[bool]] = {}
    for pair in pairs:
        one, other = ([{"role": "user", "content": pair[key]}] for key in ("one", "other"))
        said.setdefault(pair["relation"], []).append(same_question(one, other))
    wrong, right = said["different"], said["wording"]
    return (
        f"Folding `near`: {sum(wrong)} of {len(wrong)} different merged, {sum(right)} of {len(right)} wordings folded"
    )
