"""`dante register`, `login`, `logout`, `whoami`, `keys`, `teams`."""

import sys
from typing import TYPE_CHECKING, cast

import click

from dantegpu.cli import credentials, output
from dantegpu.cli.errors import EXIT_NOT_FOUND, CliError, UsageProblem
from dantegpu.cli.session import RETRY_SECONDS, Cli, FileSession, command
from dantegpu.domain.units import InvalidQuantity, parse_duration

if TYPE_CHECKING:
    from dantegpu.contracts.rest.accounts import Role, Team
    from dantegpu.sdk import Dante

_PASSWORD_STDIN = click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")


def _secret(what: str, from_stdin: bool, *, confirm: bool = False) -> str:
    """From stdin or a hidden prompt: never from the command line, which every user of the machine can read."""
    if from_stdin:
        text = sys.stdin.readline().rstrip("\r\n")
        if not text:
            raise UsageProblem(f"no {what.lower()} came on standard input")
        return text
    if not sys.stdin.isatty():
        option = "--api-key-stdin" if what == "API key" else "--password-stdin"
        raise UsageProblem(f"there is no terminal to ask for the {what.lower()}; use {option}")
    return click.prompt(what, hide_input=True, confirmation_prompt=confirm, err=True)


@command("register")
@click.argument("email")
@click.option("--team", default="", metavar="NAME", help="Name of your first team.")
@_PASSWORD_STDIN
def register(cli: Cli, email: str, team: str, password_stdin: bool) -> None:
    """Make an account with a team and a wallet, and log in."""
    from dantegpu.sdk import Dante

    password = _secret("Password", password_stdin, confirm=True)
    with Dante(cli.url, retry_seconds=RETRY_SECONDS) as client:
        made = client.auth.register(email, password, team_name=team)
        _log_in(client, email, password)

    def human() -> None:
        output.say(
            f"{made.user.email} is registered and logged in at {client.url}, in team {made.team.name} ({made.team.id})"
        )

    cli.answer({"url": client.url, "user": made.user, "team": made.team}, human)


def _log_in(client: "Dante", email: str, password: str) -> "list[Team]":
    answer = client.auth.login(email, password)
    credentials.save(
        client.url,
        access_token=answer.access_token,
        refresh_token=answer.refresh_token,
        team_id=answer.teams[0].id if answer.teams else "",
        email=answer.user.email,
    )
    return answer.teams


@command("login")
@click.argument("email", required=False)
@_PASSWORD_STDIN
@click.option("--api-key-stdin", is_flag=True, help="Log in with an API key that comes on standard input.")
def login(cli: Cli, email: str | None, password_stdin: bool, api_key_stdin: bool) -> None:
    """Log in with EMAIL and a password, or with an API key; the platform becomes the one that commands talk to."""
    from dantegpu.sdk import Dante

    if api_key_stdin:
        if email or password_stdin:
            raise UsageProblem("--api-key-stdin needs neither an e-mail address nor a password")
        api_key = _secret("API key", True)
        with Dante(cli.url, api_key=api_key) as client:
            me = client.auth.me()
        credentials.save(client.url, api_key=api_key, team_id=me.team_id, email=me.user.email)
        user, teams = me.user, me.teams
    else:
        if email is None:
            if not sys.stdin.isatty():
                raise UsageProblem("say who: `dante login EMAIL`")
            email = click.prompt("E-mail", err=True)
        with Dante(cli.url) as client:
            teams = _log_in(client, email, _secret("Password", password_stdin))
            user = client.auth.me().user

    def human() -> None:
        output.say(f"logged in at {client.url} as {user.email}")

    cli.answer({"url": client.url, "user": user, "teams": teams}, human)


@command("logout")
def logout(cli: Cli) -> None:
    """End this login on the platform and forget its secret here. An API key is only forgotten (`dante keys revoke`)."""
    from dantegpu.sdk import Dante, DanteError

    url = cli.url
    entry = credentials.load(url)
    if entry is None:
        raise CliError(f"not logged in at {url}", code="not-logged-in", exit_code=EXIT_NOT_FOUND)
    if entry.refresh_token:
        with Dante(url, session=FileSession(url)) as client:
            try:
                client.auth.logout()
            except DanteError as error:
                output.note(f"dante: the platform was not told ({error}); the login there ends by itself")
    credentials.forget(url)
    cli.answer({"url": url, "logged_out": True}, lambda: output.say(f"logged out at {url}"))


@command("whoami")
def whoami(cli: Cli) -> None:
    """Say who you are, on which platform, and for which team you act."""
    with cli.client() as client:
        me = client.auth.me()

    def human() -> None:
        team = next((team for team in me.teams if team.id == me.team_id), None)
        output.print_fields([
            ("platform", client.url),
            ("user", f"{me.user.email} ({me.user.id})"),
            ("team", f"{team.name} ({team.id}), {team.role}" if team else me.team_id),
            ("operator", "yes" if me.user.operator else ""),
        ])  # fmt: skip

    cli.answer({"url": client.url, "user": me.user, "teams": me.teams, "team_id": me.team_id}, human)


