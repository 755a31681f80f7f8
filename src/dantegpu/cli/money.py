"""`dante wallet`, `receipt`, `admin`."""

from typing import TYPE_CHECKING

import click

from dantegpu.cli import output, refs
from dantegpu.cli.errors import UsageProblem
from dantegpu.cli.jobs import JOB
from dantegpu.cli.session import Cli, command
from dantegpu.domain.units import InvalidQuantity, parse_dgpu

if TYPE_CHECKING:
    from dantegpu.contracts.rest.billing import LedgerCheck, Receipt

_LIMIT = click.option("-n", "--limit", type=click.IntRange(1, 500), default=20, show_default=True, help="How many.")
_CURSOR = click.option("--cursor", help="Go on where the last page ended.")


class Dgpu(click.ParamType[int]):
    """An amount such as 2.50, as micro-$dGPU."""

    name = "amount"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_dgpu(str(value))
        except InvalidQuantity as error:
            self.fail(str(error), param, ctx)


@command("show")
def wallet(cli: Cli) -> None:
    """Show your team's money: the balance, what is held for running jobs, and what is left to spend."""
    with cli.client() as client:
        found = client.wallet.get()

    def human() -> None:
        output.print_fields([
            ("team", found.team_id),
            ("balance", f"{output.money(found.balance_udgpu)} $dGPU"),
            ("held", f"{output.money(found.held_udgpu)} $dGPU for running jobs"),
            ("available", f"{output.money(found.available_udgpu)} $dGPU"),
            ("earned", f"{output.money(found.earned_udgpu)} $dGPU as a provider" if found.earned_udgpu else ""),
        ])  # fmt: skip

    cli.answer({"wallet": found}, human)


@command("entries")
@_LIMIT
@_CURSOR
def entries(cli: Cli, limit: int, cursor: str | None) -> None:
    """List what came into your team's wallet and what went out, the newest first."""
    with cli.client() as client:
        page = client.wallet.entries(cursor=cursor, limit=limit)

    def human() -> None:
        rows = [
            [output.local_time(entry.created_at), entry.kind, output.money(entry.amount_udgpu),
             output.money(entry.balance_after_udgpu), entry.job_id or "", entry.text]
            for entry in page.entries
        ]  # fmt: skip
        output.print_table(["TIME", "KIND", "$dGPU", "BALANCE", "JOB", "TEXT"], rows, right=[2, 3])
        if page.next_cursor:
            output.note(f"more with --cursor {page.next_cursor}")

    cli.answer({"entries": page.entries, "next_cursor": page.next_cursor}, human)


@command("receipt")
@JOB
def receipt(cli: Cli, job: str) -> None:
    """Show what a job cost, window by window, and who got it."""
    with cli.client() as client:
        found = client.jobs.receipt(refs.job_id(client, job))
    cli.answer({"receipt": found}, lambda: _print_receipt(found))


def _print_receipt(receipt: "Receipt") -> None:
    output.say(f"{receipt.job_id}, paid by {receipt.payer_team_id}")
    rows = [
        [line.attempt_id, str(line.window), output.money(line.rate_udgpu_per_hour), f"{line.used_seconds}s",
         output.money(line.charged_udgpu), output.money(line.provider_udgpu), output.money(line.fee_udgpu),
         "open" if line.open else output.local_time(line.closed_at)]
        for line in receipt.lines
    ]  # fmt: skip
    if rows:
        headers = ["ATTEMPT", "WINDOW", "$dGPU/h", "USED", "$dGPU", "PROVIDER", "FEE", "CLOSED"]
        output.print_table(headers, rows, right=[1, 2, 3, 4, 5, 6])
    output.say(f"total {output.money(receipt.total_udgpu)} $dGPU")
    if any(line.open for line in receipt.lines):
        output.say("an open window is held, not charged yet")


@command("credit")
@click.argument("team", metavar="TEAM")
@click.argument("amount", metavar="AMOUNT", type=Dgpu())
@click.option("--text", default="", help="Why; it is shown in the wallet.")
@click.option("--idempotency-key", metavar="KEY", help="The same key again credits nothing more.")
def admin_credit(cli: Cli, team: str, amount: int, text: str, idempotency_key: str | None) -> None:
    """Give TEAM (an id, or `mine`) AMOUNT $dGPU, such as 25 or 2.50."""
    if amount < 1:
        raise UsageProblem("the amount must be more than 0")
    with cli.client() as client:
        team_id = client.auth.me().team_id if team == "mine" else team
        credited = client.admin.credit(team_id, amount, text=text, idempotency_key=idempotency_key)
    balance = output.money(credited.balance_udgpu)
    cli.answer({"wallet": credited}, lambda: output.say(f"{team_id} has {balance} $dGPU now"))


@command("ledger")
def admin_ledger(cli: Cli) -> int:
    """Re-sum the whole ledger; ends with 1 when the books are wrong."""
    with cli.client() as client:
        check = client.admin.ledger()
    cli.answer({"ledger": check}, lambda: _print_ledger(check))
    return 0 if check.balanced else 1


def _print_ledger(check: "LedgerCheck") -> None:
    output.say("the books are right" if check.balanced else "THE BOOKS ARE WRONG")
    output.print_fields([
        ("accounts", check.accounts),
        ("transfers", check.transfers),
        ("open holds", check.open_holds),
        ("sum", f"{output.money(check.sum_udgpu)} $dGPU"),
    ])  # fmt: skip
    for problem in check.problems:
        output.say(f"  {problem}")


@command("teams")
@_LIMIT
@_CURSOR
def admin_teams(cli: Cli, limit: int, cursor: str | None) -> None:
    """List all teams of the platform."""
    with cli.client() as client:
        page = client.admin.teams(cursor=cursor, limit=limit)

    def human() -> None:
        rows = [[team.id, team.name, output.local_time(team.created_at)] for team in page.teams]
        output.print_table(["ID", "NAME", "SINCE"], rows)
        if page.next_cursor:
            output.note(f"more with --cursor {page.next_cursor}")

    cli.answer({"teams": page.teams, "next_cursor": page.next_cursor}, human)
