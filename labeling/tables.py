"""Tables from an exchange to an accepted label. Foreign keys point downwards only."""

from __future__ import annotations

from datetime import date as Date
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, Column, Index, Integer, UniqueConstraint, text
from sqlmodel import Field, SQLModel

from labeling.database import UtcDateTime, enum_column, new_id, now


def _json(nullable: bool = False) -> Any:
    return Column(JSON, nullable=nullable)


def _time(nullable: bool = False) -> Any:
    return Column(UtcDateTime, nullable=nullable)


def _some(name: str, *columns: Any, where: str) -> Index:
    """An index of the few rows that a round has something to do with: however many others there are."""
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


# What an installation finds out about a row itself: it is not exported.
OURS_ALONE = "ours alone"


class FeedbackKind(StrEnum):
    FLAG = "flag"
    RATING = "rating"
    COMMENT = "comment"
    CORRECTION = "correction"
    PREFERENCE = "preference"


class ItemState(StrEnum):
    """open -> pushed (a task exists) -> labelled | disputed | withdrawn."""

    OPEN = "open"
    PUSHED = "pushed"
    LABELLED = "labelled"
    DISPUTED = "disputed"
    WITHDRAWN = "withdrawn"


class Chosen(StrEnum):
    """What decides an item's place in the queue: its score, or a draw. By hash of its id, so nobody can choose it."""

    SCORE = "score"
    RANDOM = "random"


class LabelState(StrEnum):
    ACCEPTED = "accepted"
    DISPUTED = "disputed"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"


class Verdict(StrEnum):
    """What the labeller says of the flagged answer; PREFERRED where one of two shown answers was chosen."""

    GOOD = "good"
    WRONG = "wrong"
    CANNOT_TELL = "can't tell"
    UNSAFE = "unsafe"
    PREFERRED = "preferred"


class Exchange(SQLModel, table=True):
    """One request with its answer. `completion_id` is vLLM's; unique per project."""

    __tablename__ = "exchanges"
    __table_args__ = (
        UniqueConstraint("project", "completion_id"),
        # With the time: without it, SQLite reads a project's exchanges by age to find the newest of a request.
        Index("ix_exchanges_request", "project", "request_id", "created_at"),
        Index("ix_exchanges_session", "project", "session_id", "created_at"),
        Index("ix_exchanges_age", "project", "created_at", "id"),
    )
    id: str = Field(primary_key=True, default_factory=lambda: new_id("ex"))
    project: str
    completion_id: str
    request_id: str | None = None
    session_id: str | None = None
    served: str  # the immutable name that answered, `support-bot@v2` or the base's
    messages: list[dict[str, Any]] = Field(sa_column=_json())  # a plain prompt is one user message
    parameters: dict[str, Any] = Field(sa_column=_json())
    answers: list[str] = Field(sa_column=_json())  # one text a choice
    finish_reason: str | None = None
    streamed: bool = False
    key_id: str | None = None
    latency_ms: float = 0.0
    created_at: datetime = Field(default_factory=now, sa_column=_time())


# As text, because a planner takes an index of some rows only where a query says the same in the same words.
READY = "folded_at IS NULL AND held_until IS NULL AND (exchange_id IS NOT NULL OR answer IS NOT NULL)"
HELD = "folded_at IS NULL AND held_until IS NOT NULL"
UNLINKED = "folded_at IS NULL AND exchange_id IS NULL AND answer IS NULL"
SEEKING_SESSION = "folded_at IS NULL AND exchange_id IS NULL AND session_id IS NOT NULL"


