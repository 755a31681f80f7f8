"""What the marketplace refuses, and why."""

from dantegpu.domain.ids import MachineId
from dantegpu.domain.resources import InvalidGpuSpec
from dantegpu.kit.errors import ErrorStatus, ServiceError


class MachineNotFound(ServiceError):
    """No such machine, or it is another team's: the answer is the same."""

    type = "machine-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, machine_id: MachineId) -> None:
        super().__init__(
            f"no machine {machine_id} in your team; `dante provider ls` lists what there is", machine_id=str(machine_id)
        )


class UnreadableGpuSpec(ServiceError):
    """The GPU spec of a search; `position` counts characters from 0."""

    type = "invalid-gpu-spec"
    status = ErrorStatus.INVALID

    def __init__(self, error: InvalidGpuSpec) -> None:
        super().__init__(str(error), position=str(error.position), expected=error.expected, nearest=error.nearest or "")
