"""API keys, teams, join tokens and machines: who may do what, against a real PostgreSQL and a real NATS."""

import asyncio
import base64
from collections.abc import Awaitable
from datetime import UTC
from functools import partial
from typing import Any

import nats
import pytest
from nats.aio.client import Client

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import auth_pb2 as pb
from dantegpu.contracts.gen.dante.v1 import common_pb2
from dantegpu.domain.ids import ApiKeyId, MachineId, TeamId, UserId
from dantegpu.kit.actor import ANONYMOUS, SERVICE, Actor
from dantegpu.kit.bus import flush
from dantegpu.kit.errors import RemoteError, type_of
from dantegpu.kit.nats_jwt import NatsKey, create_user_key, sign_with_seed
from dantegpu.kit.rpc import call
from tests.fixtures.actors import a_machine, an_operator
from tests.fixtures.auth import AuthClient, AuthReplica, a_user, signed
from tests.fixtures.servers import NatsForTests


async def refusal(answer: Awaitable[object]) -> str:
    with pytest.raises(RemoteError) as caught:
        await answer
    return type_of(caught.value)


# --- API keys ---------------------------------------------------------------------------------------------------------


async def revoke(auth: AuthClient, actor: Actor, key_id: str) -> None:
    await call(auth.stub.RevokeApiKey, pb.RevokeApiKeyRequest(key_id=key_id), actor=actor)


async def key_ids(auth: AuthClient, actor: Actor, limit: int = 0, cursor: str = "") -> tuple[list[str], str]:
    page = common_pb2.PageRequest(limit=limit, cursor=cursor)
    response = await call(auth.stub.ListApiKeys, pb.ListApiKeysRequest(page=page), actor=actor)
    return [key.id for key in response.keys], response.next_cursor


async def test_a_key_acts_for_its_user_in_its_team(auth: AuthClient):
    ada = await auth.register("ada")
    made = await auth.make_key(ada, "jobs:read", "machines:write")
    assert made.secret.startswith("dante_")
    assert len(made.secret) == len("dante_") + 43
    assert made.secret.startswith(made.key.prefix)
    assert len(made.key.prefix) == 12
    actor = await auth.whose(made.secret)
    assert actor == a_user(str(ada.user_id), str(ada.team_id), "owner", scopes=("jobs:read", "machines:write"))


async def test_a_key_dies_when_it_is_revoked_expires_or_its_user_leaves(auth: AuthClient):
    ada, bob = await auth.register("ada"), await auth.register("bob")
    await auth.set_member(ada, ada.team_id, "bob", "viewer")
    guest = a_user(str(bob.user_id), str(ada.team_id), "viewer")
    revoked, short, guests = [
        await auth.make_key(actor, expires_in_seconds=seconds) for actor, seconds in ((ada, 0), (ada, 60), (guest, 0))
    ]
    for made in (revoked, short, guests):
        assert await auth.whose(made.secret) is not None
    await revoke(auth, ada, revoked.key.id)
    await revoke(auth, ada, revoked.key.id)
    assert await auth.whose(revoked.secret) is None
    auth.clock.advance(60)
    assert await auth.whose(short.secret) is None
    await auth.set_member(ada, ada.team_id, "bob", "")
    assert await auth.whose(guests.secret) is None
    await auth.set_member(ada, ada.team_id, "bob", "member")
    assert await auth.whose(guests.secret) is None
    assert await auth.whose("dante_" + "0" * 43) is None
    assert await auth.whose("") is None


async def test_a_key_has_the_role_that_its_user_has_now(auth: AuthClient):
    ada, bob = await auth.register("ada"), await auth.register("bob")
    await auth.set_member(ada, ada.team_id, "bob", "member")
    made = await auth.make_key(a_user(str(bob.user_id), str(ada.team_id), "member"))
    await auth.set_member(ada, ada.team_id, "bob", "viewer")
    actor = await auth.whose(made.secret)
    assert actor is not None
    assert (actor.role, actor.may_write) == ("viewer", False)


async def test_many_keys_are_verified_in_one_call_in_order(auth: AuthClient):
    ada = await auth.register("ada")
    secrets = [(await auth.make_key(ada)).secret for _ in range(3)]
    request = pb.VerifyApiKeysRequest(keys=[secrets[2], "nonsense", secrets[0], secrets[2]])
    results = (await call(auth.stub.VerifyApiKeys, request, actor=SERVICE)).results
    assert [result.valid for result in results] == [True, False, True, True]
    assert await refusal(call(auth.stub.VerifyApiKeys, request, actor=ada)) == "unauthenticated"
    too_many = pb.VerifyApiKeysRequest(keys=["x"] * 1001)
    assert await refusal(call(auth.stub.VerifyApiKeys, too_many, actor=SERVICE)) == "invalid-argument"


