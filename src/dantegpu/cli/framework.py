"""A command table that is shown without importing any command, and the one place where errors become exit codes."""

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NoReturn

import click

from dantegpu.cli.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_NOT_ALLOWED,
    EXIT_NOT_FOUND,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    CliError,
)

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@dataclass(frozen=True, slots=True)
class Entry:
    """A command: `target` is "module:attribute" of a click command, imported when it runs."""

    target: str
    help: str
    panel: str = ""
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """A command with commands of its own. `default` is the one that runs when none is named."""

    help: str
    commands: "Mapping[str, Entry | Group]" = field(default_factory=dict[str, "Entry | Group"])
    panel: str = ""
    default: str | None = None
    hidden: bool = False


type Table = Mapping[str, Entry | Group]


def merge(*tables: Table) -> Table:
    """One table. Groups of the same name get the commands of both; the first one's help stands."""
    merged: dict[str, Entry | Group] = {}
    for table in tables:
        for name, entry in table.items():
            known = merged.get(name)
            if isinstance(known, Group) and isinstance(entry, Group):
                merged[name] = replace(known, commands=merge(known.commands, entry.commands))
            else:
                merged[name] = entry
    return merged


def build_cli(table: Table, name: str = "dante") -> click.Group:
    """The root command."""
    root = LazyGroup(
        table,
        name=name,
        context_settings=_CONTEXT,
        help="Run AI work on rented GPUs, rent out your own, or host the platform for others.",
        params=[
            click.Option(["--url"], metavar="URL", help="The platform (default: DANTE_URL, or the last login)."),
            click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
                         help="Show the version."),
        ],
        callback=_remember_url,
    )  # fmt: skip
    root.epilog = f"`{name} COMMAND --help` says more. Every command that answers something has --json."
    return root


def _remember_url(url: str | None) -> None:
    click.get_current_context().obj = url


def _print_version(context: click.Context, option: click.Parameter, value: bool) -> None:
    del option
    if value and not context.resilient_parsing:
        import dantegpu

        click.echo(f"dante {dantegpu.__version__}")
        context.exit()


