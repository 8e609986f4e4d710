"""The command line as a whole, and how a command ends. Each command imports what it needs when it
runs, so that `plan --help` is instant."""

import errno
import sys
from typing import Any, NoReturn

import click
from click.exceptions import NoArgsIsHelpError

from planner import __version__
from planner.command_line import frameworks, inspection, measurements, plans, runs
from planner.spec.errors import UserError

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class Commands(click.Group):
    """A group whose every failure that a user can mend is one line on stderr and exit code 2,
    without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a newcomer needs them."""
        return list(self.commands)

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        try:
            outcome = super().main(*args, **extra)
        except UserError as error:
            _end(str(error))
        except PermissionError as error:
            _end(
                f"{error.filename}: may not be read or written by this user; check the permissions"
            )
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            _end(f"{error.filename}: the name is too long; choose a shorter one")
        except NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "plan"
            _end(f"{error.format_message()} See '{where} --help'.")
        except click.ClickException as error:
            _end(error.format_message())
        except click.Abort as error:
            _end(str(error.__cause__ or "") or "interrupted", INTERRUPTED)
        sys.exit(outcome if isinstance(outcome, int) else 0)


def _end(message: str, code: int = 2) -> NoReturn:
    click.echo("plan: " + " ".join(message.splitlines()), err=True)
    sys.exit(code)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="splitplan")
def main() -> None:
    """Decide how a PPO job is split over GPUs, run it that way, and compare what was predicted with
    what happened."""


for command in (
    plans.search,
    plans.baseline,
    plans.estimate,
    plans.check,
    plans.explain,
    plans.what_if,
    plans.pareto,
    plans.report,
    runs.simulate,
    runs.execute,
    runs.compare,
    runs.replan,
    runs.checkpoint,
    runs.samples,
    frameworks.import_,
    frameworks.export,
    measurements.profile,
    measurements.judge,
    measurements.study,
    measurements.task,
    inspection.space,
    inspection.schema,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
