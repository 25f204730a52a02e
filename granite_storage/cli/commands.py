"""The command line and its commands."""

from __future__ import annotations

from pathlib import Path

import click

from granite_storage import __version__
from granite_storage.cli.doctor import doctor_command
from granite_storage.cli.maintenance import derive_command, gc_command, migrate_command, recover_command, verify_command
from granite_storage.cli.objects import cp_command, ls_command, stat_command
from granite_storage.cli.runtime import Settings


@click.group(name="granite-storage", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--app", envvar="GRANITE_STORAGE_APP", metavar="MODULE:ATTRIBUTE", help="The StorageBinding, or a callable that returns it."
)
@click.option(
    "--app-dir",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path(),
    help="The folder of the module.  [default: the working directory]",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="granite-storage")
@click.pass_context
def command_line(context: click.Context, app: str | None, app_dir: Path, debug: bool) -> None:
    """Maintain the files of an application that uses Granite Storage.

    The result goes to the standard output, everything else to the standard error. Nothing is deleted without --yes or a question.

    \b
    Exit codes:
      0    done, and nothing is wrong
      1    something is wrong or was not done; the result says what
      2    wrong usage, or no terminal to ask on
      3    failed: configuration, database or backend
      130  stopped by Ctrl-C (143 by SIGTERM); run it again to continue
    """  # noqa: D301  # click wants the backspace
    context.obj = Settings(app, app_dir, debug)


for _command in (
    cp_command,
    derive_command,
    doctor_command,
    gc_command,
    ls_command,
    migrate_command,
    recover_command,
    stat_command,
    verify_command,
):
    command_line.add_command(_command)
