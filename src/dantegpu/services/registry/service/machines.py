"""Register machines, look at them, say what they shall do."""

from collections.abc import Iterable, Sequence
from uuid import UUID

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import events_pb2, machine_pb2, registry_pb2
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import MachineId, TeamId
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Tx
from dantegpu.kit.errors import InvalidArgument
from dantegpu.kit.outbox import Outbox
from dantegpu.kit.paging import decode_cursor, encode_cursor, page_limit
from dantegpu.services.registry import store
from dantegpu.services.registry.errors import MachineHasLeft, MachineNotFound, MachineOfAnotherTeam
from dantegpu.services.registry.service import inventories
from dantegpu.services.registry.store import MachineRow

MAX_IDS_PER_CALL = 1000

_INTENTS = {
    registry_pb2.INTENT_ACTIVE: "active",
    registry_pb2.INTENT_PAUSED: "paused",
    registry_pb2.INTENT_DRAINING: "draining",
    registry_pb2.INTENT_LEFT: "left",
}
_INTENT_VALUES = {name: value for value, name in _INTENTS.items()}


class Machines:
    """Machines join, are shown, and do what their owner wants of them."""

    def __init__(self, outbox: Outbox, clock: Clock) -> None:
        self._outbox = outbox
        self._clock = clock

    async def register(
        self, tx: Tx, actor: Actor, machine_id: MachineId, team_id: TeamId, inventory: machine_pb2.Inventory
    ) -> MachineRow:
        """The machine as enrolled; again with the same inventory changes nothing. Raises MachineOfAnotherTeam,
        InvalidInventory."""
        actor.require_service()
        checked = inventories.checked(machine_id, inventory)
        row = await store.register(tx, machine_id, team_id, checked, self._clock.now())
        if row is not None:
            await emit(self._outbox, tx, [row])
            return row
        row = (await store.by_id(tx, [machine_id]))[machine_id.uuid]
        if row.team_id != team_id.uuid:
            raise MachineOfAnotherTeam(machine_id)
        return row

    async def get(self, tx: Tx, actor: Actor, machine_ids: Sequence[MachineId]) -> list[MachineRow]:
        """The machines in the order asked for. Raises MachineNotFound for the first that the actor may not see."""
        if len(machine_ids) > MAX_IDS_PER_CALL:
            raise InvalidArgument(f"machine_ids: {len(machine_ids)} ids, at most {MAX_IDS_PER_CALL} per call")
        rows = await store.by_id(tx, machine_ids)
        for machine_id in machine_ids:
            row = rows.get(machine_id.uuid)
            if row is None or not _may_see(actor, row):
                raise MachineNotFound(machine_id)
        return [rows[machine_id.uuid] for machine_id in machine_ids]

    async def list_machines(
        self, tx: Tx, actor: Actor, *, cursor: str, limit: int, all_teams: bool
    ) -> tuple[list[MachineRow], str]:
        """A page of the team's machines that have not left, in order of enrolment, and the next page's cursor."""
        if all_teams:
            actor.require_operator()
        team_id = None if all_teams else actor.require_team()
        after = _after(cursor) if cursor else None
        size = page_limit(limit)
        rows = await store.page(tx, team_id, after, size + 1)
        more = len(rows) > size
        rows = rows[:size]
        return rows, encode_cursor(str(MachineId(rows[-1].id))) if more else ""

    async def set_intent(
        self, tx: Tx, actor: Actor, machine_id: MachineId, intent: "registry_pb2.MachineIntent.ValueType"
    ) -> MachineRow:
        """Raises MachineNotFound, Forbidden for viewers, MachineHasLeft."""
        wanted = _INTENTS.get(intent)
        if wanted is None:
            raise InvalidArgument("intent: expected active, paused, draining or left")
        row = await store.lock(tx, machine_id)
        if row is None or not _may_see(actor, row):
            raise MachineNotFound(machine_id)
        if not (actor.is_service or actor.operator):
            actor.require_writer()
        if row.intent == wanted:
            return row
        if row.intent == "left":
            raise MachineHasLeft(machine_id)
        row = await store.set_intent(tx, machine_id, wanted)
        await emit(self._outbox, tx, [row])
        return row

    async def snapshot(self, tx: Tx, actor: Actor) -> tuple[int, list[MachineRow]]:
        """All machines that have not left; what changes after the revision comes as events. Services only."""
        actor.require_service()
        return await store.snapshot(tx)


async def emit(outbox: Outbox, tx: Tx, rows: Iterable[MachineRow]) -> None:
    """MachineChanged for each row, once `tx` has committed."""
    await outbox.add(
        tx,
        [
            (subjects.machine_event(MachineId(row.id)), events_pb2.MachineChanged(machine=machine_message(row)))
            for row in rows
        ],
    )


def machine_message(row: MachineRow) -> registry_pb2.Machine:
    message = registry_pb2.Machine.FromString(row.device_utilisation)
    message.id = str(MachineId(row.id))
    message.team_id = str(TeamId(row.team_id))
    message.inventory.ParseFromString(row.inventory)
    message.status = status_of(row)
    message.intent = _INTENT_VALUES[row.intent]
    message.running_attempts = row.running_attempts
    message.cpu_utilisation = row.cpu_utilisation
    message.memory_used_bytes = row.memory_used_bytes
    message.revision = row.revision
    message.joined_at.FromDatetime(row.joined_at)
    if row.last_heartbeat_at is not None:
        message.last_heartbeat_at.FromDatetime(row.last_heartbeat_at)
    return message


def status_of(row: MachineRow) -> "registry_pb2.MachineStatus.ValueType":
    """What people see: first whether the machine is there, then what it shall do, then what it does."""
    if row.intent == "left":
        return registry_pb2.MACHINE_LEFT
    if row.liveness == "offline":
        return registry_pb2.MACHINE_OFFLINE
    if row.liveness == "unknown":
        return registry_pb2.MACHINE_UNKNOWN
    if row.intent == "draining":
        return registry_pb2.MACHINE_DRAINING
    if row.intent == "paused":
        return registry_pb2.MACHINE_PAUSED
    return registry_pb2.MACHINE_BUSY if row.running_attempts else registry_pb2.MACHINE_IDLE


def _may_see(actor: Actor, row: MachineRow) -> bool:
    if actor.is_service or actor.operator:
        return True
    if actor.machine_id is not None:
        return actor.machine_id.uuid == row.id
    return actor.team_id is not None and actor.team_id.uuid == row.team_id


def _after(cursor: str) -> UUID:
    return MachineId.parse(decode_cursor(cursor, str)[0]).uuid
