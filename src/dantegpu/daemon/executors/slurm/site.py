"""A cluster as its nodes' executors share it: one look at the queue for all, one call for what starts together."""

import asyncio
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dantegpu.daemon.executors.base import ExecutorError
from dantegpu.daemon.executors.slurm.client import Batch, JobRow, NodeRow, Slurm
from dantegpu.kit.lifecycle import Tasks

MAX_BATCH = 100
NODE_MODULE = "dantegpu.daemon.executors.slurm.node"


@dataclass(slots=True)
class _Waiting:
    batch: Batch
    folder: Path
    number: "asyncio.Future[str]"


class SlurmSite:
    """`folder` lies on a file system that the cluster's machines share, and so does `python`, with DanteGPU in it."""

    def __init__(
        self,
        slurm: Slurm,
        folder: Path,
        *,
        python: str = sys.executable,
        poll_seconds: float = 2.0,
        start_seconds: float = 60.0,
    ) -> None:
        self.slurm = slurm
        self.folder = folder
        self.poll_seconds = poll_seconds
        """How old what is known of the queue may get."""
        self.start_seconds = start_seconds
        """How long an attempt may wait in Slurm's queue."""
        self._python = python
        self._tasks = Tasks("slurm")
        self._waiting: list[_Waiting] = []
        self._submitting = asyncio.Lock()
        self._looking = asyncio.Lock()
        self._looked_at = float("-inf")
        self._jobs: Mapping[str, JobRow] = {}
        self._nodes: Mapping[str, NodeRow] = {}
        self._strangers: Mapping[str, int] = {}

    async def submit(self, batch: Batch, folder: Path) -> str:
        """One attempt's job; its number. What comes while a call is under way goes in the next one, as an array.

        Raises SlurmRefused, SlurmUnreachable.
        """
        mine = _Waiting(batch, folder, asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        try:
            async with self._submitting:
                if not mine.number.done():
                    together = [other for other in self._waiting if _shape(other) == _shape(mine)][:MAX_BATCH]
                    # One that is given up in the middle must not take the others with it.
                    await asyncio.shield(self._tasks.spawn(self._submit(together), "submit"))
            return await mine.number
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)

    async def _submit(self, together: Sequence[_Waiting]) -> None:
        for waiting in together:
            self._waiting.remove(waiting)
        batch = replace(
            together[0].batch,
            attempts=tuple(waiting.batch.attempts[0] for waiting in together),
            script=self._script([waiting.folder for waiting in together]),
        )
        try:
            numbers = await self.slurm.submit(batch)
        except ExecutorError as error:
            for waiting in together:
                if not waiting.number.done():
                    waiting.number.set_exception(error)
                    waiting.number.exception()  # its own caller may be gone
            return
        for waiting, number in zip(together, numbers, strict=True):
            if not waiting.number.done():
                waiting.number.set_result(number)

    def _script(self, folders: Sequence[Path]) -> str:
        """Task N of an array takes the Nth folder."""
        words = " ".join(shlex.quote(str(folder)) for folder in folders)
        program = f"{shlex.quote(self._python)} -I -m {NODE_MODULE} {shlex.quote(str(self.folder))}"
        return f'#!/bin/sh\nset -- {words}\nshift "${{SLURM_ARRAY_TASK_ID:-0}}"\nexec {program} "$1"\n'

    async def jobs(self, max_age_seconds: float = 0.0) -> Mapping[str, JobRow]:
        """The daemon's jobs, as they were at most `max_age_seconds` before this call. Raises SlurmUnreachable."""
        loop = asyncio.get_running_loop()
        asked_at = loop.time() - max_age_seconds
        if self._looked_at < asked_at:
            async with self._looking:
                # Whoever came while somebody else looked is served by the look that began after he came.
                if self._looked_at < asked_at:
                    began_at = loop.time()
                    self._jobs = await self.slurm.jobs()
                    self._looked_at = began_at
        return self._jobs

    async def look_at_nodes(self) -> Sequence[NodeRow]:
        """The cluster's nodes, also for `node` and `strangers_gpus`. Raises SlurmUnreachable."""
        before = await self.jobs()
        nodes = await self.slurm.nodes()
        after = await self.jobs()
        self._nodes = {node.name: node for node in nodes}
        # What started or ended while the nodes were looked at is in one of both looks, and nobody else's.
        self._strangers = {
            node.name: node.gpus_used - max(_gpus_on(node.name, before), _gpus_on(node.name, after)) for node in nodes
        }
        return nodes

    def node(self, name: str) -> NodeRow | None:
        """As it was seen last; for threads, too."""
        return self._nodes.get(name)

    def strangers_gpus(self, name: str) -> int:
        """How many GPUs of that node jobs had that are not this daemon's, when it was seen last."""
        return max(0, self._strangers.get(name, 0))

    async def close(self) -> None:
        await self._tasks.stop()


def _gpus_on(node: str, jobs: Mapping[str, JobRow]) -> int:
    return sum(row.gpus for row in jobs.values() if row.live and row.node == node)


def _shape(waiting: _Waiting) -> Batch:
    return replace(waiting.batch, attempts=(), script="")
