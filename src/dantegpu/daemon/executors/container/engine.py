"""A thin client of the Docker Engine API over its Unix socket; Podman serves the same API, and its own beside it.

Not aiodocker: that needs aiohttp, which costs a provider's machine 15 MB and half of the daemon's start (see `lean`),
while a dozen calls are all that an executor makes. httpx is loaded anyway, for inputs and results.
Sources: docs.docker.com/reference/api/engine, docs.podman.io/en/latest/_static/api.html.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx

from dantegpu.daemon.executors.base import ExecutorError

type Json = dict[str, Any]

CALL_SECONDS = 60.0
CONNECT_SECONDS = 5.0
NOT_FOUND = 404
CONFLICT = 409
REMOVE_TRIES = 20
REMOVE_PAUSE_SECONDS = 0.1
_UNAVAILABLE_STATUS = 500
_NOT_RUNNING = "can only kill running containers"  # Podman's word for CONFLICT


class EngineError(ExecutorError):
    """The engine refused a call. `message` is what it said."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the container engine answered {status}: {message}")
        self.status = status
        self.message = message


class EngineUnreachable(ExecutorError):
    """Nothing answers on the engine's socket."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the engine says about itself. `runtime` is the OCI runtime's name and whole version, as it was built."""

    podman: bool
    version: str
    api_version: str
    runtime: str
    runtime_version: str
    rootless: bool
    seccomp: bool
    remapped_uid: int | None
    """First uid of the range that an engine with `userns-remap` gives to containers."""
    cdi: bool
    root_folder: Path
    seccomp_profile: Path | None = None
    """The file of an engine whose profile has to be hardened; None: its own will do."""

    @property
    def name(self) -> str:
        return "podman" if self.podman else "docker"

    def describe(self, *, daemon_is_root: bool) -> str:
        """For people: who runs the containers, and as whom their users count on the machine."""
        if self.rootless:
            users = "rootless"
        elif self.remapped_uid is not None:
            users = f"user namespace from uid {self.remapped_uid} (userns-remap)"
        elif self.podman and daemon_is_root:
            users = "a user namespace per job"
        else:
            users = "no user namespace: jobs are unprivileged users of the machine"
        devices = "GPUs by CDI" if self.cdi else "GPUs by device requests"
        return f"{self.name} {self.version}, {self.runtime} {self.runtime_version}, {users}, {devices}"


