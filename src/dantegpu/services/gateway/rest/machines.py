"""/v1/machines and /v1/offers."""

from typing import Annotated

import structlog
from fastapi import APIRouter, Query

from dantegpu.contracts.gen.dante.v1 import auth_pb2, jobs_pb2, marketplace_pb2, registry_pb2
from dantegpu.contracts.rest import machines
from dantegpu.domain.resources import parse_gpu_spec
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.errors import InvalidArgument, RemoteError, Unavailable
from dantegpu.services.gateway import convert
from dantegpu.services.gateway.context import (
    JobReader,
    MachineIdPath,
    MachineReader,
    MachineWriter,
    Paging,
    Platform,
)

log = structlog.get_logger(__name__)

router = APIRouter(tags=["machines"])


def _credentials(proto: auth_pb2.MachineCredential, platform: Platform) -> machines.MachineCredentials:
    return machines.MachineCredentials(
        machine_id=proto.machine_id,
        team_id=proto.team_id,
        nats_url=platform.settings.public_nats_url or platform.settings.nats_url,
        nats_user_jwt=proto.nats_user_jwt,
        expires_at=convert.when(proto.expires_at),
    )


@router.post("/v1/machines", status_code=201, summary="Enrol a machine (called by its daemon)")
async def enrol(body: machines.EnrolMachine, platform: Platform) -> machines.MachineCredentials:
    """The join token says whose machine it is. The same public key again answers the same machine."""
    request = auth_pb2.EnrolMachineRequest(
        join_token=body.join_token.get_secret_value(),
        public_key=body.public_key,
        signed_at_unix_s=body.signed_at,
        signature=body.signature,
    )
    response = await rpc.call(platform.clients.auth.EnrolMachine, request, actor=SERVICE)
    credential = response.credential
    registration = registry_pb2.RegisterMachineRequest(
        machine_id=credential.machine_id,
        team_id=credential.team_id,
        inventory=convert.inventory_to_proto(body.inventory),
    )
    await rpc.call(platform.clients.registry.RegisterMachine, registration, actor=SERVICE)
    return _credentials(credential, platform)


@router.post("/v1/machines/{machine_id}/credentials", summary="Renew a machine's credentials (called by its daemon)")
async def renew(
    machine_id: MachineIdPath, body: machines.RenewMachine, platform: Platform
) -> machines.MachineCredentials:
    request = auth_pb2.RenewMachineRequest(
        machine_id=machine_id, signed_at_unix_s=body.signed_at, signature=body.signature
    )
    response = await rpc.call(platform.clients.auth.RenewMachine, request, actor=SERVICE)
    return _credentials(response.credential, platform)


@router.get("/v1/machines", summary="Your machines")
async def list_machines(
    actor: MachineReader,
    page: Paging,
    platform: Platform,
    all_teams: Annotated[bool, Query(description="Everybody's; only for the operator")] = False,
) -> machines.MachinePage:
    if all_teams:
        actor.require_operator()
    request = registry_pb2.ListMachinesRequest(page=page, all_teams=all_teams)
    response = await rpc.call(platform.clients.registry.ListMachines, request)
    found = [convert.machine(machine) for machine in response.machines]
    await _note_quarantines(platform, found)
    return machines.MachinePage(machines=found, next_cursor=response.next_cursor or None)


@router.get("/v1/machines/{machine_id}", summary="One of your machines")
async def get_machine(machine_id: MachineIdPath, _actor: MachineReader, platform: Platform) -> machines.Machine:
    request = registry_pb2.GetMachinesRequest(machine_ids=[machine_id])
    response = await rpc.call(platform.clients.registry.GetMachines, request)
    machine = convert.machine(response.machines[0])
    await _note_quarantines(platform, [machine])
    return machine


async def _note_quarantines(platform: Platform, found: list[machines.Machine]) -> None:
    """Tell providers why their machines get no work. What is not the caller's own has no intent, and is not told of."""
    own = {machine.id: machine for machine in found if machine.intent is not None}
    if not own:
        return
    request = jobs_pb2.ListQuarantinesRequest(machine_ids=list(own))
    try:
        answer = await rpc.call(platform.clients.jobs.ListQuarantines, request, actor=SERVICE)
    except (Unavailable, RemoteError) as error:
        log.warning("quarantines_not_known", error=error.message)  # the machines are shown all the same
        return
    for each in answer.quarantines:
        own[each.machine_id].quarantine = convert.quarantine(each)


