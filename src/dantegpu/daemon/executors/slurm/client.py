"""Slurm's commands, and what they print, as values. Needs no accounting database (slurmdbd).

Source: the man pages sbatch(1), squeue(1), scancel(1), scontrol(1); `JOB STATE CODES` in squeue(1).
"""

import asyncio
import os
import re
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dantegpu.daemon.executors.base import ExecutorError

COMMAND_TIMEOUT_SECONDS = 30.0
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
GET_SLURM = "install Slurm's commands and its slurm.conf here, for example with: apt-get install slurm-client"
_FIELDS = "%F|%K|%T|%N|%b|%r|%k"
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_LIVE = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING"}
)
_GONE = re.compile(r"invalid job id|already completing|already completed|job/step already", re.IGNORECASE)
_AWAY = re.compile(r"unable to contact slurm controller|connection (refused|timed out)|socket timed out", re.IGNORECASE)
_USABLE_STATES = frozenset({"IDLE", "MIXED", "ALLOCATED", "COMPLETING", "PLANNED"})
_DEFAULT_TYPE = "gpu"


class SlurmRefused(ExecutorError):
    """Slurm said no; the message is its own."""


class SlurmUnreachable(ExecutorError):
    """The cluster's controller does not answer, or its commands are not here. What runs there goes on."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Attempts of the same shape that go to the same node in one call, as an array when they are several."""

    node: str
    cpus: int
    memory_mib: int
    gres: str
    minutes: int
    script: str
    attempts: tuple[str, ...]

    @property
    def comment(self) -> str:
        """By it a daemon finds them again that died before it was told their numbers."""
        return f"{self.node}/{','.join(self.attempts)}"


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job, or one task of an array, as squeue shows it."""

    id: str
    state: str
    node: str
    gpus: int
    reason: str
    label: str
    """The attempt that it is, and before it the node that was asked for."""

    @property
    def waiting(self) -> bool:
        return self.state in _WAITING

    @property
    def live(self) -> bool:
        """Something of it may run."""
        return self.state in _LIVE

    @property
    def over(self) -> bool:
        return not self.waiting and not self.live


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node of the cluster. `gpu_types`: one entry per GPU, its type as the cluster's administrator wrote it."""

    name: str
    cpus: int
    memory_mib: int
    disk_mib: int
    os: str
    kernel: str
    gpu_types: tuple[str, ...]
    gpus_used: int
    states: frozenset[str]
    reason: str
    partitions: frozenset[str]
    address: str
    cpus_used: int
    memory_used_mib: int

    @property
    def problem(self) -> str:
        """Why Slurm starts nothing there; empty when it does."""
        if self.states <= _USABLE_STATES:
            return ""
        words = "+".join(sorted(self.states - {"CLOUD", "DYNAMIC_NORM"})).lower()
        return f"Slurm says {words}" + (f": {self.reason}" if self.reason else "")


class Slurm:
    """One cluster, by way of the commands on this machine. `name`: of all jobs that this daemon submits."""

    def __init__(self, name: str, *, config: Path | None = None, options: Sequence[str] = ()) -> None:
        self.name = name
        self._options = tuple(options)
        # A constant: nothing of the daemon's own environment may reach a job.
        self._env = {"PATH": SEARCH_PATH, "LANG": "C.UTF-8"}
        config_file = str(config) if config is not None else os.environ.get("SLURM_CONF", "")
        if config_file:
            self._env["SLURM_CONF"] = config_file

    async def submit(self, batch: Batch) -> list[str]:
        """The job's number, or one per task. Raises SlurmRefused, SlurmUnreachable."""
        arguments = [
            "sbatch", "--parsable", "--no-requeue", f"--job-name={self.name}", f"--comment={batch.comment}",
            f"--nodelist={batch.node}", "--nodes=1", "--ntasks=1", f"--cpus-per-task={batch.cpus}",
            "--output=/dev/null", "--chdir=/", *self._options,
        ]  # fmt: skip
        if batch.memory_mib:
            arguments.append(f"--mem={batch.memory_mib}M")
        if batch.gres:
            arguments.append(f"--gres={batch.gres}")
        if batch.minutes:
            arguments.append(f"--time={batch.minutes}")
        if len(batch.attempts) > 1:
            arguments.append(f"--array=0-{len(batch.attempts) - 1}")
        number = (await self._run(*arguments, stdin=batch.script)).strip().partition(";")[0]
        if not number.isdigit():
            raise SlurmRefused(f"sbatch answered {number!r} instead of a job's number")
        return [number] if len(batch.attempts) == 1 else [f"{number}_{index}" for index in range(len(batch.attempts))]

    async def jobs(self) -> dict[str, JobRow]:
        """All of this daemon's jobs, some minutes (MinJobAge) after their end, too. Raises SlurmUnreachable."""
        text = await self._run(
            "squeue", "--noheader", "--array", "--states=all", f"--name={self.name}", f"--format={_FIELDS}"
        )
        rows = (job_row(line) for line in text.splitlines())
        return {row.id: row for row in rows if row is not None}

    async def signal(self, job: str, name: str) -> None:
        """To the batch script alone, which is `node`. One that is over needs none."""
        await self._run("scancel", "--batch", f"--signal={name}", job, unless=_GONE)

    async def cancel(self, *jobs: str) -> None:
        """SIGTERM, and SIGKILL after the cluster's KillWait. Those that are over need none."""
        if jobs:
            await self._run("scancel", *jobs, unless=_GONE)

    async def nodes(self) -> list[NodeRow]:
        """Raises SlurmUnreachable."""
        text = await self._run("scontrol", "--oneliner", "--detail", "show", "node")
        return [row for row in map(node_row, text.splitlines()) if row is not None]

    async def _run(self, *command: str, stdin: str = "", unless: "re.Pattern[str] | None" = None) -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                *command, env=self._env, cwd="/", stdin=PIPE if stdin else DEVNULL, stdout=PIPE, stderr=PIPE
            )
        except FileNotFoundError:
            raise SlurmUnreachable(f"{command[0]} is not installed; {GET_SLURM}") from None
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
                out, err = await process.communicate(stdin.encode() if stdin else None)
        except BaseException as error:
            if process.returncode is None:
                process.kill()
                await process.wait()
            if isinstance(error, TimeoutError):
                raise SlurmUnreachable(f"{command[0]} took more than {COMMAND_TIMEOUT_SECONDS:.0f} s") from None
            raise
        if process.returncode == 0:
            return out.decode(errors="replace")
        said = " ".join(err.decode(errors="replace").split()) or f"exit code {process.returncode}"
        if unless is not None and unless.search(said):
            return ""
        raise SlurmUnreachable(said) if _AWAY.search(said) else SlurmRefused(f"{command[0]}: {said}")


