"""Which job is meant: a full id, `last`, or enough of an id or the name to know it by."""

import json
from typing import TYPE_CHECKING

from dantegpu.cli import credentials
from dantegpu.cli.errors import EXIT_NOT_FOUND, CliError, UsageProblem
from dantegpu.domain.ids import InvalidId, JobId

if TYPE_CHECKING:
    from dantegpu.sdk import Dante

LAST = ("last", "-")
_FILE_NAME = "last-jobs.json"
_SEARCHED_JOBS = 500
_MIN_LENGTH = 4


def remember_last(url: str, job_id: str) -> None:
    """`last` means this job from now on."""
    with credentials.exclusive():
        known = _read()
        known[url] = job_id
        path = credentials.home() / _FILE_NAME
        part = path.with_suffix(".part")
        part.write_text(json.dumps(known), encoding="utf-8")
        part.replace(path)


def _read() -> dict[str, str]:
    try:
        known = json.loads((credentials.home() / _FILE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def job_id(client: "Dante", text: str) -> str:
    """The full id of the job that `text` means; `X:17` is task 17 of the array X. Raises CliError."""
    array, colon, index = text.rpartition(":")
    if colon and index.isdecimal():
        return client.jobs.get(f"{job_id(client, array)}:{index}").id
    if text in LAST:
        last = _read().get(client.url)
        if last is None:
            raise CliError(
                f"no job has been submitted to {client.url} from here yet", code="job-not-found",
                exit_code=EXIT_NOT_FOUND,
            )  # fmt: skip
        return last
    try:
        return str(JobId.parse(text))
    except InvalidId:
        return _search(client, text)


def _search(client: "Dante", text: str) -> str:
    jobs = client.jobs.list(limit=_SEARCHED_JOBS).jobs
    named = [job.id for job in jobs if job.name and job.name == text]
    bare = text.removeprefix("job_")
    parts = [job.id for job in jobs if job.id.endswith(bare) or job.id.startswith(f"job_{bare}")]
    found = named or (parts if len(bare) >= _MIN_LENGTH else [])
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(found[:3])
        raise UsageProblem(
            f"{text!r} means {len(found)} jobs ({shown}, ...); give more of the id", code="job-ambiguous"
        )
    raise CliError(
        f"there is no job {text!r} among your latest {_SEARCHED_JOBS}; `dante ps --all` lists them",
        code="job-not-found", exit_code=EXIT_NOT_FOUND,
    )  # fmt: skip
