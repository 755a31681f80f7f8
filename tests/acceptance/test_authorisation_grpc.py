"""Who may call what inside the platform: every method of the protobuf descriptors, as every kind of actor.

A method that ACCESS does not list fails the test. The gateway speaks for its users here; a machine never does.
"""

from collections.abc import AsyncIterator
from dataclasses import replace
from enum import Enum
from typing import Any

import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from dantegpu.contracts.gen.dante.v1 import (
    auth_pb2,
    billing_pb2,
    common_pb2,
    jobs_pb2,
    marketplace_pb2,
    monitoring_pb2,
    registry_pb2,
    storage_pb2,
)
from dantegpu.domain.ids import ApiKeyId, AttemptId, Id, JobId, MachineId, ScheduleId, TeamId, UserId
from dantegpu.kit import rpc
from dantegpu.kit.actor import ANONYMOUS, SERVICE, Actor
from dantegpu.kit.errors import ErrorStatus, RemoteError
from tests.fixtures.people import new_person
from tests.fixtures.platform import UpPlatform

MODULES = (auth_pb2, billing_pb2, jobs_pb2, marketplace_pb2, monitoring_pb2, registry_pb2, storage_pb2)


class For(Enum):
    """Whom a method lets in, beyond the platform's own services."""

    EVERYBODY = "everybody: the request itself proves who asks"
    LOGGED_IN = "logged-in people, and machines"
    USERS = "logged-in people"
    OPERATOR = "the operator"
    SERVICES = "nobody else"


ACCESS = {
    "AuthService.Register": For.EVERYBODY,
    "AuthService.Login": For.EVERYBODY,
    "AuthService.Refresh": For.EVERYBODY,
    "AuthService.Logout": For.EVERYBODY,
    "AuthService.GetJwks": For.EVERYBODY,
    "AuthService.EnrolMachine": For.EVERYBODY,
    "AuthService.RenewMachine": For.EVERYBODY,
    "AuthService.VerifyApiKeys": For.SERVICES,
    "AuthService.EnsureOperator": For.SERVICES,
    "AuthService.CreateApiKey": For.USERS,
    "AuthService.ListApiKeys": For.USERS,
    "AuthService.RevokeApiKey": For.USERS,
    "AuthService.GetMe": For.USERS,
    "AuthService.CreateTeam": For.USERS,
    "AuthService.ListMembers": For.USERS,
    "AuthService.SetMember": For.USERS,
    "AuthService.ListTeams": For.USERS,
    "AuthService.CreateJoinToken": For.USERS,
    "AuthService.RevokeMachine": For.USERS,
    "BillingService.OpenHolds": For.SERVICES,
    "BillingService.CloseHolds": For.SERVICES,
    "BillingService.ListOpenHolds": For.SERVICES,
    "BillingService.GetWallet": For.USERS,
    "BillingService.ListEntries": For.USERS,
    "BillingService.Credit": For.OPERATOR,
    "BillingService.GetReceipt": For.USERS,
    "BillingService.CheckLedger": For.OPERATOR,
    "JobService.SubmitJobs": For.USERS,
    "JobService.SubmitMany": For.SERVICES,
    "JobService.GetJobs": For.USERS,
    "JobService.ListJobs": For.USERS,
    "JobService.StopJobs": For.USERS,
    "JobService.ListJobEvents": For.USERS,
    "JobService.ExplainJobs": For.USERS,
    "JobService.CreateSchedule": For.USERS,
    "JobService.ListSchedules": For.USERS,
    "JobService.StopSchedules": For.USERS,
    "JobService.ListQuarantines": For.OPERATOR,
    "JobService.ReleaseMachines": For.OPERATOR,
    "JobService.ResolveAttempts": For.SERVICES,
    "MarketplaceService.SetAsk": For.USERS,
    "MarketplaceService.ListAsks": For.LOGGED_IN,
    "MarketplaceService.ListOffers": For.LOGGED_IN,
    "MonitoringService.ReadLogs": For.USERS,
    "MonitoringService.ReadMetrics": For.USERS,
    "RegistryService.RegisterMachine": For.SERVICES,
    "RegistryService.GetMachines": For.LOGGED_IN,
    "RegistryService.ListMachines": For.USERS,
    "RegistryService.SetMachineIntent": For.USERS,
    "RegistryService.GetSnapshot": For.SERVICES,
    "StorageService.PrepareUploads": For.USERS,
    "StorageService.StatBlobs": For.SERVICES,
    "StorageService.PresignUrls": For.SERVICES,
    "StorageService.StatObjects": For.SERVICES,
    "StorageService.PutObject": For.SERVICES,
    "StorageService.GetObject": For.SERVICES,
    "StorageService.DeleteObjects": For.SERVICES,
}
ABOUT_NOTHING = frozenset({ErrorStatus.NOT_FOUND, ErrorStatus.INVALID, ErrorStatus.PRECONDITION})
"""What somebody is told who may ask, and asked about ids of nothing."""
TURNED_AWAY = frozenset({ErrorStatus.FORBIDDEN, ErrorStatus.UNAUTHENTICATED})

