"""What billing refuses, and why. A hold that cannot be opened is no error but a `Refusal` in its result."""

from dantegpu.domain.ids import JobId, TeamId
from dantegpu.domain.units import format_dgpu
from dantegpu.kit.errors import ErrorStatus, ServiceError


class WalletNotFound(ServiceError):
    """No such wallet, or it is another team's: the answer is the same."""

    type = "wallet-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, team_id: TeamId) -> None:
        super().__init__(f"you have no wallet of a team {team_id}; `dante wallet` shows your own", team_id=str(team_id))


class ReceiptNotFound(ServiceError):
    """No hold was ever opened for the job, or the job is another team's: the answer is the same."""

    type = "receipt-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, job_id: JobId) -> None:
        super().__init__(
            f"there is no receipt for {job_id}: it has not been placed yet, or it is not a job of your team",
            job_id=str(job_id),
        )


class CreditConflict(ServiceError):
    """The idempotency key was used for another credit: answering either would be wrong."""

    type = "idempotency-key-reused"
    status = ErrorStatus.CONFLICT

    def __init__(self, key: str, amount_udgpu: int) -> None:
        super().__init__(
            f"Idempotency-Key {key!r} was used for a credit of {format_dgpu(amount_udgpu)} $dGPU or with another text; "
            "nothing was credited now: use a new key for a new credit"
        )


class WalletFull(ServiceError):
    """A wallet holds no more than this, so that no sum in the ledger can overflow."""

    type = "wallet-full"
    status = ErrorStatus.PRECONDITION

    def __init__(self, limit_udgpu: int) -> None:
        super().__init__(f"a wallet holds at most {format_dgpu(limit_udgpu)} $dGPU; credit less")