def job_row(line: str) -> JobRow | None:
    """A line of squeue in the format `_FIELDS`; None when it is none."""
    parts = line.split("|", 6)
    if len(parts) != 7:
        return None
    number, index, state, node, gres, reason, comment = parts
    is_task = index.isdigit()
    asked_for, _, attempts = comment.partition("/")
    names = attempts.split(",")
    attempt = names[int(index)] if is_task and int(index) < len(names) else names[0]
    count = re.search(r"gpu(?::[^:,()]+)?:(\d+)", gres)
    label = f"{asked_for}/{attempt}"
    return JobRow(
        f"{number}_{index}" if is_task else number, state, node, int(count.group(1)) if count else 0, reason, label
    )


def node_row(line: str) -> NodeRow | None:
    """`NodeName=n1 ... OS=Linux 6.1 #1 SMP ... State=IDLE+DRAIN ...`: a value ends where the next `Name=` begins."""
    pairs = re.findall(r"(?:^|\s)([A-Za-z][\w:]*)=(.*?)(?=\s+[A-Za-z][\w:]*=|\s*$)", line)
    fields: Mapping[str, str] = dict(pairs)
    if "NodeName" not in fields:
        return None
    system, _, rest = fields.get("OS", "").partition(" ")
    state = fields.get("State", "")
    words = {word.rstrip("*~#!%$@^-") for word in state.split("+")}
    return NodeRow(
        name=fields["NodeName"],
        cpus=_number(fields.get("CPUEfctv", "") or fields.get("CPUTot", "")),
        memory_mib=_number(fields.get("RealMemory", "")) - _number(fields.get("MemSpecLimit", "")),
        disk_mib=_number(fields.get("TmpDisk", "")),
        os=system,
        kernel=rest.partition(" ")[0],
        gpu_types=tuple(_gpu_types(fields.get("Gres", ""))),
        gpus_used=len(_gpu_types(fields.get("GresUsed", ""))),
        # A star behind it: the node does not answer.
        states=frozenset(words | {"NOT_RESPONDING"} if "*" in state else words),
        reason=re.sub(r"\s*\[.*$", "", fields.get("Reason", "")),
        partitions=frozenset(filter(None, fields.get("Partitions", "").split(","))),
        address=fields.get("NodeAddr", ""),
        cpus_used=_number(fields.get("CPUAlloc", "")),
        memory_used_mib=_number(fields.get("AllocMem", "")),
    )


def _gpu_types(gres: str) -> list[str]:
    """`gpu:a100:4(S:0-1),gpu:t4:1` -> four times a100 and t4; without a type, "gpu"."""
    found: list[str] = []
    for match in re.finditer(r"(?:^|,)gpu(?::([^:,()]+))??:(\d+)", gres):
        found += [match.group(1) or _DEFAULT_TYPE] * int(match.group(2))
    return found


def gres_of(types: Sequence[str]) -> str:
    """What to ask sbatch for: the opposite of `_gpu_types`."""
    return ",".join(
        f"gpu:{types.count(kind)}" if kind == _DEFAULT_TYPE else f"gpu:{kind}:{types.count(kind)}"
        for kind in dict.fromkeys(types)
    )


def _number(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match.group()) if match else 0
