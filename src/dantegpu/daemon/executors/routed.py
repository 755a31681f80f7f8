"""Several executors behind one: a job that names an image runs in a container, any other in the machine's sandbox."""

from collections.abc import Callable, Mapping, Sequence
from signal import Signals

from dantegpu.daemon.executors.base import (
    Adoption,
    AttemptRefused,
    AttemptSpec,
    Capabilities,
    Executor,
    ExitStatus,
    Handle,
    Published,
    Stats,
    StopReason,
    UnknownHandle,
    untold,
)
from dantegpu.domain.ids import AttemptId


class RoutedExecutor(Executor):
    """`plain` runs what names no image. A handle finds its executor by name."""

    name = "routed"

    def __init__(self, plain: Executor, container: Executor | None) -> None:
        self._plain = plain
        self._container = container
        both = [plain] if container is None else [plain, container]
        self._by_name: Mapping[str, Executor] = {executor.name: executor for executor in both}

    def _for(self, spec: AttemptSpec) -> Executor:
        if spec.image is None:
            return self._plain
        if self._container is None:
            raise AttemptRefused("this machine runs no container images")
        return self._container

    def _of(self, handle: Handle) -> Executor:
        executor = self._by_name.get(handle.executor)
        if executor is None:
            raise UnknownHandle(f"this machine has no executor {handle.executor!r} any more")
        return executor

    @property
    def queues(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(executor.queues for executor in self._by_name.values())

    @property
    def reads_leases(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(executor.reads_leases for executor in self._by_name.values())

    async def probe(self) -> Capabilities:
        return await self._plain.probe()

    async def prepare(self, spec: AttemptSpec, progress: Callable[[str], None] = untold) -> Handle:
        return await self._for(spec).prepare(spec, progress)

    async def start(self, handle: Handle, spec: AttemptSpec) -> None:
        await self._of(handle).start(handle, spec)

    async def adopt(self, handle: Handle) -> Adoption:
        return await self._of(handle).adopt(handle)

    async def wait(self, handle: Handle) -> ExitStatus:
        return await self._of(handle).wait(handle)

    async def stop(
        self, handle: Handle, *, grace_seconds: float, reason: StopReason, notice: Signals | None = None
    ) -> None:
        await self._of(handle).stop(handle, grace_seconds=grace_seconds, reason=reason, notice=notice)

    async def destroy(self, handle: Handle) -> None:
        await self._of(handle).destroy(handle)

    async def stats(self, handle: Handle) -> Stats:
        return await self._of(handle).stats(handle)

    def published(self, handle: Handle) -> Sequence[Published]:
        return self._of(handle).published(handle)

    async def sweep(self, known: set[AttemptId]) -> None:
        for executor in self._by_name.values():
            await executor.sweep(known)

    async def close(self) -> None:
        for executor in self._by_name.values():
            await executor.close()
