"""The base's folder: weights whole, a tokenizer that fits them, a recipe that can be trained on them. Files only."""

from __future__ import annotations

import asyncio

from loop.adapter_files import read_base_config
from loop.base_weights import read_weights
from loop.chat_template import of_base
from loop.model_record import changed_since_fetched
from loop.preflight.finding import Finding, PreflightFailed
from loop.preflight.look import Look
from loop.tokenizer_files import TokenizerUnfit, harmless, problems, read_tokenizer


async def weights(look: Look) -> list[Finding]:
    """Raises BaseDamaged, with the file that is missing, cut short or never filled."""
    folder = look.spec.base_dir
    found = await asyncio.to_thread(read_weights, folder)
    findings = [
        Finding(f"weights whole: {len(found.files)} files, {found.bytes / 1e9:.2f} GB, {found.parameters:,} parameters")
    ]
    if changed := changed_since_fetched(folder):
        findings.append(
            Finding(
                f"{', '.join(changed)} of {folder} differ from what `nightschool model fetch` brought",
                "Fetch the model again into a new folder, unless the change was yours.",
            )
        )
    return findings


async def trainable(look: Look) -> list[Finding]:
    """A base that is quantised on disk can't be taken to 4 bits again, and has no weights to be trained themselves."""
    quantised = read_base_config(look.spec.base_dir).get("quantization_config")
    if not quantised:
        return []
    method = quantised.get("quant_method", "in some way") if isinstance(quantised, dict) else "in some way"
    told = f"the base is stored quantised ({method})"
    if look.spec.quantisation == "nf4":
        raise PreflightFailed(
            f"{told}: it can't be loaded in 4 bits",
            hint='Use the unquantised model as base, or set trainer.quantisation = "none".',
        )
    if look.spec.finetuning_type == "full":
        raise PreflightFailed(
            f"{told}: its weights can't be trained themselves",
            hint='Use the unquantised model as base, or set trainer.finetuning_type = "lora".',
        )
    return []


async def tokenizer(look: Look) -> list[Finding]:
    """Raises TokenizerUnfit with all that is wrong at once."""
    folder = look.spec.base_dir
    files = await asyncio.to_thread(read_tokenizer, folder)
    two = _two_templates(look)
    if files is None:
        return [Finding("no tokenizer.json: only the tokenizer at work was looked at"), *two]
    base = await asyncio.to_thread(read_weights, folder)
    wrong = problems(files, base.embedding_rows, _vocab_size(look))
    if wrong:
        raise TokenizerUnfit(f"the tokenizer in {folder} does not fit: {'; '.join(wrong)}")
    rows = base.embedding_rows or "unknown"
    summary = Finding(f"tokenizer fits: {len(files.ids)} tokens, {len(files.added)} added ones, {rows} embedding rows")
    return [summary, *[Finding(line) for line in harmless(files, base.embedding_rows)], *two, *_length(look)]


def _vocab_size(look: Look) -> int | None:
    size = read_base_config(look.spec.base_dir).get("vocab_size")
    return size if isinstance(size, int) else None


def _two_templates(look: Look) -> list[Finding]:
    in_file, in_config = of_base(look.spec.base_dir)
    if in_file is None or in_config is None or in_file.digest == in_config.digest:
        return []
    if look.context.project.chat_template is not None:
        return [Finding("the base holds two chat templates; the project's own is used")]
    cure = "Remove the one that you don't mean: older engines read the other."
    return [Finding(f"{in_file.source.name} and {in_config.source.name} hold different chat templates", cure)]


def _length(look: Look) -> list[Finding]:
    known = read_base_config(look.spec.base_dir).get("max_position_embeddings")
    wanted = look.spec.lengths.max_length
    if not isinstance(known, int) or wanted <= known:
        return []
    cure = "Lower trainer.max_length: what is longer than the base was made for trains badly."
    return [Finding(f"trainer.max_length is {wanted}; the base was made for {known} tokens", cure)]
