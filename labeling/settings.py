"""Settings of the review queue and of Label Studio. Values only; `service.settings` reads files and the environment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from labeling.redaction.page import Kind
from labeling.redaction.work import UnboundedWork, shortest, steps
from labeling.tables import FeedbackKind

STEPS_PER_CHARACTER = 10_000  # what a pattern of the project's own may cost at one position of a text


def _address(url: str) -> str:
    """An http(s) address, or nothing."""
    parts = urlsplit(url)
    if url and (parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0):
        raise ValueError(f"{url!r} is no address such as http://127.0.0.1:5000")
    return url


ServerUrl = Annotated[str, AfterValidator(_address)]


class Strict(BaseModel):
    """Unknown keys are refused; values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LabelStudioSettings(Strict):
    managed: bool = Field(False, description="Started by `nightschool up` as a child")
    url: ServerUrl = Field("", description="Where an existing server answers; empty when managed")
    token: SecretStr | None = Field(None, description="Legacy or personal access token; made by us when managed")
    username: str = Field("admin@nightschool.local", description="The managed server's first user")
    password: SecretStr | None = Field(None, description="Its password; made by us when missing")
    command: str = Field(
        "", description="label-studio executable; empty = .venv-label-studio beside the checkout, then PATH"
    )
    timeout_seconds: float = Field(30.0, gt=0, le=600)
    webhook_url: ServerUrl = Field(
        "",
        description="Our own address as Label Studio reaches it: labels then count at once, not at the next poll. "
        "Empty: by polling alone, unless managed",
    )

    @model_validator(mode="after")
    def _one_of(self) -> LabelStudioSettings:
        if not self.managed and self.url and self.token is None:
            raise ValueError('token is missing: an existing Label Studio needs `token` ("env:NAME" or "file:PATH")')
        if self.managed and self.url:
            raise ValueError("managed = true and url exclude each other: keep one")
        return self


class MetricSettings(Strict):
    """How values of one of TensorZero's metrics become ratings of 0..1."""

    low: float = Field(0.0, description="Its lowest value")
    high: float = Field(1.0, description="Its highest value")
    optimize: Literal["max", "min"] = Field("max", description="min: low values, or false, are the good ones")

    @model_validator(mode="after")
    def _a_range(self) -> MetricSettings:
        if not self.low < self.high:
            raise ValueError("low must be below high")
        return self


Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=4)]
PerDay = Annotated[int, Field(ge=1, le=1_000_000_000)]


class EntrySettings(Strict):
    """[projects.labeling.entry]: which traffic enters the review queue, and how much of it a day (UTC)."""

    flags: Share = Field(1.0, description="Share of flags that enter, by hash")
    corrections: Share = Field(1.0, description="Share of corrections and preferences that enter, by hash")
    low_ratings: Share = Field(1.0, description="Share of ratings below `low_rating` that enter, by hash")
    everything: Share = Field(0.0, description="Share of all captured exchanges that enter, said of or not, by hash")
    low_log_probability: float | None = Field(
        None,
        le=0,
        ge=-100,
        description="Captured answers whose mean log-probability a token (nats) is below this enter; empty = none",
    )
    low_log_probability_share: Share = Field(
        0.05, description="Share of captured exchanges that are looked at for it, by hash: each costs one request"
    )
    tags: dict[str, str] = Field(
        default_factory=dict, description='Feedback with one of these tags enters whatever it says; "*" = any value'
    )
    leave_out_tags: dict[str, str] = Field(
        default_factory=dict, description='Feedback with one of these tags never enters; "*" = any value'
    )
    reporter_per_day: PerDay | None = Field(500, description="Feedback of one reporter a day that enters; more waits")
    key_per_day: PerDay | None = Field(None, description="Feedback by one API key a day that enters; more waits")
    item_per_day: PerDay | None = Field(None, description="Feedback a day that counts for one review item; more waits")
    project_per_day: PerDay | None = Field(None, description="Feedback a day that enters in all; more waits")


class SelectionSettings(Strict):
    """[projects.labeling.selection]: which item a labeller sees next."""

    random_share: Share = Field(
        0.1, description="Share of items, by hash of their id, whose place is drawn instead of scored: the comparison"
    )
    severity: Weight = Field(1.0, description="Exponent of this factor of the score; 0 = it does not count")
    uncertainty: Weight = Field(1.0, description="As above")
    novelty: Weight = Field(1.0, description="As above")
    traffic: Weight = Field(1.0, description="As above")
    measure_uncertainty: Literal["log_probabilities", "self_consistency", "off"] = Field(
        "log_probabilities", description="How sure the model was of its answer, asked afterwards and never of a client"
    )
    samples: int = Field(4, ge=2, le=32, description="self_consistency: how many answers are drawn again and compared")
    measured_at_once: int = Field(
        8, ge=1, le=1000, description="Items measured at each look, one request at a time, and none while a night works"
    )
    look_seconds: float = Field(30.0, ge=0.2, le=3600, description="Between two looks for items to measure")


