"""Accounts, teams, keys and tokens."""

from typing import Literal

from pydantic import Field, SecretStr

from dantegpu.contracts.rest.base import Page, Request, Response, Timestamp

MAX_PASSWORD_LENGTH = 128
Role = Literal["owner", "member", "viewer"]

_EMAIL = r"^[^@\s]{1,64}@[^@\s]{1,190}$"


class Register(Request):
    """A new account and its first team."""

    email: str = Field(pattern=_EMAIL, examples=["ada@example.org"])
    password: SecretStr = Field(min_length=8, max_length=MAX_PASSWORD_LENGTH)
    team_name: str = Field(default="", max_length=100, description="Of the first team; empty: taken from the e-mail")


class Login(Request):
    """E-mail and password."""

    email: str = Field(max_length=255)
    password: SecretStr = Field(max_length=1024)


class Refresh(Request):
    """A refresh token, used up by this."""

    refresh_token: SecretStr = Field(max_length=1024)
    team_id: str = Field(default="", max_length=100, description="Switch to this team; empty: stay in the session's")


class Logout(Request):
    """The session to end."""

    refresh_token: SecretStr = Field(max_length=1024)


class User(Response):
    """A person."""

    id: str
    email: str
    operator: bool = Field(description="May see and do everything on this platform")
    created_at: Timestamp


class Team(Response):
    """Who owns jobs, machines and a wallet."""

    id: str
    name: str
    role: str = Field(description="Yours: owner, member or viewer")
    created_at: Timestamp


class Registered(Response):
    """The account and its first team."""

    user: User
    team: Team


class Tokens(Response):
    """A short-lived access token, and what to get the next one with."""

    access_token: str = Field(description="Send as `Authorization: Bearer ...`")
    token_type: Literal["Bearer"] = "Bearer"
    expires_in_seconds: int
    refresh_token: str = Field(description="For `POST /v1/auth/refresh`; a new one comes with each use")


class LoggedIn(Tokens):
    """Tokens, and for whom they are."""

    user: User
    teams: list[Team]


class Me(Response):
    """Who calls, and for which team."""

    user: User
    teams: list[Team]
    team_id: str = Field(description="The team that you act for")


class CreateTeam(Request):
    """A further team."""

    name: str = Field(min_length=1, max_length=100)


class Teams(Response):
    """The caller's teams."""

    teams: list[Team]


class TeamPage(Page):
    """Every team, by page."""

    teams: list[Team]


class Member(Response):
    """A user in a team."""

    user_id: str
    email: str
    role: str


class Members(Response):
    """Everybody in a team."""

    members: list[Member]


class SetMember(Request):
    """A member's new role."""

    role: Role


class CreateApiKey(Request):
    """A key of the caller's, for the acting team."""

    name: str = Field(min_length=1, max_length=100)
    scopes: list[str] = Field(default_factory=list, max_length=32, description="Empty: everything that you may do")
    expires_in_seconds: int = Field(default=0, ge=0, le=10 * 366 * 86_400, description="0: never")


class ApiKey(Response):
    """A key without its secret."""

    id: str
    name: str
    team_id: str
    prefix: str = Field(description="First characters, to recognise it by")
    scopes: list[str]
    created_at: Timestamp
    expires_at: Timestamp | None = None
    last_used_at: Timestamp | None = None
    revoked_at: Timestamp | None = None


class CreatedApiKey(Response):
    """A key with its secret."""

    key: ApiKey
    secret: str = Field(description="Shown only now")


class ApiKeyPage(Page):
    """The caller's keys, by page."""

    keys: list[ApiKey]


class CreateJoinToken(Request):
    """How long and how often the token is good."""

    expires_in_seconds: int = Field(default=3600, ge=60, le=30 * 86_400)
    max_uses: int = Field(default=1, ge=1, le=10_000)


class JoinToken(Response):
    """What machines of the acting team join with."""

    token: str = Field(description="Shown only now; `dante provider join URL --token ...`")
    expires_at: Timestamp
