"""Vectors of texts: the numpy model computes what transformers computes, the hashed ones need no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from labeling.embeddings import Embedder, HashedNgrams, embedder
from labeling.sentence_model import SentenceModel, SentenceModelUnfit
from service.commands.doctor import examine
from service.settings import Settings
from tests.unit.test_imports import loaded

SPOKEN = "who founded the shop ? when does it open is a b c d e"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *SPOKEN.split()]
TEXTS = ["who founded the shop ?", "when does it open", "", "a b c d e " * 10, "WHO founded the SHOP?", "\ud800 a"]
TINY = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.5,  # far enough from zero that a wrong formula shows
}


def written(folder: Path, kind: str, pooling: str = "mean_tokens") -> Path:
    """A small random model as sentence-transformers lays it out."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors  # noqa: PLC0415
    from tokenizers.models import WordLevel  # noqa: PLC0415
    from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel  # noqa: PLC0415

    known = {"bert": (BertConfig, BertModel), "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel)}
    config, model = known[kind]
    model(config(**TINY)).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder


def by_transformers(folder: Path, texts: list[str], pooling: str) -> np.ndarray:
    import torch  # noqa: PLC0415
    from tokenizers import Tokenizer  # noqa: PLC0415
    from transformers import AutoModel  # noqa: PLC0415

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
    vectors = []
    for text in texts:
        ids = tokenizer.encode(text.encode("utf-8", "replace").decode()).ids
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        pooled = states.mean(0) if pooling == "mean_tokens" else states[0]
        vectors.append((pooled / pooled.norm()).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize(
    ("kind", "pooling"), [("bert", "mean_tokens"), ("bert", "cls_token"), ("xlm-roberta", "mean_tokens")]
)
def test_numpy_computes_what_transformers_computes(tmp_path: Path, kind: str, pooling: str) -> None:
    """To rounding, one text alone or many of different length together, padding and positions included."""
    folder = written(tmp_path / "model", kind, pooling)
    found = embedder(folder)
    expected = by_transformers(folder, [text for text in TEXTS if len(text) < 50], pooling)
    together = found.embed(TEXTS)
    assert together.dtype == np.float32
    short = [row for row, text in enumerate(TEXTS) if len(text) < 50]
    np.testing.assert_allclose(together[short], expected, atol=2e-5)
    np.testing.assert_allclose(np.vstack([found.embed([text]) for text in TEXTS]), together, atol=2e-5)


def test_long_texts_are_cut_where_the_model_ends(tmp_path: Path) -> None:
    """40 positions: what comes behind them changes nothing and breaks nothing."""
    found = embedder(written(tmp_path / "model", "bert"))
    long, longer = found.embed(["a b c d e " * 10, "a b c d e " * 10 + "who founded the shop"])
    np.testing.assert_array_equal(long, longer)


def test_unfit_folders_are_refused_with_the_reason(tmp_path: Path) -> None:
    """At loading: a missing file, another kind of model, weights that do not fit, damaged files."""
    good = written(tmp_path / "good", "bert")
    with pytest.raises(SentenceModelUnfit, match=r"tokenizer\.json missing"):
        SentenceModel(_but(good, tmp_path / "a", "tokenizer.json", None))
    config = json.loads((good / "config.json").read_text())
    changes: list[tuple[dict[str, object], str]] = [
        ({"model_type": "gpt2"}, "type 'gpt2'"),
        ({"hidden_act": "mystery"}, "mystery"),
        ({"num_hidden_layers": 3}, "do not fit"),
        ({"hidden_size": 16}, "no finite vector"),
    ]
    for number, (change, reason) in enumerate(changes):
        with pytest.raises(SentenceModelUnfit, match=reason):
            SentenceModel(_but(good, tmp_path / f"b{number}", "config.json", json.dumps({**config, **change})))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with pytest.raises(SentenceModelUnfit, match="can't be read"):
            SentenceModel(_but(good, tmp_path / f"c-{name}", name, "{damaged"))
    with pytest.raises(SentenceModelUnfit, match="by max"):
        SentenceModel(_but(good, tmp_path / "d", "1_Pooling/config.json", '{"pooling_mode_max_tokens": true}'))


async def test_doctor_tries_the_model(tmp_path: Path) -> None:
    """One finding a folder: its name, or the reason and the cure."""
    good, bad = written(tmp_path / "good", "bert"), tmp_path / "bad"
    projects = [
        {"name": f"p{number}", "base_dir": "/m", "base_name": "b", "labeling": {"embedding_model_dir": folder}}
        for number, folder in enumerate((good, bad, bad))
    ]
    settings = Settings.model_validate({"data_dir": tmp_path / "data", "projects": projects})
    found = [finding for finding in await examine(settings) if finding.name == "embedding_model"]
    assert [finding.level for finding in found] == ["ok", "trouble"]
    assert "32 dimensions" in found[0].detail
    assert "embedding_model_dir" in found[1].cure


def _but(good: Path, folder: Path, name: str, content: str | None) -> Path:
    shutil.copytree(good, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    return folder


def test_hashed_ngrams_put_alike_spelling_close() -> None:
    """Unit length whatever comes in; a spelling mistake is nearer than another question; equal in every process."""
    found: Embedder = HashedNgrams()
    texts = ["How do I reset my password?", "how do i reset my pasword", "Where is the invoice?", "", "?!", "Wie?"]
    vectors = found.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[1] > 0.7
    assert vectors[0] @ vectors[2] < 0.3
    assert found.embed([]).shape == (0, found.dimensions)
    np.testing.assert_array_equal(found.embed(texts), HashedNgrams().embed(texts))


def test_no_torch_is_loaded() -> None:
    """The service embeds in its own process."""
    assert loaded("import labeling.embeddings") & {"torch", "transformers", "huggingface_hub"} == set()