@command("list")
def keys_list(cli: Cli) -> None:
    """List your API keys."""
    with cli.client() as client:
        page = client.keys.list()

    def human() -> None:
        rows = [
            [key.id, key.name, key.prefix + "...", output.local_time(key.created_at),
             output.local_time(key.expires_at) or "never", output.ago(key.last_used_at) or "never",
             "revoked" if key.revoked_at else ""]
            for key in page.keys
        ]  # fmt: skip
        output.print_table(["ID", "NAME", "KEY", "MADE", "EXPIRES", "USED", ""], rows)

    cli.answer({"keys": page.keys, "next_cursor": page.next_cursor}, human)


@command("create")
@click.argument("name")
@click.option("--expires", metavar="D", help="How long it is good for, such as 30d; default: until it is revoked.")
def keys_create(cli: Cli, name: str, expires: str | None) -> None:
    """Make an API key for the team you act for. It is shown only now; programs take it from DANTE_API_KEY."""
    try:
        seconds = parse_duration(expires) if expires else 0
    except InvalidQuantity as error:
        raise UsageProblem(f"--expires: {error}") from error
    with cli.client() as client:
        made = client.keys.create(name, expires_in_seconds=seconds)
    cli.answer({"key": made.key, "secret": made.secret}, lambda: output.say(made.secret))


@command("revoke")
@click.argument("key_id", metavar="ID")
def keys_revoke(cli: Cli, key_id: str) -> None:
    """End an API key; the platform refuses it within 5 seconds."""
    with cli.client() as client:
        client.keys.revoke(key_id)
    cli.answer({"key_id": key_id, "revoked": True}, lambda: output.say(f"{key_id} is revoked"))


@command("list")
def teams_list(cli: Cli) -> None:
    """List your teams; * marks the one you act for."""
    with cli.client() as client:
        me = client.auth.me()

    def human() -> None:
        rows = [["*" if team.id == me.team_id else "", team.id, team.name, team.role] for team in me.teams]
        output.print_table(["", "ID", "NAME", "ROLE"], rows)

    cli.answer({"teams": me.teams, "team_id": me.team_id}, human)


@command("create")
@click.argument("name")
def teams_create(cli: Cli, name: str) -> None:
    """Make a team with a wallet of its own; you are its owner."""
    with cli.client() as client:
        team = client.teams.create(name)
    cli.answer({"team": team}, lambda: output.say(f"{team.id}; act for it with `dante teams use {team.id}`"))


def _team(client: "Dante", text: str | None) -> str:
    """The team that is meant: an id, a name, or none for the one that acts."""
    me = client.auth.me()
    if text is None:
        return me.team_id
    found = [team.id for team in me.teams if text in (team.id, team.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageProblem(f"{len(found)} of your teams are called {text!r}; give the id")
    raise CliError(f"you are in no team {text!r}; `dante teams` lists them", code="team-not-found",
                   exit_code=EXIT_NOT_FOUND)  # fmt: skip


@command("use")
@click.argument("team")
def teams_use(cli: Cli, team: str) -> None:
    """Act for another of your teams from now on. Needs a login; an API key belongs to one team."""
    with cli.client() as client:
        team_id = _team(client, team)
        client.auth.switch_team(team_id)
        entry = credentials.load(client.url)
        if entry is not None:
            credentials.save(
                client.url, access_token=entry.access_token, refresh_token=entry.refresh_token, team_id=team_id,
                email=entry.email,
            )  # fmt: skip
    cli.answer({"team_id": team_id}, lambda: output.say(f"you act for {team_id} now"))


_TEAM_OPTION = click.option("--team", metavar="TEAM", help="Which team; default: the one you act for.")


@command("members")
@_TEAM_OPTION
def teams_members(cli: Cli, team: str | None) -> None:
    """List a team's members."""
    with cli.client() as client:
        team_id = _team(client, team)
        members = client.teams.members(team_id)

    def human() -> None:
        output.print_table(["EMAIL", "ROLE", "ID"], [[member.email, member.role, member.user_id] for member in members])

    cli.answer({"team_id": team_id, "members": members}, human)


@command("add")
@click.argument("email")
@click.option("--role", type=click.Choice(["owner", "member", "viewer"]), default="member", show_default=True)
@_TEAM_OPTION
def teams_add(cli: Cli, email: str, role: str, team: str | None) -> None:
    """Add somebody to a team, or change their role. For owners; they need an account."""
    with cli.client() as client:
        team_id = _team(client, team)
        client.teams.set_member(team_id, email, cast("Role", role))
    document: dict[str, object] = {"team_id": team_id, "email": email, "role": role}
    cli.answer(document, lambda: output.say(f"{email} is {role} of {team_id}"))


@command("remove")
@click.argument("email")
@_TEAM_OPTION
def teams_remove(cli: Cli, email: str, team: str | None) -> None:
    """Take somebody out of a team. For owners."""
    with cli.client() as client:
        team_id = _team(client, team)
        client.teams.remove_member(team_id, email)
    document: dict[str, object] = {"team_id": team_id, "email": email, "role": None}
    cli.answer(document, lambda: output.say(f"{email} is out of {team_id}"))