class Feedback(SQLModel, table=True):
    """What an app or its user said of one answer; `exchange_id` is set once it is linked."""

    __tablename__ = "feedback"
    __table_args__ = (
        Index("ix_feedback_completion", "project", "completion_id"),
        Index("ix_feedback_request", "project", "request_id"),
        # Of what is not folded: what can be at once, what waits for a day, what waits for its exchange.
        _some("ix_feedback_ready", "project", "created_at", "id", where=READY),
        _some("ix_feedback_held", "project", "held_until", "created_at", "id", where=HELD),
        _some("ix_feedback_unlinked", "project", "created_at", "id", where=UNLINKED),
        _some("ix_feedback_link", "project", "link_at", where="link_at IS NOT NULL"),
        _some("ix_feedback_session", "project", "session_id", where=SEEKING_SESSION),
    )
    id: str = Field(primary_key=True, default_factory=lambda: new_id("fb"))
    project: str
    kind: FeedbackKind = Field(sa_column=enum_column(FeedbackKind))
    exchange_id: str | None = Field(default=None, foreign_key="exchanges.id", index=True)
    completion_id: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    choice: int = 0
    value: Any = Field(default=None, sa_column=_json(nullable=True))  # a rating is 0..1 or a truth; answers as given
    reasons: list[str] = Field(default_factory=list, sa_column=_json())
    severity: float = 0.5  # 0..1
    comment: str | None = None
    reporter: str | None = None  # a pseudonym: labeling.reporters
    tags: dict[str, str] = Field(default_factory=dict, sa_column=_json())
    messages: list[dict[str, Any]] | None = Field(default=None, sa_column=_json(nullable=True))
    answer: str | None = None
    key_id: str | None = None
    created_at: datetime = Field(default_factory=now, sa_column=_time())
    folded_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))  # when the queue was done with it
    entry: str | None = None  # what the entry rules made of it, as `labeling.entry` words it
    held_until: datetime | None = Field(default=None, sa_column=_time(nullable=True))  # a cap: not looked at before
    # When its exchange is looked for; None: not before one comes that it may be about (`labeling.exchanges`).
    link_at: datetime | None = Field(
        default_factory=now, sa_column=Column(UtcDateTime, nullable=True, info={OURS_ALONE: True})
    )
    link_tries: int = Field(default=0, sa_column=Column(Integer, nullable=False, info={OURS_ALONE: True}))


class ReporterSalt(SQLModel, table=True):
    """What a project's reporters are hashed with: made once, never changed."""

    __tablename__ = "reporter_salts"
    project: str = Field(primary_key=True)
    salt: str


class ReviewItem(SQLModel, table=True):
    """One distinct problem. `messages` is its first wording, `answer` the newest flagged answer to that wording.

    Its texts are redacted, and so is all that comes of it: tasks, labels, training rows, exam items.
    """

    __tablename__ = "review_items"
    __table_args__ = (
        UniqueConstraint("project", "prompt_digest", "round"),
        Index("ix_review_items_project", "project", "id"),
        # The next tasks, and how many are open, without reading the others.
        Index("ix_review_items_queue", "project", "state", text("score DESC"), "created_at", "id"),
        Index("ix_review_items_scored", "project", "scored_at"),
        Index("ix_review_items_unmeasured", "project", "uncertainty_tries", "id"),
    )
    id: str = Field(primary_key=True, default_factory=lambda: new_id("it"))
    project: str
    prompt_digest: str
    round: int = 1  # a problem flagged again after its label was trained opens the next round
    messages: list[dict[str, Any]] = Field(sa_column=_json())
    answer: str
    served: str | None = None
    prefilled: str | None = None  # a correction that an app or its user offered
    other_answer: str | None = None  # a preference's chosen answer, shown beside `answer`, the rejected one
    reasons: list[str] = Field(default_factory=list, sa_column=_json())
    redacted: dict[str, int] = Field(default_factory=dict, sa_column=_json())  # kind -> places replaced in its texts
    count: int = 0
    severity: float = 0.5
    chosen: Chosen = Field(default=Chosen.SCORE, sa_column=enum_column(Chosen))
    uncertainty: float | None = None  # 0..1, how unsure the model was of `answer`; None = not known
    uncertainty_tries: int = 0  # `labeling.uncertainty` says what it means
    novelty: float | None = None  # 0..1, distance to what is labelled already; None = not known
    factors: dict[str, float] = Field(default_factory=dict, sa_column=_json())  # what `score` was made of
    score: float = 0.0  # 0..1, the higher the sooner a labeller sees it
    scored_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))  # None: novelty is still to come
    held_out: bool = False  # labelled, but never trained on; set at creation, before anyone labels
    state: ItemState = Field(default=ItemState.OPEN, sa_column=enum_column(ItemState))
    task_id: int | None = Field(default=None, index=True)
    people_wanted: int = 1  # how many different people are to say something
    people_offered: int = 1  # to how many the task is offered, as far as we know
    gold_id: str | None = Field(default=None, foreign_key="gold_questions.id", index=True)  # a test of the labeller
    created_at: datetime = Field(default_factory=now, sa_column=_time())
    pushed_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))


