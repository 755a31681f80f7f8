"""provider-registry-service's gRPC door: one transaction per call, rows to protobuf."""

from typing import TYPE_CHECKING, Any, override

from dantegpu.contracts.gen.dante.v1 import registry_pb2 as pb
from dantegpu.contracts.gen.dante.v1.registry_pb2_grpc import RegistryServiceServicer
from dantegpu.domain.ids import MachineId, TeamId
from dantegpu.kit.actor import current_actor
from dantegpu.kit.db import Database
from dantegpu.services.registry.service.machines import Machines, machine_message

if TYPE_CHECKING:
    from grpc import aio

    type Context = aio.ServicerContext[Any, Any]


class RegistryRpc(RegistryServiceServicer):
    def __init__(self, db: Database, machines: Machines) -> None:
        self._db = db
        self._machines = machines

    @override
    async def RegisterMachine(
        self, request: pb.RegisterMachineRequest, context: "Context"
    ) -> pb.RegisterMachineResponse:
        machine_id, team_id = MachineId.parse(request.machine_id), TeamId.parse(request.team_id)
        async with self._db.transaction() as tx:
            row = await self._machines.register(tx, current_actor(), machine_id, team_id, request.inventory)
        return pb.RegisterMachineResponse(machine=machine_message(row))

    @override
    async def GetMachines(self, request: pb.GetMachinesRequest, context: "Context") -> pb.GetMachinesResponse:
        machine_ids = [MachineId.parse(machine_id) for machine_id in request.machine_ids]
        async with self._db.transaction() as tx:
            rows = await self._machines.get(tx, current_actor(), machine_ids)
        return pb.GetMachinesResponse(machines=map(machine_message, rows))

    @override
    async def ListMachines(self, request: pb.ListMachinesRequest, context: "Context") -> pb.ListMachinesResponse:
        async with self._db.transaction() as tx:
            rows, next_cursor = await self._machines.list_machines(
                tx,
                current_actor(),
                cursor=request.page.cursor,
                limit=request.page.limit,
                all_teams=request.all_teams,
            )
        return pb.ListMachinesResponse(machines=map(machine_message, rows), next_cursor=next_cursor)

    @override
    async def SetMachineIntent(
        self, request: pb.SetMachineIntentRequest, context: "Context"
    ) -> pb.SetMachineIntentResponse:
        machine_id = MachineId.parse(request.machine_id)
        async with self._db.transaction() as tx:
            row = await self._machines.set_intent(tx, current_actor(), machine_id, request.intent)
        return pb.SetMachineIntentResponse(machine=machine_message(row))

    @override
    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: "Context") -> pb.GetSnapshotResponse:
        async with self._db.transaction() as tx:
            revision, rows = await self._machines.snapshot(tx, current_actor())
        return pb.GetSnapshotResponse(machines=map(machine_message, rows), revision=revision)