def default_sockets(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Where engines listen, the one that was named by the user first."""
    named = environ.get("DOCKER_HOST", "")
    runtime = Path(environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}"))
    found = [Path(named.removeprefix("unix://"))] if named.startswith("unix://") else []
    found += [Path("/var/run/docker.sock"), runtime / "docker.sock"]
    return [*found, Path("/run/podman/podman.sock"), runtime / "podman/podman.sock"]


class Engine:
    """One engine behind `socket`. Safe to use from many tasks; `close` it."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=None)),
            base_url="http://engine",
            timeout=httpx.Timeout(CALL_SECONDS, connect=CONNECT_SECONDS),
        )
        self._prefix = ""
        self._libpod = ""

    async def close(self) -> None:
        await self._http.aclose()

    async def facts(self) -> EngineFacts:
        """Raises EngineUnreachable, EngineError."""
        greeting = await self._request("GET", "/_ping")
        libpod = greeting.headers.get("libpod-api-version", "")
        self._prefix = f"/v{greeting.headers['api-version']}"
        self._libpod = f"/v{libpod}/libpod" if libpod else ""
        return await (self._podman_facts() if libpod else self._docker_facts())

    async def _docker_facts(self) -> EngineFacts:
        version: Json = await self.call("GET", "/version")
        info: Json = await self.call("GET", "/info")
        parts: list[Json] = version.get("Components") or []
        runtime, runtime_version = _docker_runtime({str(part["Name"]): part for part in parts})
        options: list[str] = info.get("SecurityOptions") or []
        root_folder = str(info.get("DockerRootDir", ""))
        return EngineFacts(
            podman=False,
            version=str(version["Version"]),
            api_version=str(version["ApiVersion"]),
            runtime=runtime,
            runtime_version=runtime_version,
            rootless="name=rootless" in options,
            seccomp=any(option.startswith("name=seccomp") and "unconfined" not in option for option in options),
            remapped_uid=_remapped_uid(options, root_folder),
            cdi=bool(info.get("CDISpecDirs")),
            root_folder=Path(root_folder),
        )

    async def _podman_facts(self) -> EngineFacts:
        # This one call and no other: for each, Podman asks the machine's package manager, a third of a second long.
        info: Json = await self.call("GET", f"{self._libpod}/info")
        security: Json = info["host"]["security"]
        runtime, runtime_version = _podman_runtime(info)
        return EngineFacts(
            podman=True,
            version=str(info["version"]["Version"]),
            api_version=self._prefix.removeprefix("/v"),
            runtime=runtime,
            runtime_version=runtime_version,
            rootless=bool(security.get("rootless")),
            seccomp=bool(security.get("seccompEnabled")),
            remapped_uid=None,
            cdi=True,
            root_folder=Path(str(info["store"]["graphRoot"])),
            seccomp_profile=Path(str(security["seccompProfilePath"])),
        )

    # --- containers ---------------------------------------------------------------------------------------------------

    async def create(self, name: str, body: Json) -> str:
        """The new container's id. Raises EngineError with CONFLICT when there is one of that name."""
        if self._libpod:
            answer = await self.call("POST", f"{self._libpod}/containers/create", body={**body, "name": name})
        else:
            answer = await self.call("POST", f"{self._prefix}/containers/create", query={"name": name}, body=body)
        return str(answer["Id"])

    async def start(self, name: str) -> None:
        await self.call("POST", f"{self._prefix}/containers/{name}/start")

    async def inspect(self, name: str) -> Json | None:
        """None: there is no such container."""
        try:
            return await self.call("GET", f"{self._prefix}/containers/{name}/json")
        except EngineError as error:
            if error.status == NOT_FOUND:
                return None
            raise

    async def kill(self, name: str, signal: str = "SIGKILL") -> None:
        """Nothing happens to a container that does not run."""
        try:
            await self.call("POST", f"{self._prefix}/containers/{name}/kill", query={"signal": signal})
        except EngineError as error:
            if error.status not in (NOT_FOUND, CONFLICT) and _NOT_RUNNING not in error.message:
                raise

    async def wait(self, name: str) -> None:
        """Until it does not run any more, or is not there."""
        if self._libpod:
            # Podman looks now and then, by default four times a second.
            path, query = f"{self._libpod}/containers/{name}/wait", {"condition": "stopped", "interval": "50ms"}
        else:
            path, query = f"{self._prefix}/containers/{name}/wait", {"condition": "not-running"}
        try:
            await self.call("POST", path, query=query, forever=True)
        except EngineError as error:
            if error.status != NOT_FOUND:
                raise

    async def remove(self, name: str) -> None:
        """Kill and remove it, with its anonymous volumes. Idempotent."""
        # Podman would wait ten seconds for a SIGTERM to be obeyed; Docker kills at once anyway.
        query = {"force": "true", "v": "true", "timeout": "0"}
        for left in reversed(range(REMOVE_TRIES)):
            try:
                await self.call("DELETE", f"{self._libpod or self._prefix}/containers/{name}", query=query)
            except EngineError as error:
                # 409: somebody, perhaps a daemon before this one, is removing it at this moment.
                if error.status in (NOT_FOUND, CONFLICT):
                    return
                # Podman tidies up behind a container that has just ended, and a mount of it is busy meanwhile.
                if error.status < _UNAVAILABLE_STATUS or not left:
                    raise
                await asyncio.sleep(REMOVE_PAUSE_SECONDS)
            else:
                return

    async def containers(self, label: str) -> list[Json]:
        """All containers that carry `label` (`name=value`), running or not."""
        filters = json.dumps({"label": [label]})
        return await self.call("GET", f"{self._prefix}/containers/json", query={"all": "true", "filters": filters})

    async def stats(self, name: str) -> Json:
        query = {"stream": "false"} if self._libpod else {"stream": "false", "one-shot": "true"}
        return await self.call("GET", f"{self._prefix}/containers/{name}/stats", query=query)

    # --- networks -----------------------------------------------------------------------------------------------------

    async def network(self, name: str) -> bool:
        """Whether there is one of that name."""
        try:
            await self.call("GET", f"{self._libpod or self._prefix}/networks/{name}{'/json' if self._libpod else ''}")
        except EngineError as error:
            if error.status == NOT_FOUND:
                return False
            raise
        return True

    async def create_network(
        self, name: str, bridge: str, subnet: str, labels: Mapping[str, str], *, gateway: str = "", mtu: int = 0
    ) -> None:
        """A bridge that is called `bridge` on the machine, with IPv4 only. Raises EngineError."""
        own_gateway = {"gateway": gateway} if gateway else {}
        if self._libpod:
            body: Json = {
                "name": name, "driver": "bridge", "network_interface": bridge,
                "options": {"mtu": str(mtu)} if mtu else {},
                "subnets": [{"subnet": subnet, **own_gateway}],
                "dns_enabled": False, "ipv6_enabled": False, "labels": dict(labels),
            }  # fmt: skip
        else:
            body = {
                "Name": name, "Driver": "bridge", "CheckDuplicate": True, "EnableIPv6": False, "Labels": dict(labels),
                "IPAM": {"Driver": "default", "Config": [{"Subnet": subnet, **_capitalised(own_gateway)}]},
                "Options": {
                    "com.docker.network.bridge.name": bridge,
                    **({"com.docker.network.driver.mtu": str(mtu)} if mtu else {}),
                },
            }  # fmt: skip
        await self.call("POST", f"{self._libpod or self._prefix}/networks/create", body=body)

    async def remove_network(self, name: str) -> None:
        """Idempotent; its containers must be gone."""
        try:
            await self.call("DELETE", f"{self._libpod or self._prefix}/networks/{name}")
        except EngineError as error:
            if error.status != NOT_FOUND:
                raise

    async def networks(self, label: str) -> list[tuple[str, Mapping[str, str]]]:
        """Names and labels of all networks that carry `label` (`name=value`)."""
        query = {"filters": json.dumps({"label": [label]})}
        path = f"{self._libpod}/networks/json" if self._libpod else f"{self._prefix}/networks"
        found: list[Json] = await self.call("GET", path, query=query) or []
        return [(str(it.get("Name") or it.get("name")), it.get("Labels") or it.get("labels") or {}) for it in found]

    # --- images -------------------------------------------------------------------------------------------------------

    async def image(self, reference: str) -> Json | None:
        """None: it does not lie on this machine."""
        try:
            return await self.call("GET", f"{self._prefix}/images/{reference}/json")
        except EngineError as error:
            if error.status == NOT_FOUND:
                return None
            raise

    async def remove_image(self, reference: str) -> bool:
        """False while a container needs it."""
        try:
            await self.call("DELETE", f"{self._prefix}/images/{reference}")
        except EngineError as error:
            if error.status == CONFLICT:
                return False
            if error.status != NOT_FOUND:
                raise
        return True

    async def pull(self, reference: str, auth: str) -> AsyncIterator[Json]:
        """What the engine tells while it pulls, one object per line; an object with `error` is the last.

        `auth` is the header X-Registry-Auth; the engine keeps it no longer than this call.
        """
        headers = {"X-Registry-Auth": auth} if auth else {}
        query = {"fromImage": reference}
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        try:
            async with self._http.stream(
                "POST", f"{self._prefix}/images/create", params=query, headers=headers, timeout=timeout
            ) as answer:
                if answer.status_code >= httpx.codes.BAD_REQUEST:
                    await answer.aread()
                    raise _error(answer)
                async for line in answer.aiter_lines():
                    if line.strip():
                        yield cast("Json", json.loads(line))
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    # --- one call -----------------------------------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        forever: bool = False,
    ) -> Any:
        """The decoded answer, None where it is empty. Raises EngineError, EngineUnreachable."""
        answer = await self._request(method, path, query=query, body=body, forever=forever)
        return answer.json() if answer.content.strip() else None

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        forever: bool = False,
    ) -> httpx.Response:
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS) if forever else httpx.USE_CLIENT_DEFAULT
        try:
            answer = await self._http.request(method, path, params=query, json=body, timeout=timeout)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if answer.status_code >= httpx.codes.BAD_REQUEST:
            raise _error(answer)
        return answer

    def _unreachable(self, error: httpx.TransportError) -> EngineUnreachable:
        return EngineUnreachable(f"no container engine answers at {self.socket}: {error or type(error).__name__}")


