"""What the registry refuses, and why."""

from dantegpu.domain.ids import MachineId
from dantegpu.kit.errors import ErrorStatus, ServiceError


class MachineNotFound(ServiceError):
    """No such machine, or it is another team's: the answer is the same."""

    type = "machine-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, machine_id: MachineId) -> None:
        super().__init__(
            f"no machine {machine_id} in your team; `dante provider machines` lists those there are",
            machine_id=str(machine_id),
        )


class MachineHasLeft(ServiceError):
    """The machine left the platform; only a new enrolment brings it back."""

    type = "machine-left"
    status = ErrorStatus.PRECONDITION

    def __init__(self, machine_id: MachineId) -> None:
        super().__init__(
            f"{machine_id} has left the platform; to bring it back, enrol it again with `dante provider join`",
            machine_id=str(machine_id),
        )


class MachineOfAnotherTeam(ServiceError):
    """The machine is enrolled with another team and has not left it."""

    type = "machine-of-another-team"
    status = ErrorStatus.CONFLICT

    def __init__(self, machine_id: MachineId) -> None:
        super().__init__(
            f"{machine_id} works for another team; its owner has to let it leave there before it can join here",
            machine_id=str(machine_id),
        )


class InvalidInventory(ServiceError):
    """What a machine says it has cannot be."""

    type = "invalid-inventory"
    status = ErrorStatus.INVALID

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"inventory.{field}: {problem}", field=field)