def _bounded(regex: str) -> str:
    """A regular expression that finds something, in a time that grows with the text and no faster."""
    try:
        needed, least = steps(regex), shortest(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from None
    except UnboundedWork as error:
        raise ValueError(f"could take for ever on some texts: {error}") from None
    if needed > STEPS_PER_CHARACTER:
        raise ValueError(
            f"could take {needed:,} steps at each character of a text, {STEPS_PER_CHARACTER:,} are allowed: lower the "
            "limits of its repeats, or write them possessive ({1,20}+ gives nothing back)"
        )
    if least == 0:
        raise ValueError("would match nothing at all, everywhere: it must begin with something")
    return regex


class OwnPattern(Strict):
    name: str = Field(
        pattern=r"^[a-z][a-z0-9_]{0,30}$", description="Of the kind; the placeholder is <NAME_1> in capitals"
    )
    regex: Annotated[str, AfterValidator(_bounded)] = Field(
        min_length=1, max_length=2000, description="Python's re; every repeat needs an upper limit"
    )

    @model_validator(mode="after")
    def _own_name(self) -> OwnPattern:
        if self.name in set(Kind):
            raise ValueError(f"{self.name!r} is a built-in kind: choose another name")
        return self


class RedactionSettings(Strict):
    """Per project: what is replaced before a person or a model is shown it."""

    enabled: bool = Field(True, description="false: labellers and models see what users wrote")
    leave_out: tuple[Kind, ...] = Field((), description=f"Kinds not to replace, of: {', '.join(Kind)}")
    keep: tuple[str, ...] = Field(
        (), description="Public values that are no secret, such as your own hotline; @example.com keeps a mail domain"
    )
    patterns: tuple[OwnPattern, ...] = Field((), max_length=50, description="More kinds, by regular expression")
    names_model_dir: Path | None = Field(
        None, description="Local folder of a spaCy pipeline that finds persons; without one, names are not replaced"
    )

    @property
    def names_model(self) -> Path | None:
        """Of the recogniser to ask; None where names are not replaced."""
        return self.names_model_dir if self.enabled and Kind.NAME not in self.leave_out else None

    @model_validator(mode="after")
    def _once(self) -> RedactionSettings:
        names = [pattern.name for pattern in self.patterns]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"pattern names must differ; repeated: {', '.join(repeated)}")
        return self


class RiskySettings(Strict):
    """Which items need `people` whatever the share says. Nothing is risky until you say so."""

    reasons: tuple[str, ...] = Field((), description="Reason codes of its feedback, such as unsafe")
    severity: float | None = Field(None, ge=0, le=1, description="From this severity on")
    tags: tuple[str, ...] = Field((), description='Tags of its feedback: "topic", or "topic=medicine"')
    kinds: tuple[FeedbackKind, ...] = Field((), description="Kinds of its feedback, such as correction")


class OverlapSettings(Strict):
    """Items that several people label, beyond `annotations_per_item`."""

    share: float = Field(0.0, ge=0, le=1, description="Share of all items, drawn by hash")
    people: int = Field(2, ge=2, le=5, description="How many must agree on an item drawn or risky")
    risky: RiskySettings = RiskySettings()


class GoldSettings(Strict):
    """Questions with a known answer among the tasks (`nightschool gold add`)."""

    share: float = Field(0.05, ge=0, le=0.5, description="Share of tasks sent that are gold questions")
    min_accuracy: float = Field(
        0.7, ge=0, le=1, description="Below it, what a labeller alone says waits for a second opinion"
    )
    min_answers: int = Field(5, ge=1, le=1000, description="Gold answers before anybody is judged by them")


class AnnotatorSettings(Strict):
    """What one person alone may put into training; more waits for a second person, or for its turn."""

    labels_per_day: int | None = Field(
        None, ge=1, description="Labels that rest on one person alone, accepted a day (UTC); empty = no limit"
    )
    share_of_delta: float = Field(
        1.0, gt=0, le=1, description="Share of a night's new labels that may rest on one and the same person alone"
    )


class LabelingSettings(Strict):
    """Per project: how flags become labels."""

    held_out_share: float = Field(
        0.2, ge=0, lt=1, description="Share of review items labelled but never trained on, by hash"
    )
    annotations_per_item: int = Field(1, ge=1, le=5, description="How many people must label an item")
    overlap: OverlapSettings = OverlapSettings()
    gold: GoldSettings = GoldSettings()
    annotators: AnnotatorSettings = AnnotatorSettings()
    max_open_tasks: int = Field(500, ge=1, le=100_000, description="Tasks kept in Label Studio at a time")
    fold: Literal["identical", "near"] = Field(
        "identical", description="Which prompts become one review item; docs/folding.md says what each level may merge"
    )
    embedding_model_dir: Path | None = Field(
        None, description="Local folder of a sentence-embedding model (BERT family); without one, hashed n-grams"
    )
    low_rating: float = Field(
        0.5, ge=0, le=1, description="Ratings below enter the queue; those at or above are good answers"
    )
    entry: EntrySettings = EntrySettings()
    selection: SelectionSettings = SelectionSettings()
    poll_seconds: float = Field(30.0, ge=0.2, le=3600, description="Between two looks at Label Studio")
    metrics: dict[str, MetricSettings] = Field(
        default_factory=dict, description="TensorZero's metrics whose range is not 0..1, or whose low values are good"
    )
    keep_exchanges_days: int = Field(
        0,
        ge=0,
        le=36_500,
        description="Older exchanges go, unless feedback or a good answer needs them; 0 = kept for ever",
    )
    sweep_seconds: float = Field(
        600.0, ge=1, le=86_400, description="Between two full comparisons of task and annotation ids"
    )
    archive_after_days: float = Field(
        30.0, ge=0, le=3650, description="Tasks whose label is that long settled leave Label Studio; we keep them"
    )
    archive_above: int = Field(
        1000, ge=0, le=1_000_000, description="Labelled tasks kept in Label Studio; the longest settled leave first"
    )
    redaction: RedactionSettings = RedactionSettings()
