"""/v1/wallet, and what only the operator may do: /v1/admin."""

from typing import Annotated

from fastapi import APIRouter, Query

from dantegpu.contracts.gen.dante.v1 import auth_pb2, billing_pb2, common_pb2, jobs_pb2, registry_pb2
from dantegpu.contracts.rest import accounts, billing, jobs, machines
from dantegpu.domain.job import JobState
from dantegpu.kit import rpc
from dantegpu.services.gateway import convert
from dantegpu.services.gateway.context import IdempotencyKey, MachineIdPath, Operator, Paging, Platform, WalletReader

router = APIRouter()


@router.get("/v1/wallet", tags=["wallet"], summary="Your team's money")
async def get_wallet(_actor: WalletReader, platform: Platform) -> billing.Wallet:
    response = await rpc.call(platform.clients.billing.GetWallet, billing_pb2.GetWalletRequest())
    return convert.wallet(response.wallet)


@router.get("/v1/wallet/entries", tags=["wallet"], summary="What went in and out, newest first")
async def list_entries(_actor: WalletReader, page: Paging, platform: Platform) -> billing.EntryPage:
    response = await rpc.call(platform.clients.billing.ListEntries, billing_pb2.ListEntriesRequest(page=page))
    entries = [convert.entry(entry) for entry in response.entries]
    return billing.EntryPage(entries=entries, next_cursor=response.next_cursor or None)


@router.post("/v1/admin/credits", status_code=201, tags=["operator"], summary="Credit a team's wallet")
async def credit(body: billing.Credit, _actor: Operator, key: IdempotencyKey, platform: Platform) -> billing.Wallet:
    request = billing_pb2.CreditRequest(
        team_id=body.team_id, amount_udgpu=body.amount_udgpu, text=body.text, idempotency_key=key
    )
    return convert.wallet((await rpc.call(platform.clients.billing.Credit, request)).wallet)


@router.get("/v1/admin/ledger", tags=["operator"], summary="Check the books")
async def check_ledger(_actor: Operator, platform: Platform) -> billing.LedgerCheck:
    response = await rpc.call(platform.clients.billing.CheckLedger, common_pb2.Empty(), timeout_seconds=30)
    return billing.LedgerCheck(
        balanced=response.balanced,
        accounts=response.accounts,
        transfers=response.transfers,
        open_holds=response.open_holds,
        sum_udgpu=response.sum_udgpu,
        problems=list(response.problems),
    )


@router.get("/v1/admin/teams", tags=["operator"], summary="Every team")
async def list_all_teams(_actor: Operator, page: Paging, platform: Platform) -> accounts.TeamPage:
    response = await rpc.call(platform.clients.auth.ListTeams, auth_pb2.ListTeamsRequest(page=page))
    teams = [convert.team(team) for team in response.teams]
    return accounts.TeamPage(teams=teams, next_cursor=response.next_cursor or None)


@router.get("/v1/admin/jobs", tags=["operator"], summary="Every team's jobs, newest first")
async def list_all_jobs(
    _actor: Operator, page: Paging, platform: Platform, state: Annotated[list[JobState] | None, Query()] = None
) -> jobs.JobPage:
    states = [jobs_pb2.JobState.Value(each.value) for each in state or ()]
    request = jobs_pb2.ListJobsRequest(page=page, states=states, all_teams=True)
    response = await rpc.call(platform.clients.jobs.ListJobs, request)
    found = [convert.job(job) for job in response.jobs]
    return jobs.JobPage(jobs=found, next_cursor=response.next_cursor or None)


@router.get("/v1/admin/quarantines", tags=["operator"], summary="Machines that are shut out for a while, and why")
async def list_quarantines(_actor: Operator, platform: Platform) -> machines.Quarantines:
    response = await rpc.call(platform.clients.jobs.ListQuarantines, jobs_pb2.ListQuarantinesRequest())
    return machines.Quarantines(quarantines=[convert.quarantine(each) for each in response.quarantines])


@router.post("/v1/admin/machines/{machine_id}/release", tags=["operator"], summary="End a machine's quarantine")
async def release_machine(machine_id: MachineIdPath, _actor: Operator, platform: Platform) -> machines.Quarantines:
    """Answers the quarantine that it ended; none when the machine was in none."""
    known = registry_pb2.GetMachinesRequest(machine_ids=[machine_id])
    await rpc.call(platform.clients.registry.GetMachines, known)
    request = jobs_pb2.ReleaseMachinesRequest(machine_ids=[machine_id])
    response = await rpc.call(platform.clients.jobs.ReleaseMachines, request)
    return machines.Quarantines(quarantines=[convert.quarantine(each) for each in response.released])
