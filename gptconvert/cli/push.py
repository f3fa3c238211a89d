"""``gptconvert push``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gptconvert.cli import options
from gptconvert.cli.output import Progress, emit, human_bytes, note, print_json, table
from gptconvert.errors import printable

if TYPE_CHECKING:
    from gptconvert.push.plan import Upload
    from gptconvert.push.upload import Pushed

REPOSITORY, CARD = "Repository", "Model card"
EPILOG = """\b
The token comes from HF_TOKEN or `hf auth login`, the server from HF_ENDPOINT.
README.md and its line in SHA256SUMS may differ from the local files.

\b
Examples:
  gptconvert push out org/name --dry-run
  gptconvert push out org/name --license mit --base-model org/base
  gptconvert push out org/name --branch v2 --tag v2.0
"""


@click.command(cls=options.Command, epilog=EPILOG)
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.argument("repo", metavar="REPO")
@options.own(
    "--branch",
    metavar="NAME",
    group=REPOSITORY,
    default_text="a new pull request",
    help="Upload to this branch, created from main if it does not exist.",
)
@options.own("--pr", type=click.IntRange(1), metavar="N", group=REPOSITORY, help="Continue pull request N.")
@options.own("--tag", metavar="NAME", group=REPOSITORY, help="Tag the last commit once everything is uploaded.")
@options.own("--private", is_flag=True, group=REPOSITORY, help="Create the repository as private.")
@options.own(
    "--message",
    metavar="TEXT",
    group=REPOSITORY,
    default_text="the formats and version",
    help="Title of the pull request and the commits.",
)
@options.own(
    "--license",
    metavar="ID",
    group=CARD,
    default_text="the source's",
    help="Licence, by its identifier on the hub, such as mit.",
)
@options.own(
    "--base-model",
    metavar="REPO",
    group=CARD,
    default_text="the source, if from the hub",
    help="Repository of the model that was converted.",
)
@options.own("--dry-run", is_flag=True, group=REPOSITORY, help="Check everything, and show what would be uploaded.")
@options.JSON
@options.QUIET
@options.DEBUG
def push(
    directory: str,
    repo: str,
    branch: str | None,
    pr: int | None,
    tag: str | None,
    private: bool,
    message: str | None,
    license: str | None,  # noqa: A002 (the option's name)
    base_model: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Upload DIR, the output of a verified conversion, to REPO on the Hugging Face hub.

    Every file must match SHA256SUMS, and manifest.json must record that every artifact is verified. The model card
    gets the metadata that it lacks. The files arrive in a pull request, which is a draft until all are there and have
    been compared, or on a branch; the default branch is never written to.
    """
    options.quieten()
    from gptconvert.push.plan import Destination, plan_upload
    from gptconvert.push.upload import Pushed
    from gptconvert.push.upload import push as upload_all

    destination = Destination(repo, branch, pr, tag, private, message)
    stated = {"license": license, "base_model": base_model}
    progress = Progress(quiet or as_json)
    try:
        planned = plan_upload(directory, destination, {k: v for k, v in stated.items() if v is not None}, progress)
        progress.close()
        for text in planned.notes:
            note(text, quiet)
        if not progress.shown:
            _hide_bars()
        pushed = Pushed(planned) if dry_run else upload_all(planned, progress)
    finally:
        progress.close()
    for text in pushed.notes:
        note(text, quiet)
    if as_json:
        print_json({"ok": True, "dry_run": dry_run, **pushed.as_dict()})
    else:
        emit(_plan(planned) if dry_run else _result(pushed))


def _hide_bars() -> None:
    """Switch huggingface_hub's progress bars off: they would be printed on what is not a terminal."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()


def _plan(upload: Upload) -> str:
    """What a dry run prints."""
    destination, count = upload.destination, len(upload.parts)
    where = f"branch {destination.branch}" if destination.branch else f"pull request {destination.pull_request or ''}"
    commits = "1 commit" if count == 1 else f"{count} commits"
    head = f"would upload to {destination.repo}, {where.strip()}, in {commits}: {_amount(upload)}"
    rows = [(printable(path), human_bytes(upload.sizes[path])) for path in upload.paths]
    card = [f"  {printable(key)}: {printable(_text(value))}" for key, value in upload.metadata.items()]
    tag = [f"tag: {destination.tag}"] if destination.tag else []
    return "\n".join([head, table(rows, right=(1,)), *tag, "model card:", *card])


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _amount(upload: Upload) -> str:
    return f"{len(upload.sizes)} files, {human_bytes(sum(upload.sizes.values()))}"


def _result(pushed: Pushed) -> str:
    destination = pushed.upload.destination
    lines = [f"uploaded to {pushed.page}: {_amount(pushed.upload)}", f"  commit {pushed.commits[-1]}"]
    return "\n".join([*lines, *([f"  tag    {destination.tag}"] if destination.tag else [])])