async def _set_intent(
    platform: Platform, machine_id: str, intent: "registry_pb2.MachineIntent.ValueType"
) -> machines.Machine:
    request = registry_pb2.SetMachineIntentRequest(machine_id=machine_id, intent=intent)
    response = await rpc.call(platform.clients.registry.SetMachineIntent, request)
    return convert.machine(response.machine)


@router.post("/v1/machines/{machine_id}/pause", summary="Take nothing new; what runs goes on")
async def pause(machine_id: MachineIdPath, _actor: MachineWriter, platform: Platform) -> machines.Machine:
    return await _set_intent(platform, machine_id, registry_pb2.INTENT_PAUSED)


@router.post("/v1/machines/{machine_id}/resume", summary="Take new work again")
async def resume(machine_id: MachineIdPath, _actor: MachineWriter, platform: Platform) -> machines.Machine:
    return await _set_intent(platform, machine_id, registry_pb2.INTENT_ACTIVE)


@router.post("/v1/machines/{machine_id}/drain", summary="Finish what runs, take nothing new")
async def drain(machine_id: MachineIdPath, _actor: MachineWriter, platform: Platform) -> machines.Machine:
    return await _set_intent(platform, machine_id, registry_pb2.INTENT_DRAINING)


@router.post("/v1/machines/{machine_id}/leave", summary="Leave the platform for good")
async def leave(machine_id: MachineIdPath, _actor: MachineWriter, platform: Platform) -> machines.Machine:
    """Its credentials are renewed no more. What still runs there is moved to other machines."""
    machine = await _set_intent(platform, machine_id, registry_pb2.INTENT_LEFT)
    await rpc.call(platform.clients.auth.RevokeMachine, auth_pb2.RevokeMachineRequest(machine_id=machine_id))
    return machine


@router.get("/v1/machines/{machine_id}/ask", summary="The price of a machine")
async def get_ask(machine_id: MachineIdPath, _actor: MachineReader, platform: Platform) -> machines.Ask:
    owned = registry_pb2.GetMachinesRequest(machine_ids=[machine_id])
    await rpc.call(platform.clients.registry.GetMachines, owned)
    request = marketplace_pb2.ListAsksRequest(machine_ids=[machine_id])
    response = await rpc.call(platform.clients.marketplace.ListAsks, request)
    found = convert.ask(response.asks[0] if response.asks else response.default_ask)
    return found.model_copy(update={"machine_id": machine_id})


@router.put("/v1/machines/{machine_id}/ask", summary="Set the price of a machine")
async def set_ask(
    machine_id: MachineIdPath, body: machines.SetAsk, _actor: MachineWriter, platform: Platform
) -> machines.Ask:
    """Jobs that run already keep the price that they were placed at."""
    request = marketplace_pb2.SetAskRequest(
        machine_id=machine_id,
        price_udgpu_per_gpu_hour=body.price_udgpu_per_gpu_hour,
        price_udgpu_per_cpu_hour=body.price_udgpu_per_cpu_hour,
    )
    return convert.ask((await rpc.call(platform.clients.marketplace.SetAsk, request)).ask)


@router.get("/v1/offers", tags=["offers"], summary="Machines for rent, cheapest first")
async def list_offers(
    _actor: JobReader,
    page: Paging,
    platform: Platform,
    gpu: Annotated[str, Query(max_length=500, description="GPU spec such as `RTX4090:2` or `24GB`; empty: all")] = "",
) -> machines.OfferPage:
    try:
        spec = str(parse_gpu_spec(gpu)) if gpu.strip() else ""
    except ValueError as error:
        raise InvalidArgument(str(error), field="gpu") from error
    response = await rpc.call(
        platform.clients.marketplace.ListOffers, marketplace_pb2.ListOffersRequest(gpu=spec, page=page)
    )
    offers = [convert.offer(offer) for offer in response.offers]
    return machines.OfferPage(offers=offers, next_cursor=response.next_cursor or None)