async def test_use_of_a_key_is_noted_to_the_minute(auth: AuthClient):
    ada = await auth.register("ada")
    made = await auth.make_key(ada)

    async def last_used() -> float:
        response = await call(auth.stub.ListApiKeys, pb.ListApiKeysRequest(), actor=ada)
        return response.keys[0].last_used_at.ToDatetime(UTC).timestamp()

    await auth.whose(made.secret)
    first = auth.clock.now().timestamp()
    auth.clock.advance(30)
    await auth.whose(made.secret)
    assert await last_used() == pytest.approx(first, abs=0.001)
    auth.clock.advance(31)
    await auth.whose(made.secret)
    assert await last_used() == pytest.approx(first + 61, abs=0.001)


async def test_a_key_cannot_make_a_key_that_may_do_more(auth: AuthClient):
    ada = await auth.register("ada")
    limited = a_user(str(ada.user_id), str(ada.team_id), "owner", scopes=("account:write", "jobs:read"))
    assert await refusal(auth.make_key(limited)) == "forbidden"
    assert await refusal(auth.make_key(limited, "jobs:write")) == "forbidden"
    made = await auth.make_key(limited, "jobs:read", "account:read")
    assert list(made.key.scopes) == ["account:read", "jobs:read"]
    assert await refusal(auth.make_key(ada, "root")) == "invalid-scope"


async def test_an_operators_key_is_an_operators_only_without_scopes_or_with_admin(auth: AuthClient):
    request = pb.EnsureOperatorRequest(email="operator@localhost", password="a quiet heron at dawn")
    made = await call(auth.stub.EnsureOperator, request, actor=SERVICE)
    operator = a_user(made.user.id, made.team.id, "owner", operator=True)
    found = [
        await auth.whose((await auth.make_key(operator, *scopes)).secret)
        for scopes in ((), ("jobs:read",), ("admin:write",))
    ]
    assert [actor is not None and actor.operator for actor in found] == [True, False, True]


async def test_the_same_request_for_a_key_gets_the_same_key(auth: AuthClient):
    ada = await auth.register("ada")
    first = await auth.make_key(ada, idempotency_key="k")
    assert await auth.make_key(ada, idempotency_key="k") == first
    assert await refusal(auth.make_key(ada, "jobs:read", idempotency_key="k")) == "idempotency-key-reused"
    assert (await key_ids(auth, ada))[0] == [first.key.id]


@pytest.mark.parametrize(
    "fields",
    [{"name": ""}, {"name": "x" * 101}, {"name": "a\nb"}, {"expires_in_seconds": -1}, {"expires_in_seconds": 10**12}],
)
async def test_a_malformed_request_for_a_key_is_refused(auth: AuthClient, fields: dict[str, Any]):
    ada = await auth.register("ada")
    merged: dict[str, Any] = {"name": "laptop"} | fields
    request = pb.CreateApiKeyRequest(**merged)
    assert await refusal(call(auth.stub.CreateApiKey, request, actor=ada)) == "invalid-argument"


async def test_the_number_of_keys_is_limited(auth_replica: AuthReplica):
    async with auth_replica(max_api_keys_per_user=2) as auth:
        ada = await auth.register("ada")
        first = await auth.make_key(ada)
        await auth.make_key(ada)
        assert await refusal(auth.make_key(ada)) == "limit-reached"
        await revoke(auth, ada, first.key.id)
        await auth.make_key(ada)


async def test_members_see_and_revoke_their_own_keys_and_owners_all_of_the_team(auth: AuthClient):
    ada, bob, eve = [await auth.register(name) for name in ("ada", "bob", "eve")]
    await auth.set_member(ada, ada.team_id, "bob", "member")
    guest = a_user(str(bob.user_id), str(ada.team_id), "member")
    adas, bobs = (await auth.make_key(ada)).key.id, (await auth.make_key(guest)).key.id
    assert (await key_ids(auth, ada))[0] == [bobs, adas]
    assert (await key_ids(auth, guest))[0] == [bobs]
    assert (await key_ids(auth, eve))[0] == []
    for actor, key in ((guest, adas), (eve, bobs), (ada, str(ApiKeyId.new()))):
        assert await refusal(revoke(auth, actor, key)) == "api-key-not-found"
    assert await refusal(revoke(auth, ANONYMOUS, bobs)) == "unauthenticated"
    assert await refusal(revoke(auth, ada, "key_nonsense")) == "invalid-argument"
    await revoke(auth, ada, bobs)