class ItemWithdrawal(SQLModel, table=True):
    """An item that a person took out of the queue: `labeling.withdrawal`."""

    __tablename__ = "item_withdrawals"
    item_id: str = Field(primary_key=True, foreign_key="review_items.id")
    project: str = Field(index=True)
    by: str  # the name of the key
    reason: str = ""
    at: datetime = Field(default_factory=now, sa_column=_time())


class ItemMember(SQLModel, table=True):
    """One feedback folded into an item. `held_out` is the item's, fixed by the hash of the first exchange."""

    __tablename__ = "item_members"
    feedback_id: str = Field(primary_key=True, foreign_key="feedback.id")
    item_id: str = Field(foreign_key="review_items.id", index=True)
    exchange_id: str | None = Field(default=None, foreign_key="exchanges.id", index=True)
    comment: str | None = None  # the feedback's, redacted


class ItemWording(SQLModel, table=True):
    """Which item a prompt belongs to where wordings fold: `item_digest` is the item's own prompt, the first wording."""

    __tablename__ = "item_wordings"
    __table_args__ = (Index("ix_item_wordings_near", "project", "near_key"),)
    project: str = Field(primary_key=True)
    prompt_digest: str = Field(primary_key=True)
    item_digest: str = Field(index=True)
    near_key: int | None = Field(default=None, sa_column=Column(BigInteger, nullable=True))  # QuestionForm.key


class FoldProgress(SQLModel, table=True):
    """How far the items that were there before a kind of folding was switched on are known to it."""

    __tablename__ = "fold_progress"
    project: str = Field(primary_key=True)
    kind: str = Field(primary_key=True)
    item_id: str


class EntryCount(SQLModel, table=True):
    """How many feedback a day's rule or cap has counted. `scope`: reporter, key, item, project, or `left out`."""

    __tablename__ = "entry_counts"
    project: str = Field(primary_key=True)
    day: Date = Field(primary_key=True)  # UTC
    scope: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    count: int = 0


class EntryProgress(SQLModel, table=True):
    """How far a rule has looked through the captured exchanges, whose ids sort by time."""

    __tablename__ = "entry_progress"
    project: str = Field(primary_key=True)
    rule: str = Field(primary_key=True)
    exchange_id: str


class Annotation(SQLModel, table=True):
    """Label Studio's annotation as last seen; (server project, annotation id) is its identity.

    Negative ids: annotations that the server has lost (`labeling.lost_annotations`).
    """

    __tablename__ = "annotations"
    # Who has labelled lately is asked in each pull: `labeling.crew`.
    __table_args__ = (Index("ix_annotations_updated_at", "updated_at"),)
    labelling_project: int = Field(primary_key=True)
    annotation_id: int = Field(primary_key=True)
    item_id: str = Field(foreign_key="review_items.id", index=True)
    annotator: str
    verdict: str | None = None  # a Verdict, when the labeller chose one
    correction: str | None = None
    must_contain: list[str] = Field(default_factory=list, sa_column=_json())
    cancelled: bool = False
    deleted: bool = False
    lead_seconds: float | None = None
    # Tells two annotations of one number apart.
    created_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    updated_at: datetime = Field(sa_column=_time())


class ArchivedTask(SQLModel, table=True):
    """A task that left Label Studio after its label was settled, in the form that Label Studio imports."""

    __tablename__ = "archived_tasks"
    item_id: str = Field(primary_key=True, foreign_key="review_items.id")
    project: str = Field(index=True)
    labelling_project: int
    task_id: int
    task: dict[str, Any] = Field(sa_column=_json())
    archived_at: datetime = Field(default_factory=now, sa_column=_time())


