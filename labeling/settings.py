"""Settings of the review queue and of Label Studio. Values only; `service.settings` reads files and the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator


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


class LabelingSettings(Strict):
    """Per project: how flags become labels."""

    held_out_share: float = Field(
        0.2, ge=0, lt=1, description="Share of review items labelled but never trained on, by hash"
    )
    annotations_per_item: int = Field(1, ge=1, le=5, description="How many people must label an item")
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
    poll_seconds: float = Field(30.0, ge=0.2, le=3600, description="Between two looks at Label Studio")
    metrics: dict[str, MetricSettings] = Field(
        default_factory=dict, description="TensorZero's metrics whose range is not 0..1, or whose low values are good"
    )
    sweep_seconds: float = Field(
        600.0, ge=1, le=86_400, description="Between two full comparisons of task and annotation ids"
    )
