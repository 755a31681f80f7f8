"""gRPC edge of the registry: one transaction per call."""

from typing import Any

from dantegpu.contracts.gen.dante.v1 import registry_pb2, registry_pb2_grpc
from dantegpu.domain.ids import MachineId, TeamId
from dantegpu.kit.actor import current_actor
from dantegpu.kit.db import Database
from dantegpu.services.registry.service import RegistryService, machine_message


class RegistryRpc(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(self, db: Database, service: RegistryService) -> None:
        self._db = db
        self._service = service

    async def RegisterMachine(
        self, request: registry_pb2.RegisterMachineRequest, context: Any
    ) -> registry_pb2.RegisterMachineResponse:
        async with self._db.transaction() as tx:
            row = await self._service.register(
                tx,
                current_actor(),
                MachineId.parse(request.machine_id),
                TeamId.parse(request.team_id),
                request.inventory,
            )
        return registry_pb2.RegisterMachineResponse(machine=machine_message(row))

    async def GetMachines(
        self, request: registry_pb2.GetMachinesRequest, context: Any
    ) -> registry_pb2.GetMachinesResponse:
        ids = [MachineId.parse(machine_id) for machine_id in request.machine_ids]
        async with self._db.transaction() as tx:
            rows = await self._service.get(tx, current_actor(), ids)
        return registry_pb2.GetMachinesResponse(machines=[machine_message(row) for row in rows])

    async def ListMachines(
        self, request: registry_pb2.ListMachinesRequest, context: Any
    ) -> registry_pb2.ListMachinesResponse:
        async with self._db.transaction() as tx:
            rows, next_cursor = await self._service.list_machines(
                tx,
                current_actor(),
                cursor=request.page.cursor,
                limit=request.page.limit,
                all_teams=request.all_teams,
            )
        return registry_pb2.ListMachinesResponse(
            machines=[machine_message(row) for row in rows], next_cursor=next_cursor
        )

    async def SetMachineIntent(
        self, request: registry_pb2.SetMachineIntentRequest, context: Any
    ) -> registry_pb2.SetMachineIntentResponse:
        async with self._db.transaction() as tx:
            row = await self._service.set_intent(
                tx, current_actor(), MachineId.parse(request.machine_id), request.intent
            )
        return registry_pb2.SetMachineIntentResponse(machine=machine_message(row))

    async def GetSnapshot(
        self, request: registry_pb2.GetSnapshotRequest, context: Any
    ) -> registry_pb2.GetSnapshotResponse:
        async with self._db.transaction() as tx:
            rows = await self._service.snapshot(tx, current_actor())
        return registry_pb2.GetSnapshotResponse(
            machines=[machine_message(row) for row in rows], revision=max((row.revision for row in rows), default=0)
        )
