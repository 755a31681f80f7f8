"""Where a result file may be written."""

from pathlib import Path, PurePosixPath

from dantegpu.sdk.errors import TransferProblem


def safe_target(folder: Path, path: str) -> Path:
    """Where the result `path` lies below `folder`.

    The platform's list is not trusted: `..`, absolute paths and folders that are links to elsewhere raise
    TransferProblem.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\0" in path or any(part in ("..", ".") for part in path.split("/")):
        raise TransferProblem(f"the result {path!r} would be written outside of {folder}; nothing was written")
    target = folder.joinpath(*parts)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise TransferProblem(f"the result {path!r} goes through a link out of {folder}; nothing was written")
    return target
