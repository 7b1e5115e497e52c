"""The command line: parses, then imports the one module that does the work, which keeps `--help` instant."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from importlib import import_module
from logging import WARNING
from pathlib import Path
from typing import Annotated, Any

import typer

from labeling.errors import NightschoolError

SettingsPath = Annotated[Path, typer.Option("--settings", "-s", help="The installation's nightschool.toml.")]
Project = Annotated[
    str | None, typer.Option("--project", "-p", help="Which project; needed only when there are several.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Why = Annotated[str, typer.Option("--why", help="Stands in the record of promotions.")]
DEFAULT = Path("nightschool.toml")
_own_process = ContextVar("own_process", default=False)  # else a test's, which logs as it wants

app = typer.Typer(
    name="nightschool",
    help="Active-learning continuous fine-tuning: yesterday's flagged answers, right in production tomorrow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
night = typer.Typer(help="Run a night, or see how one went.", no_args_is_help=True)
keys = typer.Typer(help="API keys: made once, shown once, revoked.", no_args_is_help=True)
labels = typer.Typer(help="Labels: accepted, refused, held back; who made them; the screen.", no_args_is_help=True)
gold = typer.Typer(help="Questions with a known answer, slipped among the tasks.", no_args_is_help=True)
feedback = typer.Typer(help="Feedback that waits for its exchange.", no_args_is_help=True)
app.add_typer(night, name="night")
app.add_typer(feedback, name="feedback")
app.add_typer(keys, name="keys")
app.add_typer(labels, name="labels")
model = typer.Typer(help="The base model: fetched once, looked at.", no_args_is_help=True)
app.add_typer(model, name="model")
queue = typer.Typer(
    help="The review queue: what waits, why in that order, what choosing has brought.", no_args_is_help=True
)
app.add_typer(queue, name="queue")
app.add_typer(gold, name="gold")


def main() -> None:
    """Entry point: a user's mistake ends in two lines on stderr and exit code 1, never in a traceback."""
    _own_process.set(True)
    try:
        app()
    except NightschoolError as error:
        print(f"nightschool: {error}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        sys.exit(1)


def _call(where: str, *args: Any, **kwargs: Any) -> None:
    """Standard output is the command's own; warnings go to stderr. A command that runs for long says more there."""
    if _own_process.get():
        import_module("service.logging").configure(json=False, level=WARNING)
    module, _, function = where.partition(":")
    getattr(import_module(f"service.{module}"), function)(*args, **kwargs)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write nightschool.toml.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented nightschool.toml."""
    _call("commands.init:run", folder, force=force)


@app.command()
def doctor(settings: SettingsPath = DEFAULT, as_json: AsJson = False) -> None:
    """Check settings, disk, database, engines, Label Studio, MLflow and archive; say the cure for each trouble."""
    _call("commands.doctor:run", settings, as_json=as_json)


@app.command()
def up(settings: SettingsPath = DEFAULT) -> None:
    """Everything on one machine: managed servers, HTTP and the nightly worker, until Ctrl-C."""
    _call("commands.up:up", settings)


@app.command()
def serve(settings: SettingsPath = DEFAULT) -> None:
    """HTTP only: gateway, feedback, API. Needs PostgreSQL; run `work` beside it."""
    _call("commands.up:serve", settings)


@app.command()
def work(settings: SettingsPath = DEFAULT) -> None:
    """The nightly worker only. Needs PostgreSQL."""
    _call("commands.up:work", settings)


@night.command("run")
def night_run(
    settings: SettingsPath = DEFAULT,
    project: Project = None,
    date: Annotated[str | None, typer.Option(help="YYYY-MM-DD; default: the latest due date.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest FAILED or SKIPPED night.")] = False,
) -> None:
    """Claim a night as the scheduler does and run it to its decision."""
    _call("commands.night:run", settings, project=project, date=date, resume=resume)


@night.command("show")
def night_show(
    night_id: Annotated[str | None, typer.Argument(help="Default: the newest.")] = None,
    settings: SettingsPath = DEFAULT,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """What a night decided, why, what it cost and what to do."""
    _call("commands.night:show", settings, night_id, project=project, as_json=as_json)


@night.command("watch")
def night_watch(settings: SettingsPath = DEFAULT, project: Project = None, as_json: AsJson = False) -> None:
    """Follow the night that runs: stage, step, loss, speed, memory, temperature, time left, alarms."""
    _call("commands.watch:run", settings, project=project, as_json=as_json)


@app.command()
def approve(
    night_id: Annotated[str | None, typer.Argument(help="Default: the one that awaits approval.")] = None,
    settings: SettingsPath = DEFAULT,
    project: Project = None,
    why: Why = "",
) -> None:
    """Promote a passed candidate onto every replica."""
    _call("commands.night:approve", settings, night_id, project=project, why=why)


@app.command()
def refuse(
    night_id: Annotated[str | None, typer.Argument(help="Default: the one that awaits approval.")] = None,
    settings: SettingsPath = DEFAULT,
    project: Project = None,
    why: Why = "",
) -> None:
    """Decline a passed candidate; what serves stays."""
    _call("commands.night:refuse", settings, night_id, project=project, why=why)


@app.command()
def rollback(
    settings: SettingsPath = DEFAULT,
    project: Project = None,
    to: Annotated[str | None, typer.Option(help="Adapter; default: the previous one.")] = None,
    why: Why = "",
) -> None:
    """Serve the previous adapter again, within seconds."""
    _call("commands.night:rollback", settings, project=project, to=to, why=why)


@labels.command("accepted")
def labels_accepted(settings: SettingsPath = DEFAULT, project: Project = None, as_json: AsJson = False) -> None:
    """List accepted labels: what was chosen over what, by whom, how many said so, when."""
    _call("commands.labels:accepted", settings, project=project, as_json=as_json)


@labels.command("annotators")
def labels_annotators(settings: SettingsPath = DEFAULT, project: Project = None, as_json: AsJson = False) -> None:
    """How well each labeller labels: gold questions, agreement with others, what became of it."""
    _call("commands.labels:annotators", settings, project=project, as_json=as_json)


@labels.command("screen")
def labels_screen(
    settings: SettingsPath = DEFAULT,
    project: Project = None,
    restore: Annotated[bool, typer.Option("--restore", help="Put ours back over changes made by hand.")] = False,
) -> None:
    """Whether Label Studio's labelling screen is ours, and whether it can work."""
    _call("commands.labels:screen", settings, project=project, restore=restore)


@labels.command("refused")
def labels_refused(settings: SettingsPath = DEFAULT, project: Project = None, as_json: AsJson = False) -> None:
    """List labels that can't be trained on, and why: the labeller edits the annotation, and it counts."""
    _call("commands.labels:refused", settings, project=project, as_json=as_json)


@labels.command("held")
def labels_held(settings: SettingsPath = DEFAULT, project: Project = None, as_json: AsJson = False) -> None:
    """List labels that a rejected night used."""
    _call("commands.labels:held", settings, project=project, as_json=as_json)


@labels.command("archived")
def labels_archived(settings: SettingsPath = DEFAULT, project: Project = None) -> None:
    """Print the settled tasks that left Label Studio as JSON lines, which it imports again."""
    _call("commands.labels:archived", settings, project=project)


@labels.command("confirm")
def labels_confirm(
    label_ids: Annotated[list[str], typer.Argument(help="Label ids from `labels held`.")],
    settings: SettingsPath = DEFAULT,
    project: Project = None,
) -> None:
    """Let held labels into training again: a person has looked at them."""
    _call("commands.labels:confirm", settings, label_ids, project=project)


@queue.command("report")
def queue_report(settings: SettingsPath = DEFAULT, project: Project = None, as_json: AsJson = False) -> None:
    """Length, age, what caps hold back, and whether items chosen by score beat items drawn at random."""
    _call("commands.queue:report", settings, project=project, as_json=as_json)


@queue.command("next")
def queue_next(
    settings: SettingsPath = DEFAULT,
    project: Project = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The items that come next, and the factors that put them there; a ? marks one that is not known."""
    _call("commands.queue:show_next", settings, project=project, limit=limit, as_json=as_json)


@queue.command("withdraw")
def queue_withdraw(
    items: Annotated[list[str], typer.Argument(help="Ids from `queue next`.", metavar="ITEM...")],
    settings: SettingsPath = DEFAULT,
    project: Project = None,
    reason: Annotated[str, typer.Option(help="Kept with who and when; 500 characters.")] = "",
) -> None:
    """Take items out of the queue, for good: their tasks leave Label Studio, their prompts stay out."""
    _call("commands.queue:withdraw", settings, items, reason=reason, project=project)


@gold.command("add")
def gold_add(
    file: Annotated[Path, typer.Argument(help="JSONL, or a folder of such files.")],
    settings: SettingsPath = DEFAULT,
    project: Project = None,
) -> None:
    """Add gold questions; those that are known already stay one."""
    _call("commands.gold:add", settings, file, project=project)


@gold.command("list")
def gold_list(settings: SettingsPath = DEFAULT, project: Project = None, as_json: AsJson = False) -> None:
    """The gold questions, how often each was asked, and how often answered rightly."""
    _call("commands.gold:show", settings, project=project, as_json=as_json)


@gold.command("retire")
def gold_retire(
    gold_id: Annotated[str, typer.Argument(help="The id from `gold list`.")],
    settings: SettingsPath = DEFAULT,
    project: Project = None,
) -> None:
    """Ask a gold question no more; what was answered counts on."""
    _call("commands.gold:retire", settings, gold_id, project=project)


@model.command("fetch")
def model_fetch(
    what: Annotated[str, typer.Argument(help="owner/name, the URL of a model's page, or a folder.")],
    to: Annotated[Path | None, typer.Option(help="Default: models/NAME.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main.")] = None,
) -> None:
    """Bring a base model into a folder: safetensors, tokenizer, template and licence, verified; no pickles, no code."""
    _call("commands.model:fetch", what, to=to, revision=revision)


@model.command("show")
def model_show(
    folder: Annotated[Path, typer.Argument(help="A base model's folder.")],
    as_json: AsJson = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare with the record.")] = False,
) -> None:
    """What a base model is: source, licence, architecture, parameters, digests."""
    _call("commands.model:show", folder, as_json=as_json, verify=verify)


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Who or what will use it.")],
    scopes: Annotated[str, typer.Option(help="Comma-separated: feedback, inference, read, approve, admin.")],
    settings: SettingsPath = DEFAULT,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Make a key; it is shown this once."""
    _call("commands.keys:create", settings, name, scopes=scopes, project=project, as_json=as_json)


@keys.command("list")
def keys_list(settings: SettingsPath = DEFAULT, as_json: AsJson = False) -> None:
    """Names, scopes and ages; never the keys."""
    _call("commands.keys:show", settings, as_json=as_json)


@keys.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(help="The id from `keys list`.")], settings: SettingsPath = DEFAULT
) -> None:
    """End a key now."""
    _call("commands.keys:revoke", settings, key_id)


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="JSON lines, plain or gzip; a folder or file of an export.")],
    settings: SettingsPath = DEFAULT,
    project: Annotated[
        str | None,
        typer.Option("--project", "-p", help="Where the rows go; rows of an export otherwise stay in theirs."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="nightschool, feedback, tensorzero, openai or langfuse; default: found."),
    ] = None,
    scale: Annotated[
        list[str] | None, typer.Option(help="NAME=WORST:BEST of a rating that is not 0..1, such as stars=1:5.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out ratings of this name.")] = None,
    refused: Annotated[Path | None, typer.Option(help="Write refused lines here instead of on the screen.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check everything, store nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="From line 1, not from where it was broken off.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring in exchanges and feedback from elsewhere; again changes nothing, broken off it goes on where it was."""
    _call(
        "commands.transfer:import_files",
        settings,
        files,
        project=project,
        form=form,
        scale=scale or [],
        skip=skip or [],
        refused=refused,
        dry_run=dry_run,
        restart=restart,
        as_json=as_json,
    )


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="A file (.gz packs it); with parquet a folder.")],
    settings: SettingsPath = DEFAULT,
    project: Annotated[str | None, typer.Option("--project", "-p", help="Only this one's rows.")] = None,
    table: Annotated[list[str] | None, typer.Option(help="Only this table; may be given several times.")] = None,
    form: Annotated[str, typer.Option("--format", help="jsonl or parquet.")] = "jsonl",
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Everything that is known, into a file that `import` reads."""
    _call("commands.export:run", settings, target, project=project, tables=table or [], form=form, force=force)


@feedback.command("unlinked")
def feedback_unlinked(
    settings: SettingsPath = DEFAULT,
    project: Project = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many to show, the oldest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Feedback that names an exchange which never came: what it named, and how old it is."""
    _call("commands.feedback:unlinked", settings, project=project, limit=limit, as_json=as_json)


@app.command()
def plan(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="1B, 3B, 7B, 8B, 13B, 32B, 70B or a model's folder.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Memory of a card, such as 24GiB.")] = "24GiB",
    gpus: Annotated[int | None, typer.Option(min=1, max=64, help="How many such cards.")] = None,
    length: Annotated[int, typer.Option(min=16, max=1_000_000, help="Tokens of the longest row.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Rows of a step.")] = 8,
    method: Annotated[str | None, typer.Option(help="qlora, lora or full.")] = None,
    rank: Annotated[int, typer.Option(min=1, max=512, help="Of the adapter.")] = 16,
    backend: Annotated[str, typer.Option(help="unsloth or peft.")] = "unsloth",
    optimizer: Annotated[str, typer.Option(help="adamw or adamw_8bit.")] = "adamw",
    as_json: AsJson = False,
) -> None:
    """What can be trained on a card, how, how fast, and what would help where it can't; needs no GPU."""
    _call(
        "commands.plan:run",
        model=model or [],
        gpu=gpu,
        gpus=gpus,
        length=length,
        batch=batch,
        method=method,
        rank=rank,
        backend=backend,
        optimizer=optimizer,
        as_json=as_json,
    )


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which bench, or all.")] = "all",
    as_json: AsJson = False,
) -> None:
    """Measure Nightschool against its bars: ratios of two things in one run."""
    _call("commands.bench:run", name, as_json=as_json)


@app.command()
def demo(
    company: Annotated[Path | None, typer.Option(help="A folder like service/demo_company.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the summary JSON here.")] = None,
    leave: Annotated[bool, typer.Option("--exit", help="End when the play is over instead of staying up.")] = False,
    data_dir: Annotated[Path, typer.Option(help="Where the demo keeps its state.")] = Path("demo-data"),
    quantisation: Annotated[str, typer.Option(help="nf4 or none: how night 1 holds the base while it trains.")] = "nf4",
    nights: Annotated[int, typer.Option(min=1, max=2, help="2: also the night with bad labels.")] = 2,
) -> None:
    """One day and two nights on real components, played in front of you."""
    _call(
        "demo.play:run",
        company=company,
        report=report,
        leave=leave,
        data_dir=data_dir,
        quantisation=quantisation,
        nights=nights,
    )


if __name__ == "__main__":
    main()
