"""Every table of the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from labeling.database import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Indexes of some rows: name, columns, which.
SOME_FEEDBACK = (
    (
        "ix_feedback_ready",
        ["project", "created_at", "id"],
        "folded_at IS NULL AND held_until IS NULL AND (exchange_id IS NOT NULL OR answer IS NOT NULL)",
    ),
    (
        "ix_feedback_held",
        ["project", "held_until", "created_at", "id"],
        "folded_at IS NULL AND held_until IS NOT NULL",
    ),
    (
        "ix_feedback_unlinked",
        ["project", "created_at", "id"],
        "folded_at IS NULL AND exchange_id IS NULL AND answer IS NULL",
    ),
    ("ix_feedback_link", ["project", "link_at"], "link_at IS NOT NULL"),
    (
        "ix_feedback_session",
        ["project", "session_id"],
        "folded_at IS NULL AND exchange_id IS NULL AND session_id IS NOT NULL",
    ),
)


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("project", sa.String(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("hash"),
    )
    op.create_table(
        "entry_counts",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("project", "day", "scope", "name"),
    )
    op.create_table(
        "entry_progress",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("rule", sa.String(), nullable=False),
        sa.Column("exchange_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("project", "rule"),
    )
    op.create_table(
        "exchanges",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("completion_id", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("session_id", sa.String(), nullable=True),
        sa.Column("served", sa.String(), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("answers", sa.JSON(), nullable=False),
        sa.Column("finish_reason", sa.String(), nullable=True),
        sa.Column("streamed", sa.Boolean(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("latency_ms", sa.Float(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("project", "completion_id"),
    )
    op.create_index("ix_exchanges_age", "exchanges", ["project", "created_at", "id"], unique=False)
    op.create_index("ix_exchanges_request", "exchanges", ["project", "request_id", "created_at"], unique=False)
    op.create_index("ix_exchanges_session", "exchanges", ["project", "session_id", "created_at"], unique=False)
    op.create_table(
        "exchange_retention",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("deleted", sa.Integer(), nullable=False),
        sa.Column("needed", sa.Integer(), nullable=False),
        sa.Column("looked_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("project"),
    )
    op.create_table(
        "doubted_annotators",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("annotator", sa.String(), nullable=False),
        sa.Column("why", sa.String(), nullable=False),
        sa.Column("since", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("project", "annotator"),
    )
    op.create_table(
        "gold_questions",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("answer", sa.String(), nullable=False),
        sa.Column("other_answer", sa.String(), nullable=True),
        sa.Column("verdict", sa.String(length=32), nullable=False),
        sa.Column("correction", sa.String(), nullable=True),
        sa.Column("must_contain", sa.JSON(), nullable=False),
        sa.Column("retired", sa.Boolean(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_gold_questions_project"), "gold_questions", ["project"], unique=False)
    op.create_table(
        "idempotent_answers",
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=False),
        sa.Column("body_digest", sa.String(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "idempotency_key"),
    )
    op.create_table(
        "labelling_projects",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("server_project", sa.Integer(), nullable=False),
        sa.Column("screen", sa.String(), nullable=True),
        sa.Column("watermark", UtcDateTime(), nullable=True),
        sa.Column("watermark_moved_at", UtcDateTime(), nullable=True),
        sa.Column("swept_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("project"),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "nights",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("date", sa.Date(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("hint", sa.String(), nullable=True),
        sa.Column("current", sa.String(), nullable=True),
        sa.Column("candidate", sa.String(), nullable=True),
        sa.Column("approved_by", sa.String(), nullable=True),
        sa.Column("approved_why", sa.String(), nullable=True),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("due_at", UtcDateTime(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("project", "date"),
    )
    op.create_index(op.f("ix_nights_project"), "nights", ["project"], unique=False)
    op.create_table(
        "promotions",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("from_adapter", sa.String(), nullable=False),
        sa.Column("to_adapter", sa.String(), nullable=False),
        sa.Column("by", sa.String(), nullable=False),
        sa.Column("why", sa.String(), nullable=False),
        sa.Column("night_id", sa.String(), nullable=True),
        sa.Column("told", sa.Boolean(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_promotions_project", "promotions", ["project", "at"], unique=False)
    op.create_table(
        "item_wordings",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("prompt_digest", sa.String(), nullable=False),
        sa.Column("item_digest", sa.String(), nullable=False),
        sa.Column("near_key", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("project", "prompt_digest"),
    )
    op.create_index("ix_item_wordings_near", "item_wordings", ["project", "near_key"], unique=False)
    op.create_index(op.f("ix_item_wordings_item_digest"), "item_wordings", ["item_digest"], unique=False)
    op.create_table(
        "fold_progress",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("item_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("project", "kind"),
    )
    op.create_table(
        "reporter_salts",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("salt", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("project"),
    )
    op.create_table(
        "review_items",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("prompt_digest", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("answer", sa.String(), nullable=False),
        sa.Column("served", sa.String(), nullable=True),
        sa.Column("prefilled", sa.String(), nullable=True),
        sa.Column("other_answer", sa.String(), nullable=True),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("redacted", sa.JSON(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("severity", sa.Float(), nullable=False),
        sa.Column("chosen", sa.String(length=32), nullable=False),
        sa.Column("uncertainty", sa.Float(), nullable=True),
        sa.Column("uncertainty_tries", sa.Integer(), nullable=False),
        sa.Column("novelty", sa.Float(), nullable=True),
        sa.Column("factors", sa.JSON(), nullable=False),
        sa.Column("score", sa.Float(), nullable=False),
        sa.Column("scored_at", UtcDateTime(), nullable=True),
        sa.Column("held_out", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=True),
        sa.Column("people_wanted", sa.Integer(), nullable=False),
        sa.Column("people_offered", sa.Integer(), nullable=False),
        sa.Column("gold_id", sa.String(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("pushed_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(
            ["gold_id"],
            ["gold_questions.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("project", "prompt_digest", "round"),
    )
    op.create_index("ix_review_items_project", "review_items", ["project", "id"], unique=False)
    op.create_index(
        "ix_review_items_queue",
        "review_items",
        ["project", "state", sa.text("score DESC"), "created_at", "id"],
        unique=False,
    )
    op.create_index("ix_review_items_scored", "review_items", ["project", "scored_at"], unique=False)
    op.create_index("ix_review_items_unmeasured", "review_items", ["project", "uncertainty_tries", "id"], unique=False)
    op.create_index(op.f("ix_review_items_gold_id"), "review_items", ["gold_id"], unique=False)
    op.create_index(op.f("ix_review_items_task_id"), "review_items", ["task_id"], unique=False)
    op.create_table(
        "serving",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("current", sa.String(), nullable=False),
        sa.Column("previous", sa.String(), nullable=True),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("project"),
    )
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("folder", sa.String(), nullable=True),
        sa.Column("archive", sa.String(), nullable=True),
        sa.Column("base_digest", sa.String(), nullable=False),
        sa.Column("night_id", sa.String(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["night_id"],
            ["nights.id"],
        ),
        sa.PrimaryKeyConstraint("name"),
        sa.UniqueConstraint("project", "version"),
    )
    op.create_index(op.f("ix_adapters_project"), "adapters", ["project"], unique=False)
    op.create_table(
        "annotations",
        sa.Column("labelling_project", sa.Integer(), nullable=False),
        sa.Column("annotation_id", sa.Integer(), nullable=False),
        sa.Column("item_id", sa.String(), nullable=False),
        sa.Column("annotator", sa.String(), nullable=False),
        sa.Column("verdict", sa.String(), nullable=True),
        sa.Column("correction", sa.String(), nullable=True),
        sa.Column("must_contain", sa.JSON(), nullable=False),
        sa.Column("cancelled", sa.Boolean(), nullable=False),
        sa.Column("deleted", sa.Boolean(), nullable=False),
        sa.Column("lead_seconds", sa.Float(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=True),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["item_id"],
            ["review_items.id"],
        ),
        sa.PrimaryKeyConstraint("labelling_project", "annotation_id"),
    )
    op.create_index(op.f("ix_annotations_item_id"), "annotations", ["item_id"], unique=False)
    op.create_index("ix_annotations_updated_at", "annotations", ["updated_at"], unique=False)
    op.create_table(
        "archived_tasks",
        sa.Column("item_id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("labelling_project", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("task", sa.JSON(), nullable=False),
        sa.Column("archived_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["item_id"],
            ["review_items.id"],
        ),
        sa.PrimaryKeyConstraint("item_id"),
    )
    op.create_index(op.f("ix_archived_tasks_project"), "archived_tasks", ["project"], unique=False)
    op.create_table(
        "evidence",
        sa.Column("night_id", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("adapter_digest", sa.String(), nullable=False),
        sa.Column("current", sa.String(), nullable=False),
        sa.Column("current_digest", sa.String(), nullable=False),
        sa.Column("base_digest", sa.String(), nullable=False),
        sa.Column("data_digest", sa.String(), nullable=False),
        sa.Column("tasks_digest", sa.String(), nullable=False),
        sa.Column("passed", sa.Boolean(), nullable=False),
        sa.Column("decision", sa.String(), nullable=False),
        sa.Column("summary", sa.JSON(), nullable=False),
        sa.Column("probe", sa.JSON(), nullable=False),
        sa.Column("report", sa.String(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["night_id"],
            ["nights.id"],
        ),
        sa.PrimaryKeyConstraint("night_id"),
        sa.UniqueConstraint("hash"),
    )
    op.create_table(
        "feedback",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("exchange_id", sa.String(), nullable=True),
        sa.Column("completion_id", sa.String(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("session_id", sa.String(), nullable=True),
        sa.Column("choice", sa.Integer(), nullable=False),
        sa.Column("value", sa.JSON(), nullable=True),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("severity", sa.Float(), nullable=False),
        sa.Column("comment", sa.String(), nullable=True),
        sa.Column("reporter", sa.String(), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=True),
        sa.Column("answer", sa.String(), nullable=True),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("folded_at", UtcDateTime(), nullable=True),
        sa.Column("entry", sa.String(), nullable=True),
        sa.Column("held_until", UtcDateTime(), nullable=True),
        sa.Column("link_at", UtcDateTime(), nullable=True),
        sa.Column("link_tries", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["exchange_id"],
            ["exchanges.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_feedback_completion", "feedback", ["project", "completion_id"], unique=False)
    op.create_index(op.f("ix_feedback_exchange_id"), "feedback", ["exchange_id"], unique=False)
    op.create_index("ix_feedback_request", "feedback", ["project", "request_id"], unique=False)
    for name, columns, where in SOME_FEEDBACK:
        op.create_index(name, "feedback", columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
    op.create_table(
        "good_answers",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("prompt_digest", sa.String(), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("answer", sa.String(), nullable=False),
        sa.Column("exchange_id", sa.String(), nullable=True),
        sa.Column("must_contain", sa.JSON(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["exchange_id"],
            ["exchanges.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("project", "prompt_digest"),
    )
    op.create_index(op.f("ix_good_answers_exchange_id"), "good_answers", ["exchange_id"], unique=False)
    op.create_index(op.f("ix_good_answers_project"), "good_answers", ["project"], unique=False)
    op.create_table(
        "label_uses",
        sa.Column("night_id", sa.String(), nullable=False),
        sa.Column("label_id", sa.String(), nullable=False),
        sa.Column("item_id", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("held", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["night_id"],
            ["nights.id"],
        ),
        sa.PrimaryKeyConstraint("night_id", "label_id"),
    )
    op.create_table(
        "labels",
        sa.Column("item_id", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("verdict", sa.String(length=32), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("flagged_answer", sa.String(), nullable=False),
        sa.Column("correction", sa.String(), nullable=True),
        sa.Column("must_contain", sa.JSON(), nullable=False),
        sa.Column("held_out", sa.Boolean(), nullable=False),
        sa.Column("rejected", sa.JSON(), nullable=False),
        sa.Column("annotators", sa.JSON(), nullable=False),
        sa.Column("overlap", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("accepted_at", UtcDateTime(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["item_id"],
            ["review_items.id"],
        ),
        sa.PrimaryKeyConstraint("item_id"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_labels_changed", "labels", ["project", "updated_at"], unique=False)
    op.create_index(op.f("ix_labels_project"), "labels", ["project"], unique=False)
    op.create_index("ix_labels_state", "labels", ["project", "state"], unique=False)
    op.create_table(
        "night_events",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("night_id", sa.String(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["night_id"],
            ["nights.id"],
        ),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_index(op.f("ix_night_events_night_id"), "night_events", ["night_id"], unique=False)
    op.create_table(
        "night_progress",
        sa.Column("night_id", sa.String(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("line", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["night_id"],
            ["nights.id"],
        ),
        sa.PrimaryKeyConstraint("night_id"),
    )
    op.create_table(
        "stage_markers",
        sa.Column("night_id", sa.String(), nullable=False),
        sa.Column("stage", sa.String(), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("folder", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["night_id"],
            ["nights.id"],
        ),
        sa.PrimaryKeyConstraint("night_id", "stage"),
    )
    op.create_table(
        "item_withdrawals",
        sa.Column("item_id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("by", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["item_id"],
            ["review_items.id"],
        ),
        sa.PrimaryKeyConstraint("item_id"),
    )
    op.create_index(op.f("ix_item_withdrawals_project"), "item_withdrawals", ["project"], unique=False)
    op.create_table(
        "item_members",
        sa.Column("feedback_id", sa.String(), nullable=False),
        sa.Column("item_id", sa.String(), nullable=False),
        sa.Column("exchange_id", sa.String(), nullable=True),
        sa.Column("comment", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(
            ["exchange_id"],
            ["exchanges.id"],
        ),
        sa.ForeignKeyConstraint(
            ["feedback_id"],
            ["feedback.id"],
        ),
        sa.ForeignKeyConstraint(
            ["item_id"],
            ["review_items.id"],
        ),
        sa.PrimaryKeyConstraint("feedback_id"),
    )
    op.create_index(op.f("ix_item_members_exchange_id"), "item_members", ["exchange_id"], unique=False)
    op.create_index(op.f("ix_item_members_item_id"), "item_members", ["item_id"], unique=False)


def downgrade() -> None:
    op.drop_table("fold_progress")
    op.drop_index(op.f("ix_item_wordings_item_digest"), table_name="item_wordings")
    op.drop_index("ix_item_wordings_near", table_name="item_wordings")
    op.drop_table("item_wordings")
    op.drop_index(op.f("ix_item_members_exchange_id"), table_name="item_members")
    op.drop_index(op.f("ix_item_members_item_id"), table_name="item_members")
    op.drop_index(op.f("ix_item_withdrawals_project"), table_name="item_withdrawals")
    op.drop_table("item_withdrawals")
    op.drop_table("item_members")
    op.drop_table("stage_markers")
    op.drop_table("night_progress")
    op.drop_index(op.f("ix_night_events_night_id"), table_name="night_events")
    op.drop_table("night_events")
    op.drop_index(op.f("ix_labels_project"), table_name="labels")
    op.drop_index("ix_labels_state", table_name="labels")
    op.drop_index("ix_labels_changed", table_name="labels")
    op.drop_table("labels")
    op.drop_table("label_uses")
    op.drop_index(op.f("ix_good_answers_exchange_id"), table_name="good_answers")
    op.drop_index(op.f("ix_good_answers_project"), table_name="good_answers")
    op.drop_table("good_answers")
    for name, _, _ in SOME_FEEDBACK:
        op.drop_index(name, table_name="feedback")
    op.drop_index("ix_feedback_request", table_name="feedback")
    op.drop_index(op.f("ix_feedback_exchange_id"), table_name="feedback")
    op.drop_index("ix_feedback_completion", table_name="feedback")
    op.drop_table("feedback")
    op.drop_table("evidence")
    op.drop_index(op.f("ix_archived_tasks_project"), table_name="archived_tasks")
    op.drop_table("archived_tasks")
    op.drop_index("ix_annotations_updated_at", table_name="annotations")
    op.drop_index(op.f("ix_annotations_item_id"), table_name="annotations")
    op.drop_table("annotations")
    op.drop_index(op.f("ix_adapters_project"), table_name="adapters")
    op.drop_table("adapters")
    op.drop_table("serving")
    op.drop_index(op.f("ix_review_items_gold_id"), table_name="review_items")
    op.drop_index(op.f("ix_review_items_task_id"), table_name="review_items")
    op.drop_index("ix_review_items_queue", table_name="review_items")
    op.drop_index("ix_review_items_project", table_name="review_items")
    op.drop_index("ix_review_items_unmeasured", table_name="review_items")
    op.drop_index("ix_review_items_scored", table_name="review_items")
    op.drop_table("review_items")
    op.drop_table("reporter_salts")
    op.drop_index("ix_promotions_project", table_name="promotions")
    op.drop_table("promotions")
    op.drop_index(op.f("ix_nights_project"), table_name="nights")
    op.drop_table("nights")
    op.drop_table("leases")
    op.drop_table("labelling_projects")
    op.drop_table("idempotent_answers")
    op.drop_table("exchange_retention")
    op.drop_index(op.f("ix_gold_questions_project"), table_name="gold_questions")
    op.drop_table("gold_questions")
    op.drop_table("doubted_annotators")
    op.drop_index("ix_exchanges_session", table_name="exchanges")
    op.drop_index("ix_exchanges_request", table_name="exchanges")
    op.drop_index("ix_exchanges_age", table_name="exchanges")
    op.drop_table("exchanges")
    op.drop_table("entry_progress")
    op.drop_table("entry_counts")
    op.drop_table("api_keys")