async def test_keys_come_in_pages(auth: AuthClient):
    ada = await auth.register("ada")
    made = [(await auth.make_key(ada)).key.id for _ in range(5)]
    first, cursor = await key_ids(auth, ada, limit=3)
    second, end = await key_ids(auth, ada, limit=3, cursor=cursor)
    assert first + second == made[::-1]
    assert end == ""
    assert await refusal(key_ids(auth, ada, cursor="nonsense")) == "invalid-argument"


async def test_nobody_makes_a_key_for_a_team_they_are_not_in(auth: AuthClient):
    ada, bob = await auth.register("ada"), await auth.register("bob")
    assert await refusal(auth.make_key(a_user(str(bob.user_id), str(ada.team_id), "owner"))) == "team-not-found"
    assert await refusal(auth.make_key(ANONYMOUS)) == "unauthenticated"
    assert await refusal(auth.make_key(a_machine(TeamId.new()))) == "unauthenticated"


# --- teams ------------------------------------------------------------------------------------------------------------


async def test_owners_change_who_is_in_the_team_and_others_do_not(auth: AuthClient):
    ada, bob, eve = [await auth.register(name) for name in ("ada", "bob", "eve")]
    await auth.set_member(ada, ada.team_id, "bob", "member")
    await auth.set_member(ada, ada.team_id, "BOB", "viewer")
    assert await auth.members(bob, ada.team_id) == {"ada": "owner", "bob": "viewer"}
    assert await refusal(auth.set_member(bob, ada.team_id, "eve", "member")) == "forbidden"
    assert await refusal(auth.set_member(bob, ada.team_id, "bob", "owner")) == "forbidden"
    assert await refusal(auth.set_member(eve, ada.team_id, "eve", "owner")) == "team-not-found"
    assert await refusal(auth.set_member(eve, TeamId.new(), "eve", "owner")) == "team-not-found"
    assert await refusal(auth.set_member(ada, ada.team_id, "nobody", "member")) == "user-not-found"
    assert await refusal(auth.set_member(ada, ada.team_id, "bob", "king")) == "invalid-argument"
    assert await refusal(auth.members(eve, ada.team_id)) == "team-not-found"
    assert await refusal(auth.members(an_operator(), TeamId.new())) == "team-not-found"
    assert await refusal(auth.members(ANONYMOUS, ada.team_id)) == "unauthenticated"
    await auth.set_member(bob, ada.team_id, "bob", "")
    assert await auth.members(an_operator(), ada.team_id) == {"ada": "owner"}


async def test_a_team_keeps_an_owner(auth: AuthClient):
    ada = await auth.register("ada")
    bob = await auth.register("bob")
    for role in ("", "member"):
        assert await refusal(auth.set_member(ada, ada.team_id, "ada", role)) == "last-owner"
    await auth.set_member(ada, ada.team_id, "bob", "owner")
    # Both leave at the same moment: one of them stays.
    results = await asyncio.gather(
        auth.set_member(ada, ada.team_id, "ada", ""),
        auth.set_member(bob, ada.team_id, "bob", ""),
        return_exceptions=True,
    )
    assert [type_of(error) for error in results if isinstance(error, RemoteError)] == ["last-owner"]


async def test_who_is_in_no_team_gets_one_at_the_next_login(auth: AuthClient):
    ada, _ = await auth.register("ada"), await auth.register("bob")
    await auth.set_member(ada, ada.team_id, "bob", "owner")
    await auth.set_member(ada, ada.team_id, "ada", "")
    teams = (await auth.login("ada")).teams
    assert [(team.name, team.role) for team in teams] == [("ada", "owner")]
    assert teams[0].id != str(ada.team_id)