def _capitalised(words: Mapping[str, str]) -> Json:
    """As Docker writes what Podman writes in small letters."""
    return {name.capitalize(): text for name, text in words.items()}


def _error(answer: httpx.Response) -> EngineError:
    try:
        said = answer.json()
        # Podman puts the cause beside the message.
        message = str(said.get("message") or said.get("cause") or said)
    except ValueError:
        message = answer.text.strip()
    return EngineError(answer.status_code, message)


def _docker_runtime(components: Mapping[str, Json]) -> tuple[str, str]:
    part = components.get("runc")
    if part is None:
        return "", ""
    details: Json = part.get("Details") or {}
    commit = str(details.get("GitCommit", ""))
    # Distributions write their own revision where upstream writes the commit.
    version = str(part["Version"])
    return "runc", commit if commit.startswith(version) else version


def _podman_runtime(info: Json) -> tuple[str, str]:
    runtime: Json = info["host"]["ociRuntime"]
    lines = str(runtime.get("version", "")).splitlines()
    version = lines[0].rsplit(" ", 1)[-1] if lines else ""
    commits = [line.partition(": ")[2] for line in lines if line.startswith("commit: ")]
    return str(runtime["name"]), commits[0] if commits and commits[0].startswith(version) else version


def _remapped_uid(options: Sequence[str], root_folder: str) -> int | None:
    """An engine with `userns-remap` keeps its data in a folder named for the range: `/var/lib/docker/165536.165536`."""
    if "name=userns" not in options:
        return None
    first = Path(root_folder).name.partition(".")[0]
    return int(first) if first.isdigit() else None
