"""Machines join, tell how they are, are told what their owner wants, and fall silent."""

from collections.abc import Sequence
from datetime import timedelta

from google.protobuf.message import Message

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import events_pb2, machine_pb2, registry_pb2
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import DeviceId, MachineId, TeamId
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.outbox import Outbox
from dantegpu.kit.paging import page_limit
from dantegpu.services.registry import store
from dantegpu.services.registry.errors import InvalidInventory, MachineHasLeft, MachineNotFound
from dantegpu.services.registry.settings import RegistrySettings
from dantegpu.services.registry.store import HeartbeatRow, MachineRow

MAX_DEVICES = 64
MAX_TEXT = 200
MAX_ATTEMPTS = 1_000_000

_INTENTS = {
    registry_pb2.INTENT_ACTIVE: "ACTIVE",
    registry_pb2.INTENT_PAUSED: "PAUSED",
    registry_pb2.INTENT_DRAINING: "DRAINING",
    registry_pb2.INTENT_LEFT: "LEFT",
}
_INTENT_VALUES = {text: value for value, text in _INTENTS.items()}


class RegistryService:
    def __init__(self, db: Database, outbox: Outbox, clock: Clock, settings: RegistrySettings) -> None:
        self._db = db
        self._outbox = outbox
        self._clock = clock
        self._settings = settings

    async def register(
        self, tx: Tx, actor: Actor, machine_id: MachineId, team_id: TeamId, inventory: machine_pb2.Inventory
    ) -> MachineRow:
        """Add a machine that auth has enrolled, or take it in again. Raises MachineNotFound, InvalidInventory."""
        actor.require_service()
        row = await store.upsert_machine(
            tx,
            id=machine_id.uuid,
            team_id=team_id.uuid,
            inventory=checked_inventory(machine_id, inventory).SerializeToString(deterministic=True),
            now=self._clock.now(),
        )
        if row is None:
            raise MachineNotFound(machine_id)
        await self._tell(tx, [row])
        return row

    async def get(self, tx: Tx, actor: Actor, machine_ids: Sequence[MachineId]) -> list[MachineRow]:
        rows = await store.machines_by_id(tx, [machine_id.uuid for machine_id in machine_ids])
        for machine_id in machine_ids:
            self._require_visible(actor, machine_id, rows.get(machine_id.uuid))
        return [rows[machine_id.uuid] for machine_id in machine_ids]

    def _require_visible(self, actor: Actor, machine_id: MachineId, row: MachineRow | None) -> None:
        if row is None or not (actor.is_service or actor.operator or actor.team_id == TeamId(row.team_id)):
            raise MachineNotFound(machine_id)

    async def list_machines(
        self, tx: Tx, actor: Actor, *, cursor: str, limit: int, all_teams: bool
    ) -> tuple[list[MachineRow], str]:
        """In order of joining; the rows and the next page's cursor."""
        if all_teams:
            actor.require_operator()
        size = page_limit(limit)
        rows = await store.list_machines(
            tx,
            team_id=None if all_teams else actor.require_team().uuid,
            after=MachineId.parse(cursor).uuid if cursor else None,
            limit=size + 1,
        )
        return rows[:size], str(MachineId(rows[size - 1].id)) if len(rows) > size else ""

    async def set_intent(
        self, tx: Tx, actor: Actor, machine_id: MachineId, intent: "registry_pb2.MachineIntent.ValueType"
    ) -> MachineRow:
        """What the owner wants of the machine. Raises MachineNotFound, MachineHasLeft."""
        actor.require_writer()
        row = (await store.lock_machines(tx, [machine_id.uuid])).get(machine_id.uuid)
        self._require_visible(actor, machine_id, row)
        assert row is not None
        if row.intent == "LEFT":
            if intent == registry_pb2.INTENT_LEFT:
                return row
            raise MachineHasLeft(f"{machine_id} has left the platform; let it join again: `dante provider join`")
        if intent not in _INTENTS:
            raise InvalidInventory("intent: active, paused, draining or left")
        if row.intent == _INTENTS[intent]:
            return row
        row = await store.set_intent(tx, machine_id.uuid, _INTENTS[intent])
        await self._tell(tx, [row])
        return row

    async def snapshot(self, tx: Tx, actor: Actor) -> list[MachineRow]:
        actor.require_service()
        return await store.present_machines(tx)

    async def heartbeats(self, beats: Sequence[tuple[MachineId, machine_pb2.Heartbeat]]) -> None:
        """Fold what arrived, in one transaction. The machine is who NATS says it is."""
        latest = {machine_id: beat for machine_id, beat in beats if beat.machine_id in ("", str(machine_id))}
        alive = {machine_id: beat for machine_id, beat in latest.items() if not beat.leaving}
        inventories = {
            machine_id.uuid: checked_inventory(machine_id, beat.inventory).SerializeToString(deterministic=True)
            for machine_id, beat in beats
            if beat.HasField("inventory") and machine_id in alive
        }
        async with self._db.transaction() as tx:
            await store.lock_machines(tx, [machine_id.uuid for machine_id in latest])
            changed: dict[MachineId, MachineRow] = {}
            if alive:
                await store.fold_heartbeats(
                    tx, [_heartbeat_row(machine_id, beat) for machine_id, beat in alive.items()], self._clock.now()
                )
                revived = await store.revive(tx, [machine_id.uuid for machine_id in alive])
                changed |= {MachineId(row.id): row for row in revived}
            if inventories:
                changed |= {MachineId(row.id): row for row in await store.set_inventories(tx, inventories)}
            if leaving := [machine_id.uuid for machine_id, beat in latest.items() if beat.leaving]:
                changed |= {MachineId(row.id): row for row in await store.go_offline(tx, leaving)}
            await self._tell(tx, list(changed.values()))

    async def sweep(self) -> int:
        """Mark machines whose heartbeats are late; how many changed."""
        now = self._clock.now()
        async with self._db.transaction() as tx:
            changed = await store.mark_silent(
                tx,
                unknown_before=now - timedelta(seconds=self._settings.unknown_after_seconds),
                offline_before=now - timedelta(seconds=self._settings.offline_after_seconds),
            )
            await self._tell(tx, changed)
        return len(changed)

    async def _tell(self, tx: Tx, rows: Sequence[MachineRow]) -> None:
        events: list[tuple[str, Message]] = [
            (subjects.machine_event(MachineId(row.id)), events_pb2.MachineChanged(machine=machine_message(row)))
            for row in rows
        ]
        await self._outbox.add(tx, events)