async def test_a_team_is_made_once_per_request_and_listed(auth: AuthClient):
    ada, bob = await auth.register("ada"), await auth.register("bob")
    request = pb.CreateTeamRequest(name="lab", idempotency_key="k")
    first, second = [(await call(auth.stub.CreateTeam, request, actor=ada)).team for _ in range(2)]
    assert first == second
    assert (first.name, first.role) == ("lab", "owner")

    async def names(actor: Actor, limit: int = 0, cursor: str = "") -> tuple[list[str], str]:
        page = common_pb2.PageRequest(limit=limit, cursor=cursor)
        response = await call(auth.stub.ListTeams, pb.ListTeamsRequest(page=page), actor=actor)
        return [team.name for team in response.teams], response.next_cursor

    assert (await names(ada))[0] == ["lab", "ada"]
    assert (await names(bob))[0] == ["bob"]
    everything, cursor = await names(an_operator(), limit=2)
    assert everything == ["lab", "bob"]
    assert await names(an_operator(), limit=2, cursor=cursor) == (["ada"], "")
    assert await refusal(names(ANONYMOUS)) == "unauthenticated"
    assert await refusal(call(auth.stub.CreateTeam, pb.CreateTeamRequest(name=" "), actor=ada)) == "invalid-argument"


# --- machines ---------------------------------------------------------------------------------------------------------


async def test_a_machine_joins_and_may_use_its_own_subjects_only(auth: AuthClient, nats_server: NatsForTests):
    ada = await auth.register("ada")
    key = create_user_key()
    credential = await auth.enrol(await auth.join_token(ada), key)
    assert credential.team_id == str(ada.team_id)
    assert credential.expires_at.ToDatetime(UTC) > auth.clock.now()
    machine = MachineId.parse(credential.machine_id)
    errors: list[Exception] = []

    async def note(error: Exception) -> None:
        errors.append(error)

    async def connect(**options: Any) -> Client:
        return await nats.connect(nats_server.url, max_reconnect_attempts=0, error_cb=note, **options)

    listener = await connect(user_credentials=str(nats_server.services_creds))
    heard = await listener.subscribe("dante.machine.>")
    await flush(listener)
    client = await connect(
        user_jwt_cb=credential.nats_user_jwt.encode,
        signature_cb=partial(signed_nonce, key),
        inbox_prefix=subjects.machine_inbox_prefix(machine).encode(),
    )
    await client.publish(subjects.machine_heartbeat(MachineId.new()), b"somebody else's")
    await client.publish(subjects.machine_heartbeat(machine), b"mine")
    await flush(client)
    assert (await heard.next_msg(5)).data == b"mine"
    assert any("permissions violation" in str(error).lower() for error in errors)
    await client.close()
    await listener.close()


def signed_nonce(key: NatsKey, nonce: str) -> bytes:
    return base64.b64encode(sign_with_seed(key.seed, nonce.encode()))


async def test_the_same_key_again_is_the_same_machine_and_takes_no_second_use(auth: AuthClient):
    ada = await auth.register("ada")
    token, key = await auth.join_token(ada), create_user_key()
    first = await auth.enrol(token, key)
    auth.clock.advance(4000)
    assert (await auth.enrol(token, key)).machine_id == first.machine_id
    assert await refusal(auth.enrol(token)) == "invalid-join-token"
    other = await auth.join_token(ada)
    assert (await auth.enrol(other, key)).machine_id == first.machine_id
    assert (await auth.enrol(other)).machine_id != first.machine_id


async def test_a_machine_that_enrols_twice_at_once_is_one_machine(auth: AuthClient):
    ada = await auth.register("ada")
    tokens = [await auth.join_token(ada, max_uses=2), await auth.join_token(ada)]
    key = create_user_key()
    found = await asyncio.gather(*(auth.enrol(tokens[n % 2], key) for n in range(6)))
    assert len({credential.machine_id for credential in found}) == 1


async def test_a_join_token_works_as_often_and_as_long_as_it_says(auth: AuthClient):
    ada = await auth.register("ada")
    twice, short = await auth.join_token(ada, max_uses=2), await auth.join_token(ada, expires_in_seconds=60)
    results = await asyncio.gather(*(auth.enrol(twice) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, pb.MachineCredential) for result in results) == 2
    auth.clock.advance(60)
    assert await refusal(auth.enrol(short)) == "invalid-join-token"
    for token in ("", "dante_join_" + "0" * 43, "é"):
        assert await refusal(auth.enrol(token)) == "invalid-join-token"