class Label(SQLModel, table=True):
    """The accepted (or refused, with its reason) outcome of an item's annotations; one row an item."""

    __tablename__ = "labels"
    __table_args__ = (Index("ix_labels_changed", "project", "updated_at"), Index("ix_labels_state", "project", "state"))
    item_id: str = Field(primary_key=True, foreign_key="review_items.id")
    id: str = Field(default_factory=lambda: new_id("lb"), unique=True)
    project: str = Field(index=True)
    state: LabelState = Field(sa_column=enum_column(LabelState))
    verdict: Verdict = Field(sa_column=enum_column(Verdict))
    messages: list[dict[str, Any]] = Field(sa_column=_json())  # exactly what the labeller was shown
    flagged_answer: str
    correction: str | None = None
    must_contain: list[str] = Field(
        default_factory=list, sa_column=_json()
    )  # each "a|b": any of these words must stand in a right answer
    held_out: bool = False
    rejected: list[str] = Field(default_factory=list, sa_column=_json())  # shown answers that the correction beats
    annotators: list[str] = Field(default_factory=list, sa_column=_json())  # everybody who spoke
    overlap: int = 1  # how many of them said what the label says
    reason: str | None = None  # why refused or disputed
    accepted_at: datetime = Field(default_factory=now, sa_column=_time())
    updated_at: datetime = Field(default_factory=now, sa_column=_time())


class GoodAnswer(SQLModel, table=True):
    """An exchange that users rated good: the rolling hold-out of answers that must stay good. Redacted."""

    __tablename__ = "good_answers"
    __table_args__ = (UniqueConstraint("project", "prompt_digest"),)
    id: str = Field(primary_key=True, default_factory=lambda: new_id("ga"))
    project: str = Field(index=True)
    prompt_digest: str
    messages: list[dict[str, Any]] = Field(sa_column=_json())
    answer: str
    exchange_id: str | None = Field(default=None, foreign_key="exchanges.id", index=True)
    must_contain: list[str] = Field(
        default_factory=list, sa_column=_json()
    )  # from the rating's tag `must_contain`, when given
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class GoldQuestion(SQLModel, table=True):
    """A question whose right verdict is known, slipped among the tasks to see how well a labeller labels."""

    __tablename__ = "gold_questions"
    id: str = Field(primary_key=True)  # from the content: adding it again changes nothing
    project: str = Field(index=True)
    messages: list[dict[str, Any]] = Field(sa_column=_json())
    answer: str
    other_answer: str | None = None  # a preference: the answer that has to be chosen
    verdict: Verdict = Field(sa_column=enum_column(Verdict))
    correction: str | None = None
    must_contain: list[str] = Field(default_factory=list, sa_column=_json())
    retired: bool = False  # asked no more; what was answered counts on
    created_at: datetime = Field(default_factory=now, sa_column=_time())


class DoubtedAnnotator(SQLModel, table=True):
    """Too often wrong on gold questions: what only this person said waits for a second opinion."""

    __tablename__ = "doubted_annotators"
    project: str = Field(primary_key=True)
    annotator: str = Field(primary_key=True)
    why: str
    since: datetime = Field(default_factory=now, sa_column=_time())


class LabellingProject(SQLModel, table=True):
    """Which Label Studio project holds a project's tasks, and how far its changes were read."""

    __tablename__ = "labelling_projects"
    project: str = Field(primary_key=True)
    server_project: int
    screen: str | None = None  # digest of the labelling screen that we wrote there last
    watermark: datetime | None = Field(default=None, sa_column=_time(nullable=True))  # by the server's clock
    watermark_moved_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))  # by ours
    swept_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))


class ExchangeRetention(SQLModel, table=True):
    """What became of a project's old exchanges: `labeling.retention` writes it, /metrics shows it."""

    __tablename__ = "exchange_retention"
    project: str = Field(primary_key=True)
    deleted: int = 0  # ever
    needed: int = 0  # as old, but kept at the last look because something refers to them
    looked_at: datetime = Field(default_factory=now, sa_column=_time())