class LazyGroup(click.Group):
    """A click group over a table."""

    def __init__(self, table: Table, default: str | None = None, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._table = table
        self._default = default

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, entry in self._table.items() if not entry.hidden]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self._table.get(cmd_name)
        if entry is None:
            return None
        if isinstance(entry, Group):
            return LazyGroup(entry.commands, entry.default, name=cmd_name, help=entry.help, context_settings=_CONTEXT)
        module, _, attribute = entry.target.partition(":")
        command = getattr(import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.target} is no click command")
        command.context_settings = {**_CONTEXT, **command.context_settings}
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if self._default and not (args and (args[0] in self._table or args[0] in ("-h", "--help"))):
            looks_like_a_command = bool(args) and not args[0].startswith("-")
            if not looks_like_a_command:
                args = [self._default, *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self._table and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"`{ctx.command_path} --help` lists the commands."
            raise click.UsageError(f"there is no command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            entry = self._table[name]
            panels.setdefault(entry.panel or "Commands", []).append((name, entry.help))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


def walk(table: Table, prefix: str = "") -> Iterator[tuple[str, Entry]]:
    """Every command with its full name, such as ("provider price", ...)."""
    for name, entry in table.items():
        if isinstance(entry, Group):
            yield from walk(entry.commands, f"{prefix}{name} ")
        else:
            yield prefix + name, entry


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it is told: to people on stderr, with --json as `{"error": ...}` on stdout."""

    message: str
    exit_code: int
    code: str
    details: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    extra: dict[str, Any] = field(default_factory=dict[str, Any])


def run(cli: click.Command, arguments: Sequence[str] | None = None, expected: Sequence[str] = ()) -> NoReturn:
    """Run a command line and exit.

    Exit codes: 0 done, 1 error, 2 wrong usage or job file, 3 not found, 4 not logged in or not allowed, 5 the platform
    does not answer or a part of it is down, 130 interrupted; `dante run` ends with the job's own code.
    `expected` names further classes ("module:Class") whose text is told without a traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = cli.main(given, prog_name=cli.name, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as ending:
        status = ending.exit_code
    except BrokenPipeError:
        # `dante ps | head`: whoever read has enough. Nothing more may be written, also not at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        failure = failure_of(error, expected)
        if failure is None:
            raise
        tell(failure, wants_json(given))
        status = failure.exit_code
    sys.exit(status if isinstance(status, int) else 0)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether --json was given, before the words of a job's own command."""
    own = arguments[: list(arguments).index("--")] if "--" in arguments else arguments
    return "--json" in own


def tell(failure: Failure, as_json: bool) -> None:
    """Print a failure."""
    if as_json:
        error = {"code": failure.code, "message": failure.message} | failure.extra
        if failure.details:
            error["details"] = failure.details
        click.echo(json.dumps({"error": error}))
        return
    # The details of a job file are whole lines already; a prefix would break `file:line:`.
    lines = [detail["text"] for detail in failure.details if "text" in detail]
    click.echo("\n".join([*lines, f"dante: {failure.message}"]) if failure.message else "\n".join(lines), err=True)


def failure_of(error: BaseException, expected: Sequence[str] = ()) -> Failure | None:
    """How an exception is told; None: it is a bug, with a traceback."""
    if isinstance(error, CliError):
        return Failure(error.message, error.exit_code, error.code, error.details)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return Failure("interrupted", EXIT_INTERRUPTED, "interrupted")
    if isinstance(error, click.UsageError):
        where = (
            f"\nUsage: {error.ctx.command_path} ...; `{error.ctx.command_path} --help` says more" if error.ctx else ""
        )
        return Failure(error.format_message() + where, EXIT_USAGE, "usage")
    if isinstance(error, click.ClickException):
        return Failure(error.format_message(), error.exit_code, "error")
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        name = f"{error.filename}: " if error.filename else ""
        return Failure(f"{name}{error.strerror or error}", EXIT_ERROR, "os-error")
    if isinstance(error, TimeoutError):
        return Failure(str(error), EXIT_UNAVAILABLE, "timeout")
    if any(_is_a(error, name) for name in expected):
        return Failure(str(error), EXIT_ERROR, "error")
    return _sdk_failure(error) or _validation_failure(error)


def _is_a(error: BaseException, target: str) -> bool:
    """Without importing anything: a class that nobody has imported cannot have been raised."""
    module, _, name = target.partition(":")
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(error, kind)


def _sdk_failure(error: BaseException) -> Failure | None:
    if "dantegpu.sdk.errors" not in sys.modules:
        return None
    from dantegpu.sdk import errors

    if isinstance(error, errors.ConnectionProblem):
        return Failure(str(error), EXIT_UNAVAILABLE, "unreachable")
    if isinstance(error, errors.ApiError):
        exit_code = {401: EXIT_NOT_ALLOWED, 403: EXIT_NOT_ALLOWED, 404: EXIT_NOT_FOUND, 410: EXIT_NOT_FOUND,
                     400: EXIT_USAGE, 422: EXIT_USAGE, 502: EXIT_UNAVAILABLE, 503: EXIT_UNAVAILABLE,
                     504: EXIT_UNAVAILABLE}.get(error.status, EXIT_ERROR)  # fmt: skip
        message = str(error)
        details = [_field_detail(problem.field, problem.message) for problem in error.problem.errors]
        extra: dict[str, Any] = {"status": error.status}
        if error.problem.request_id:
            extra["request_id"] = error.problem.request_id
            if error.status >= 500:
                message += f" (request {error.problem.request_id})"
        return Failure(message, exit_code, error.code, details, extra)
    if isinstance(error, errors.DanteError):
        return Failure(str(error), EXIT_ERROR, "error")
    return None


def _validation_failure(error: BaseException) -> Failure | None:
    """Something that the SDK refused before it sent it."""
    if "pydantic" not in sys.modules:
        return None
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return None
    from dantegpu.contracts.rest.base import field_problems

    problems = field_problems(error.errors(include_url=False))
    details = [_field_detail(problem.field, problem.message) for problem in problems]
    return Failure("nothing was sent", EXIT_USAGE, "invalid", details)


def _field_detail(name: str, message: str) -> dict[str, Any]:
    return {"field": name, "message": message, "text": f"{name}: {message}" if name else message}