def checked_inventory(machine_id: MachineId, inventory: machine_pb2.Inventory) -> machine_pb2.Inventory:
    """The inventory with bounds checked and each device's stable id. Raises InvalidInventory."""
    if len(inventory.devices) > MAX_DEVICES:
        raise InvalidInventory(f"{len(inventory.devices)} devices on one machine; at most {MAX_DEVICES}")
    if min(inventory.cpu_milli, inventory.memory_bytes, inventory.disk_bytes) < 0:
        raise InvalidInventory("CPU, memory and disk of a machine are not negative")
    checked = machine_pb2.Inventory()
    checked.CopyFrom(inventory)
    checked.hostname = inventory.hostname[:MAX_TEXT]
    checked.simulated = any(device.simulated for device in inventory.devices)
    seen: set[str] = set()
    for device in checked.devices:
        name = device.uuid if device.uuid and not device.simulated else f"{device.index}"
        if name in seen or not device.model or device.vram_bytes < 0:
            raise InvalidInventory(f"device {device.index}: every device has a model and an index of its own")
        seen.add(name)
        # From machine and GPU: the same after every restart, and nobody can claim another machine's device.
        device.id = str(DeviceId.derived(machine_id, name))
    return checked


def _heartbeat_row(machine_id: MachineId, beat: machine_pb2.Heartbeat) -> HeartbeatRow:
    return HeartbeatRow(
        id=machine_id.uuid,
        boot_id=beat.boot_id[:MAX_TEXT],
        running_attempts=min(max(beat.running_attempts, 0), MAX_ATTEMPTS),
        cpu_utilisation=beat.cpu_utilisation,
        memory_used_bytes=max(beat.memory_used_bytes, 0),
        device_utilisation=machine_pb2.Heartbeat(devices=beat.devices[:MAX_DEVICES]).SerializeToString(),
    )


def status_of(row: MachineRow) -> "registry_pb2.MachineStatus.ValueType":
    """One word for what the owner wants, whether it is alive and whether it works."""
    if row.intent == "LEFT":
        return registry_pb2.MACHINE_LEFT
    if row.liveness != "ALIVE":
        return registry_pb2.MACHINE_OFFLINE if row.liveness == "OFFLINE" else registry_pb2.MACHINE_UNKNOWN
    if row.intent == "DRAINING":
        return registry_pb2.MACHINE_DRAINING
    if row.intent == "PAUSED":
        return registry_pb2.MACHINE_PAUSED
    return registry_pb2.MACHINE_BUSY if row.running_attempts else registry_pb2.MACHINE_IDLE


def machine_message(row: MachineRow) -> registry_pb2.Machine:
    machine = registry_pb2.Machine(
        id=str(MachineId(row.id)),
        team_id=str(TeamId(row.team_id)),
        inventory=machine_pb2.Inventory.FromString(row.inventory),
        status=status_of(row),
        intent=_INTENT_VALUES[row.intent],
        running_attempts=row.running_attempts,
        cpu_utilisation=row.cpu_utilisation,
        memory_used_bytes=row.memory_used_bytes,
        device_utilisation=machine_pb2.Heartbeat.FromString(row.device_utilisation).devices,
        revision=row.revision,
    )
    machine.last_heartbeat_at.FromDatetime(row.last_heartbeat_at)
    machine.joined_at.FromDatetime(row.joined_at)
    return machine
