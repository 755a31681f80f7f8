"""Expected errors of the command line, and the exit codes they end with."""

from collections.abc import Sequence
from typing import Any, Final

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_NOT_FOUND: Final = 3
EXIT_NOT_ALLOWED: Final = 4
EXIT_UNAVAILABLE: Final = 5
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141


class CliError(Exception):
    """Told to the user as it is, without a traceback. `code` and `details` are for programs (`--json`)."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "error",
        exit_code: int = EXIT_ERROR,
        details: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.exit_code = exit_code
        self.details = list(details)


class UsageProblem(CliError):
    """What was typed, or written into a file, cannot be meant."""

    def __init__(self, message: str, *, code: str = "usage", details: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message, code=code, exit_code=EXIT_USAGE, details=details)