VIEWER = Actor(common_pb2.Actor.USER, user_id=UserId.new(), team_id=TeamId.new(), role="viewer")
MACHINE = Actor(common_pb2.Actor.MACHINE, machine_id=MachineId.new())
CHANGES_THINGS = {"JobService.SubmitJobs", "JobService.StopJobs", "StorageService.PrepareUploads"} | {
    "JobService.CreateSchedule", "JobService.StopSchedules",
    "AuthService.CreateJoinToken", "MarketplaceService.SetAsk",
}  # fmt: skip
"""Refused to a viewer before anything is looked up."""

IDS: dict[str, type[Id]] = {
    "team_id": TeamId, "payer_team_id": TeamId, "provider_team_id": TeamId, "machine_id": MachineId,
    "machine_ids": MachineId, "job_id": JobId, "job_ids": JobId, "attempt_id": AttemptId, "attempt_ids": AttemptId,
    "key_id": ApiKeyId, "schedule_ids": ScheduleId,
}  # fmt: skip


def services() -> list[ServiceDescriptor]:
    return [service for module in MODULES for service in module.DESCRIPTOR.services_by_name.values()]


def methods() -> dict[str, MethodDescriptor]:
    return {f"{service.name}.{method.name}": method for service in services() for method in service.methods}


def a_request(kind: type[Message]) -> Message:
    """One with well-formed ids of nothing, so that it fails, if at all, because of who asks."""
    request: Any = kind()
    for field in kind.DESCRIPTOR.fields:
        many = field.is_repeated
        if field.name in IDS:
            value = str(IDS[field.name].new())
            getattr(request, field.name).append(value) if many else setattr(request, field.name, value)
        elif field.name == "holds":
            request.holds.append(a_request(message_class(field.message_type)))
        elif field.name == "email":
            request.email = "nobody@example.org"
        elif field.name == "role":
            request.role = "viewer"
        elif field.name == "intent":
            request.intent = registry_pb2.INTENT_PAUSED
    return request


@pytest.fixture(scope="module")
def user(platform: UpPlatform) -> Actor:
    """Somebody with an account and a team, who owns nothing else."""
    person = new_person(platform, credit_udgpu=0)
    team_id, user_id = TeamId.parse(person.team_id), UserId.parse(person.user_id)
    person.client.close()
    return Actor(common_pb2.Actor.USER, user_id=user_id, team_id=team_id, role="owner")


@pytest.fixture
async def channels(platform: UpPlatform) -> AsyncIterator[rpc.Channels]:
    channels = rpc.Channels({"platform": platform.running.grpc})
    yield channels
    await channels.stop()


def message_class(descriptor: Any) -> type[Message]:
    return GetMessageClass(descriptor)


def serialized(message: Message) -> bytes:
    return message.SerializeToString()


def stub(channels: rpc.Channels, method: MethodDescriptor) -> Any:
    return channels.to("platform").unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=serialized,
        response_deserializer=message_class(method.output_type).FromString,
    )


async def answer(channels: rpc.Channels, name: str, actor: Actor) -> ErrorStatus | None:
    """None: it was done."""
    method = methods()[name]
    request = a_request(message_class(method.input_type))
    try:
        await rpc.call(stub(channels, method), request, actor=actor, timeout_seconds=20)
    except RemoteError as error:
        return error.remote_status
    return None


def test_the_table_lists_every_method_and_no_other():
    assert set(methods()) == set(ACCESS)


@pytest.mark.parametrize("name", ACCESS)
async def test_each_actor_is_let_in_as_the_table_says(channels: rpc.Channels, user: Actor, name: str):
    access = ACCESS[name]
    let_in = {
        "anonymous": (ANONYMOUS, access is For.EVERYBODY),
        "user": (user, access in (For.EVERYBODY, For.LOGGED_IN, For.USERS)),
        "operator": (replace(user, operator=True), access is not For.SERVICES),
        "machine": (MACHINE, access in (For.EVERYBODY, For.LOGGED_IN)),
    }
    for who, (actor, may) in let_in.items():
        got = await answer(channels, name, actor)
        if access is For.EVERYBODY:
            assert got not in (ErrorStatus.FORBIDDEN, ErrorStatus.INTERNAL), who
        elif may:
            assert got is None or got in ABOUT_NOTHING, (who, got)
        else:
            # To who has no team, there is nothing there.
            assert got in TURNED_AWAY | {ErrorStatus.NOT_FOUND}, (who, got)
            assert access is not For.SERVICES or got is not ErrorStatus.NOT_FOUND, (who, got)
    if access not in (For.EVERYBODY, For.USERS):
        assert await answer(channels, name, SERVICE) not in TURNED_AWAY
    if name in CHANGES_THINGS:
        assert await answer(channels, name, VIEWER) is ErrorStatus.FORBIDDEN


async def test_nobody_but_a_service_presigns_an_url(channels: rpc.Channels, user: Actor):
    """The method behind which every byte of every team lies."""
    presign = stub(channels, methods()["StorageService.PresignUrls"])
    item = storage_pb2.Presign(method=storage_pb2.Presign.GET, key=f"blobs/{user.team_id}/{'0' * 64}")
    request = storage_pb2.PresignRequest(items=[item])
    for actor in (ANONYMOUS, user, replace(user, operator=True), MACHINE):
        with pytest.raises(RemoteError) as refused:
            await rpc.call(presign, request, actor=actor)
        assert refused.value.remote_status in TURNED_AWAY
    assert len((await rpc.call(presign, request, actor=SERVICE)).urls) == 1
