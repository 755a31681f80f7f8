"""Every command that uses a platform. What runs one (`up`, `serve`, ...) is in `dantegpu.apps`."""

from dantegpu.cli.framework import Entry, Group, Table

_JOBS = "Jobs"
_MONEY = "Money"
_ACCOUNT = "Account"
_PROVIDER = "Machines"
_OPERATOR = "Operator"

_JOB_COMMANDS: Table = {
    "run": Entry("dantegpu.cli.run:run", "Run a command on a rented machine and follow it.", _JOBS),
    "submit": Entry("dantegpu.cli.submit:submit", "Submit the jobs of a YAML file.", _JOBS),
    "ps": Entry("dantegpu.cli.jobs:ps", "List jobs.", _JOBS),
    "show": Entry("dantegpu.cli.jobs:show", "Show a job with its attempts.", _JOBS),
    "logs": Entry("dantegpu.cli.logs:logs", "Print what a job wrote.", _JOBS),
    "metrics": Entry("dantegpu.cli.metrics:metrics", "Show what a job uses, as curves.", _JOBS),
    "stop": Entry("dantegpu.cli.jobs:stop", "Stop jobs.", _JOBS),
    "results": Entry("dantegpu.cli.logs:results", "List or fetch the files that a job left.", _JOBS),
    "schedules": Group(
        "Jobs that are submitted again and again.",
        {
            "list": Entry("dantegpu.cli.schedules:schedules_list", "List your team's schedules."),
            "stop": Entry("dantegpu.cli.schedules:schedules_stop", "Submit nothing more."),
        },
        _JOBS,
        default="list",
    ),
    "why": Entry("dantegpu.cli.jobs:why", "Say why a job waits, and what would help.", _JOBS),
    "offers": Entry("dantegpu.cli.market:offers", "List machines for rent, cheapest first.", _JOBS),
}

_MONEY_COMMANDS: Table = {
    "wallet": Group(
        "Your team's money.",
        {
            "show": Entry("dantegpu.cli.money:wallet", "Show the balance."),
            "entries": Entry("dantegpu.cli.money:entries", "List what came in and went out."),
        },
        _MONEY,
        default="show",
    ),
    "receipt": Entry("dantegpu.cli.money:receipt", "Show what a job cost, window by window.", _MONEY),
}

_ACCOUNT_COMMANDS: Table = {
    "register": Entry("dantegpu.cli.accounts:register", "Make an account on a platform and log in.", _ACCOUNT),
    "login": Entry("dantegpu.cli.accounts:login", "Log in to a platform.", _ACCOUNT),
    "logout": Entry("dantegpu.cli.accounts:logout", "Log out, and forget the platform's secret.", _ACCOUNT),
    "whoami": Entry("dantegpu.cli.accounts:whoami", "Say who you are, and where.", _ACCOUNT),
    "keys": Group(
        "API keys for programs.",
        {
            "list": Entry("dantegpu.cli.accounts:keys_list", "List your keys."),
            "create": Entry("dantegpu.cli.accounts:keys_create", "Make a key; it is shown once."),
            "revoke": Entry("dantegpu.cli.accounts:keys_revoke", "End a key."),
        },
        _ACCOUNT,
        default="list",
    ),
    "teams": Group(
        "Teams: who pays together.",
        {
            "list": Entry("dantegpu.cli.accounts:teams_list", "List your teams."),
            "create": Entry("dantegpu.cli.accounts:teams_create", "Make a team."),
            "use": Entry("dantegpu.cli.accounts:teams_use", "Act for another of your teams."),
            "members": Entry("dantegpu.cli.accounts:teams_members", "List a team's members."),
            "add": Entry("dantegpu.cli.accounts:teams_add", "Add a member, or change a role."),
            "remove": Entry("dantegpu.cli.accounts:teams_remove", "Remove a member."),
        },
        _ACCOUNT,
        default="list",
    ),
}

_PROVIDER_COMMANDS: Table = {
    "provider": Group(
        "Rent out your machines.",
        {
            "list": Entry("dantegpu.cli.market:provider_list", "List your machines."),
            "show": Entry("dantegpu.cli.market:provider_show", "Show one of your machines."),
            "status": Entry("dantegpu.cli.market:provider_status", "Show how a machine is, and what was earned."),
            "price": Entry("dantegpu.cli.market:provider_price", "Set what a machine costs."),
            "pause": Entry("dantegpu.cli.market:provider_pause", "Take no new jobs; running ones go on."),
            "resume": Entry("dantegpu.cli.market:provider_resume", "Take jobs again."),
            "drain": Entry("dantegpu.cli.market:provider_drain", "Finish what runs, take nothing new."),
            "leave": Entry("dantegpu.cli.market:provider_leave", "Leave the platform for good."),
            "token": Entry("dantegpu.cli.market:provider_token", "Make a token with which machines join."),
        },
        _PROVIDER,
    )
}

_OPERATOR_COMMANDS: Table = {
    "admin": Group(
        "For the platform's operator.",
        {
            "credit": Entry("dantegpu.cli.money:admin_credit", "Give a team money."),
            "ledger": Entry("dantegpu.cli.money:admin_ledger", "Re-sum the whole ledger."),
            "teams": Entry("dantegpu.cli.money:admin_teams", "List all teams."),
            "quarantines": Entry("dantegpu.cli.market:admin_quarantines", "List machines that are shut out, and why."),
            "release-machine": Entry("dantegpu.cli.market:admin_release", "End a machine's quarantine."),
            "jobs": Entry("dantegpu.cli.jobs:admin_jobs", "List the jobs of all teams."),
        },
        _OPERATOR,
    )
}

COMMANDS: Table = {
    **_JOB_COMMANDS,
    **_MONEY_COMMANDS,
    **_PROVIDER_COMMANDS,
    **_ACCOUNT_COMMANDS,
    **_OPERATOR_COMMANDS,
}