async def test_a_join_token_is_made_by_those_who_may_write(auth: AuthClient):
    ada, bob = await auth.register("ada"), await auth.register("bob")
    viewer = a_user(str(bob.user_id), str(ada.team_id), "viewer")
    assert await refusal(auth.join_token(viewer)) == "forbidden"
    assert await refusal(auth.join_token(ANONYMOUS)) == "unauthenticated"
    for fields in (
        {"expires_in_seconds": -1},
        {"expires_in_seconds": 30 * 86_400 + 1},
        {"max_uses": -1},
        {"max_uses": 10_001},
    ):
        assert await refusal(auth.join_token(ada, **fields)) == "invalid-argument"
    assert await auth.join_token(ada, idempotency_key="k") == await auth.join_token(ada, idempotency_key="k")


async def test_a_machine_must_prove_that_it_holds_its_key(auth: AuthClient):
    ada = await auth.register("ada")
    token, key, thief = await auth.join_token(ada), create_user_key(), create_user_key()
    now = int(auth.clock.now().timestamp())
    late, early = now - 301, now + 302
    wrong: list[dict[str, Any]] = [
        {"signature": signed(thief, f"dante-enrol\n{key.public}\n{now}")},
        {"signature": signed(key, f"dante-renew\n{key.public}\n{now}")},
        {"signature": signed(key, f"dante-enrol\n{key.public}\n{now + 1}")},
        {"signature": ""},
        {"signature": "A" * 86},
        {"signature": "é" * 86},
        {"signature": "A" * 100_000},
        {"signed_at_unix_s": late, "signature": signed(key, f"dante-enrol\n{key.public}\n{late}")},
        {"signed_at_unix_s": early, "signature": signed(key, f"dante-enrol\n{key.public}\n{early}")},
        {"public_key": ""},
        {"public_key": key.public.lower()},
        {"public_key": key.public[:-1] + ("A" if key.public[-1] != "A" else "B")},
        {"public_key": "A" + key.public[1:]},
        {"public_key": thief.public},
    ]
    for changes in wrong:
        assert await refusal(auth.enrol(token, key, **changes)) == "invalid-machine-proof"
    await auth.enrol(token, key)


async def test_a_credential_is_renewed_by_its_machine_alone(auth: AuthClient):
    ada = await auth.register("ada")
    key = create_user_key()
    first = await auth.enrol(await auth.join_token(ada), key)
    auth.clock.advance(3000)
    second = await auth.renew(first.machine_id, key)
    assert second.machine_id == first.machine_id
    assert second.expires_at.seconds == first.expires_at.seconds + 3000
    now = int(auth.clock.now().timestamp())
    assert await refusal(auth.renew(first.machine_id, create_user_key())) == "invalid-machine-proof"
    assert await refusal(auth.renew(first.machine_id, key, at=now - 400)) == "invalid-machine-proof"
    assert await refusal(auth.renew(str(MachineId.new()), key)) == "invalid-machine-proof"
    assert await refusal(auth.renew("nonsense", key)) == "invalid-argument"


async def test_a_revoked_machine_gets_nothing_more_until_its_team_lets_it_join_anew(auth: AuthClient):
    ada, bob = await auth.register("ada"), await auth.register("bob")
    token, key = await auth.join_token(ada), create_user_key()
    machine = (await auth.enrol(token, key)).machine_id
    viewer = a_user(str(UserId.new()), str(ada.team_id), "viewer")
    assert await refusal(auth.revoke_machine(bob, machine)) == "machine-not-found"
    assert await refusal(auth.revoke_machine(viewer, machine)) == "forbidden"
    assert await refusal(auth.revoke_machine(ANONYMOUS, machine)) == "unauthenticated"
    for _ in range(2):
        await auth.revoke_machine(ada, machine)
    assert await refusal(auth.renew(machine, key)) == "machine-revoked"
    assert await refusal(auth.enrol(token, key)) == "invalid-join-token"
    assert (await auth.enrol(await auth.join_token(ada), key)).machine_id != machine


async def test_a_machine_of_one_team_does_not_join_another(auth: AuthClient):
    ada, bob = await auth.register("ada"), await auth.register("bob")
    key = create_user_key()
    machine = (await auth.enrol(await auth.join_token(ada), key)).machine_id
    token = await auth.join_token(bob)
    assert await refusal(auth.enrol(token, key)) == "machine-of-another-team"
    await auth.revoke_machine(an_operator(), machine)
    assert (await auth.enrol(token, key)).team_id == str(bob.team_id)
