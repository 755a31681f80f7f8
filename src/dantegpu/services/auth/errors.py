"""What auth refuses, and why."""

from dantegpu.domain.ids import ApiKeyId, MachineId, TeamId
from dantegpu.kit.errors import ErrorStatus, ServiceError


class EmailTaken(ServiceError):
    """Addresses are unique; this one has an account."""

    type = "email-taken"
    status = ErrorStatus.CONFLICT

    def __init__(self) -> None:
        super().__init__("there is an account with this e-mail address already; log in with it: `dante login`")


class InvalidEmail(ServiceError):
    """The text is no e-mail address."""

    type = "invalid-email"
    status = ErrorStatus.INVALID

    def __init__(self) -> None:
        super().__init__("email: expected an address like ada@example.org, at most 255 characters")


class WeakPassword(ServiceError):
    """Too short, too long, or one that attackers try first; the message says which."""

    type = "weak-password"
    status = ErrorStatus.INVALID


class WrongCredentials(ServiceError):
    """No such account, or another password: the answer is the same."""

    type = "wrong-credentials"
    status = ErrorStatus.UNAUTHENTICATED

    def __init__(self) -> None:
        super().__init__("e-mail address or password is wrong")


class RateLimited(ServiceError):
    """Too many attempts; it says when the next one is accepted, and nobody is locked out for longer."""

    type = "rate-limited"
    status = ErrorStatus.RATE_LIMITED

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(
            f"too many attempts to log in; try again in {retry_after_seconds} s. "
            "API keys and open sessions go on working",
            retry_after=str(retry_after_seconds),
        )


class InvalidRefreshToken(ServiceError):
    """Unknown, expired, revoked, or used before: the answer is the same."""

    type = "invalid-refresh-token"
    status = ErrorStatus.UNAUTHENTICATED

    def __init__(self) -> None:
        super().__init__("the session has ended; log in again: `dante login`")


class TeamNotFound(ServiceError):
    """No such team, or the asking user is not in it: the answer is the same."""

    type = "team-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, team_id: TeamId) -> None:
        super().__init__(f"you are in no team {team_id}; `dante team ls` lists your teams", team_id=str(team_id))


class UserNotFound(ServiceError):
    """Nobody has an account with the address."""

    type = "user-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self) -> None:
        super().__init__("nobody has registered with this e-mail address; they have to register first")


class LastOwner(ServiceError):
    """The change would leave a team without an owner."""

    type = "last-owner"
    status = ErrorStatus.PRECONDITION

    def __init__(self) -> None:
        super().__init__("a team needs an owner: make somebody else owner first")


class LimitReached(ServiceError):
    """One more would be above a limit of this platform."""

    type = "limit-reached"
    status = ErrorStatus.PRECONDITION

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"there are {limit} {what} already, which is the limit; remove one first", limit=str(limit))


class ApiKeyNotFound(ServiceError):
    """No such key, or it is somebody else's: the answer is the same."""

    type = "api-key-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, key_id: ApiKeyId) -> None:
        super().__init__(f"you have no API key {key_id}; `dante keys ls` lists yours", key_id=str(key_id))


class InvalidScope(ServiceError):
    """A scope that does not exist."""

    type = "invalid-scope"
    status = ErrorStatus.INVALID


class InvalidJoinToken(ServiceError):
    """Unknown, expired or used up: the answer is the same."""

    type = "invalid-join-token"
    status = ErrorStatus.FORBIDDEN

    def __init__(self) -> None:
        super().__init__(
            "the join token is wrong, has expired or was used already; make a new one: `dante provider token`"
        )


class InvalidProof(ServiceError):
    """The machine did not prove that it holds its private key."""

    type = "invalid-machine-proof"
    status = ErrorStatus.UNAUTHENTICATED


class MachineNotFound(ServiceError):
    """No such machine, or it is another team's: the answer is the same."""

    type = "machine-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, machine_id: MachineId) -> None:
        super().__init__(f"there is no machine {machine_id} in your team", machine_id=str(machine_id))


class MachineRevoked(ServiceError):
    """The machine was removed; its key may join again as a new one."""

    type = "machine-revoked"
    status = ErrorStatus.FORBIDDEN

    def __init__(self, machine_id: MachineId) -> None:
        super().__init__(
            f"machine {machine_id} was removed from the platform; it may join again with a new join token",
            machine_id=str(machine_id),
        )


class MachineOfAnotherTeam(ServiceError):
    """The key belongs to a machine of another team."""

    type = "machine-of-another-team"
    status = ErrorStatus.CONFLICT

    def __init__(self) -> None:
        super().__init__(
            "this machine has joined for another team; that team has to remove it first, or delete the machine's key"
        )


class OperatorEmailTaken(ServiceError):
    """Somebody else has an account with the address that the operator's should have."""

    type = "operator-email-taken"
    status = ErrorStatus.CONFLICT

    def __init__(self) -> None:
        super().__init__(
            "an account with the operator's e-mail address exists, with another password; it was not made operator"
        )
