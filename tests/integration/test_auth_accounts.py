"""Accounts, log-ins, sessions, signing keys and the audit log, against a real PostgreSQL."""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString, cast

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.sql import SQL, Identifier

from dantegpu.contracts.gen.dante.v1 import auth_pb2 as pb
from dantegpu.contracts.gen.dante.v1 import common_pb2
from dantegpu.kit.actor import ANONYMOUS, SERVICE, Actor
from dantegpu.kit.db import Database
from dantegpu.kit.errors import RemoteError, type_of
from dantegpu.kit.rpc import call
from dantegpu.kit.tokens import InvalidToken, parse_jwks
from dantegpu.services.auth.audit import AuditProblem, verify_audit_log
from dantegpu.services.auth.secrets import Secrets, SecretsUnusable
from tests.fixtures.auth import PASSWORD, AuthClient, AuthReplica
from tests.fixtures.servers import PostgresForTests


async def refused(answer: Awaitable[object]) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await answer
    return caught.value


async def refusal(answer: Awaitable[object]) -> str:
    return type_of(await refused(answer))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.02)


# --- registration -----------------------------------------------------------------------------------------------------


async def test_who_registers_gets_a_team_and_can_log_in_with_any_spelling_of_the_address(auth: AuthClient):
    actor = await auth.register("Ada")
    response = await auth.login("aDA")
    assert response.user.email == "ada@example.org"
    assert [(team.name, team.role) for team in response.teams] == [("ada", "owner")]
    seen = await auth.actor_of(response.tokens.access_token)
    assert (seen.user_id, seen.team_id, seen.role, seen.operator) == (actor.user_id, actor.team_id, "owner", False)
    assert response.tokens.expires_in_seconds <= 600


async def test_an_address_registers_once_and_the_same_request_twice_is_one_account(auth: AuthClient):
    first = await auth.register("ada", key="k1")
    assert await auth.register("ada", key="k1") == first
    assert await refusal(auth.register("ada", key="k1", password="another long one")) == "idempotency-key-reused"
    assert await refusal(auth.register("ada", key="k2")) == "email-taken"
    assert await refusal(auth.register("ADA")) == "email-taken"


async def test_two_people_who_register_one_address_at_once_make_one_account(auth: AuthClient):
    results = await asyncio.gather(*(auth.register("ada") for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(result, Actor) for result in results) == 1


@pytest.mark.parametrize(
    ("password", "problem"),
    [
        ("short12", "weak-password"),
        ("x" * 129, "weak-password"),
        ("x" * 100_000, "weak-password"),
        ("Password123", "weak-password"),
        ("aaaaaaaaaaaa", "weak-password"),
        ("ada@example.org", "weak-password"),
        ("", "weak-password"),
    ],
)
async def test_a_weak_password_is_refused(auth: AuthClient, password: str, problem: str):
    assert await refusal(auth.register("ada", password=password)) == problem


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, "a@b", "x" * 5000, "a\u0000b"])
async def test_what_is_no_address_is_refused(auth: AuthClient, name: str):
    assert await refusal(auth.register(name)) == "invalid-email"
    assert await refusal(auth.login(name)) == "wrong-credentials"


@pytest.mark.parametrize("team", ["x" * 101, "new\nline"])
async def test_a_bad_team_name_registers_nobody(auth: AuthClient, team: str):
    if len(team) <= 100:
        assert await refusal(auth.register("ada", team=team)) == "invalid-argument"
    else:
        await auth.register("ada", team=team)
        assert len((await auth.login("ada")).teams[0].name) == 100


# --- logging in -------------------------------------------------------------------------------------------------------


async def test_a_wrong_password_and_an_unknown_user_get_the_same_answer(auth: AuthClient):
    await auth.register("ada")
    wrong = await refused(auth.login("ada", "wrong password"))
    unknown = await refused(auth.login("eve", "wrong password"))
    assert (type_of(wrong), wrong.message) == (type_of(unknown), unknown.message)
    assert type_of(wrong) == "wrong-credentials"


async def test_a_wrong_password_and_an_unknown_user_take_the_same_time(auth_replica: AuthReplica):
    async with auth_replica(
        login_limit_per_account_and_address="1000/minute", login_limit_per_address="1000/minute"
    ) as auth:
        await auth.register("ada")

        async def work_seconds(name: str) -> float:
            # Of this process, where the passwords are checked: other programs do not count.
            began = time.process_time()
            await refused(auth.login(name, "wrong password"))
            return time.process_time() - began

        known, unknown = 0.0, 0.0
        for _ in range(8):
            known += await work_seconds("ada")
            unknown += await work_seconds("eve")
        assert 0.6 < known / unknown < 1.7


async def test_guessing_is_slowed_down_and_the_owner_is_not_locked_out(auth_replica: AuthReplica):
    async with auth_replica(login_limit_per_account_and_address="3/minute", login_limit_per_account="5/minute") as auth:
        await auth.register("ada")
        await auth.login("ada", address="home")
        for _ in range(3):
            assert await refusal(auth.login("ada", "wrong password", address="evil 1")) == "wrong-credentials"
        limited = await refused(auth.login("ada", PASSWORD, address="evil 1"))
        assert type_of(limited) == "rate-limited"
        assert 1 <= int(limited.params["retry_after"]) <= 61
        # Also from many addresses ...
        found = [await refusal(auth.login("ada", "wrong password", address=f"evil {n}")) for n in range(2, 8)]
        assert found.count("rate-limited") >= 4
        # ... but the owner gets in from where they were before, and others are not affected at all.
        await auth.login("ada", address="home")
        await auth.register("bob")
        await auth.login("bob", address="evil 1")


async def test_one_address_cannot_try_many_accounts(auth_replica: AuthReplica):
    async with auth_replica(login_limit_per_address="4/minute") as auth:
        found = [await refusal(auth.login(f"user{n}", "wrong password", address="evil")) for n in range(6)]
        assert found == ["wrong-credentials"] * 4 + ["rate-limited"] * 2


async def test_who_waits_may_try_again(auth_replica: AuthReplica):
    async with auth_replica(login_limit_per_account_and_address="2/second") as auth:
        await auth.register("ada")
        while await refusal(auth.login("ada", "wrong password")) != "rate-limited":
            pass

        async def logged_in() -> bool:
            with contextlib.suppress(RemoteError):
                await auth.login("ada")
                return True
            return False

        await until(logged_in)


# --- sessions ---------------------------------------------------------------------------------------------------------


async def test_refresh_tokens_rotate_and_a_lost_answer_may_be_asked_for_again(auth: AuthClient):
    actor = await auth.register("ada")
    first = (await auth.login("ada")).tokens
    second = await auth.refresh(first.refresh_token)
    assert second.refresh_token != first.refresh_token
    auth.clock.advance(9)
    again = await auth.refresh(first.refresh_token)
    assert again.refresh_token == second.refresh_token
    third = await auth.refresh(again.refresh_token)
    assert (await auth.actor_of(third.access_token)).user_id == actor.user_id


async def test_a_refresh_token_used_late_again_ends_the_session(auth: AuthClient):
    await auth.register("ada")
    first = (await auth.login("ada")).tokens
    other_session = (await auth.login("ada")).tokens
    second = await auth.refresh(first.refresh_token)
    auth.clock.advance(11)
    assert await refusal(auth.refresh(first.refresh_token)) == "invalid-refresh-token"
    assert await refusal(auth.refresh(second.refresh_token)) == "invalid-refresh-token"
    await auth.refresh(other_session.refresh_token)


async def test_a_refresh_token_whose_follow_up_was_used_ends_the_session_at_once(auth: AuthClient):
    await auth.register("ada")
    first = (await auth.login("ada")).tokens
    second = await auth.refresh(first.refresh_token)
    third = await auth.refresh(second.refresh_token)
    assert await refusal(auth.refresh(first.refresh_token)) == "invalid-refresh-token"
    assert await refusal(auth.refresh(third.refresh_token)) == "invalid-refresh-token"


async def test_two_refreshes_at_once_get_the_same_follow_up(auth: AuthClient):
    await auth.register("ada")
    first = (await auth.login("ada")).tokens
    pairs = await asyncio.gather(*(auth.refresh(first.refresh_token) for _ in range(4)))
    assert len({pair.refresh_token for pair in pairs}) == 1


async def test_a_session_ends_by_logging_out_by_disuse_and_by_age(auth_replica: AuthReplica):
    async with auth_replica(refresh_token_seconds=1000, session_seconds=1800) as auth:
        await auth.register("ada")
        out, idle, old = [(await auth.login("ada")).tokens.refresh_token for _ in range(3)]
        for _ in range(2):
            await call(auth.stub.Logout, pb.LogoutRequest(refresh_token=out), actor=ANONYMOUS)
        assert await refusal(auth.refresh(out)) == "invalid-refresh-token"
        auth.clock.advance(950)
        old = (await auth.refresh(old)).refresh_token
        auth.clock.advance(50)
        assert await refusal(auth.refresh(idle)) == "invalid-refresh-token"
        auth.clock.advance(800)
        assert await refusal(auth.refresh(old)) == "invalid-refresh-token"
        assert await refusal(auth.refresh("danterefresh_" + "0" * 43)) == "invalid-refresh-token"
        assert await refusal(auth.refresh("")) == "invalid-refresh-token"


async def test_a_session_moves_between_the_teams_of_its_user_only(auth: AuthClient):
    ada, bob = await auth.register("ada"), await auth.register("bob")
    await auth.set_member(bob, bob.team_id, "ada", "viewer")
    tokens = (await auth.login("ada")).tokens
    moved = await auth.refresh(tokens.refresh_token, str(bob.team_id))
    actor = await auth.actor_of(moved.access_token)
    assert (actor.team_id, actor.role) == (bob.team_id, "viewer")
    # It stays there until it is moved, or its user is put out of that team.
    stayed = await auth.refresh(moved.refresh_token)
    assert (await auth.actor_of(stayed.access_token)).team_id == bob.team_id
    await auth.set_member(bob, bob.team_id, "ada", "")
    home = await auth.refresh(stayed.refresh_token)
    assert (await auth.actor_of(home.access_token)).team_id == ada.team_id
    assert await refusal(auth.refresh(home.refresh_token, str(bob.team_id))) == "team-not-found"
    await auth.refresh(home.refresh_token)


async def test_me_needs_somebody(auth: AuthClient):
    actor = await auth.register("ada", team="lab")
    me = await call(auth.stub.GetMe, common_pb2.Empty(), actor=actor)
    assert (me.user.email, [team.name for team in me.teams], me.team_id) == (
        "ada@example.org",
        ["lab"],
        str(actor.team_id),
    )
    assert await refusal(call(auth.stub.GetMe, common_pb2.Empty(), actor=ANONYMOUS)) == "unauthenticated"


# --- the operator -----------------------------------------------------------------------------------------------------


async def ensure_operator(auth: AuthClient, actor: Actor, password: str = PASSWORD) -> pb.EnsureOperatorResponse:
    request = pb.EnsureOperatorRequest(email="operator@localhost", password=password)
    return await call(auth.stub.EnsureOperator, request, actor=actor)


async def test_the_operator_is_made_once_and_found_again(auth: AuthClient):
    first, second = await ensure_operator(auth, SERVICE), await ensure_operator(auth, SERVICE)
    assert first == second
    assert first.user.operator
    request = pb.LoginRequest(email="operator@localhost", password=PASSWORD)
    logged_in = await call(auth.stub.Login, request, actor=ANONYMOUS)
    assert (await auth.actor_of(logged_in.tokens.access_token)).operator


async def test_only_the_platform_itself_makes_an_operator(auth: AuthClient):
    ada = await auth.register("ada")
    assert await refusal(ensure_operator(auth, ada)) == "forbidden"
    assert await refusal(ensure_operator(auth, ANONYMOUS)) == "forbidden"


async def test_whoever_registered_the_operators_address_before_does_not_become_operator(auth: AuthClient):
    request = pb.RegisterRequest(email="operator@localhost", password="mine and not yours")
    await call(auth.stub.Register, request, actor=ANONYMOUS)
    assert await refusal(ensure_operator(auth, SERVICE)) == "operator-email-taken"


# --- signing keys -----------------------------------------------------------------------------------------------------


async def jwks_kids(auth: AuthClient) -> list[str | None]:
    jwks = await call(auth.stub.GetJwks, common_pb2.Empty(), actor=SERVICE)
    assert '"d"' not in jwks.jwks_json
    return [key.kid for key in parse_jwks(jwks.jwks_json).keys]


def header(tokens: pb.TokenPair) -> dict[str, str]:
    return json.loads(base64.urlsafe_b64decode(tokens.access_token.split(".")[0] + "=="))


async def test_keys_rotate_without_refusing_a_single_token(auth_replica: AuthReplica):
    async with auth_replica(
        signing_key_period_seconds=3600, signing_key_notice_seconds=600, upkeep_interval_seconds=0.05
    ) as auth:
        await auth.register("ada")
        assert len(await jwks_kids(auth)) == 2
        auth.clock.advance(1)
        for _ in range(3):
            known = await jwks_kids(auth)
            next_kid = known[-1]
            auth.clock.advance(3598)
            before = (await auth.login("ada")).tokens
            auth.clock.advance(2)
            after = (await auth.login("ada")).tokens
            assert header(after)["kid"] == next_kid != header(before)["kid"]
            await auth.actor_of(before.access_token)
            await auth.actor_of(after.access_token)

            async def next_is_published(next_kid: str | None = next_kid) -> bool:
                return (await jwks_kids(auth))[-1] != next_kid

            await until(next_is_published)
        last = (await auth.login("ada")).tokens
        auth.clock.advance(600)
        with pytest.raises(InvalidToken):
            await auth.actor_of(last.access_token)


async def test_replicas_use_the_same_keys_also_after_a_restart(auth_replica: AuthReplica):
    async with auth_replica("one") as one, auth_replica("two") as two:
        await one.register("ada")
        tokens = (await two.login("ada")).tokens
        assert (await one.actor_of(tokens.access_token)).role == "owner"
        again = await one.refresh(tokens.refresh_token)
    async with auth_replica("three") as three:
        assert (await three.actor_of(again.access_token)).role == "owner"
        await three.refresh(again.refresh_token)


async def test_a_lost_encryption_key_is_told_and_not_papered_over(auth_replica: AuthReplica):
    async with auth_replica() as auth:
        kek = auth.settings.secrets_dir / "auth.kek"
        assert kek.stat().st_mode & 0o777 == 0o600
    kek.unlink()
    with pytest.raises(SecretsUnusable, match=r"auth\.kek"):
        async with auth_replica():
            pass


# --- secrets and the audit log ----------------------------------------------------------------------------------------


async def test_a_database_dump_holds_no_secret(auth: AuthClient, postgres_dsn: str, short_dir: Path):
    ada = await auth.register("ada", key="k")
    tokens = (await auth.login("ada")).tokens
    second = await auth.refresh(tokens.refresh_token)
    key = await auth.make_key(ada, idempotency_key="k")
    join_token = await auth.join_token(ada, idempotency_key="k")
    kek = (short_dir / "secrets" / "auth.kek").read_text().strip()
    dump = ""
    async with await psycopg.AsyncConnection.connect(postgres_dsn) as connection:
        names = await connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'auth'")
        for (name,) in await names.fetchall():
            rows = await connection.execute(SQL("SELECT t::text FROM {} t").format(Identifier("auth", name)))
            dump += "\n".join([str(row[0]) for row in await rows.fetchall()])
    for secret in (
        PASSWORD,
        tokens.access_token,
        tokens.refresh_token,
        second.refresh_token,
        key.secret,
        join_token,
        kek,
    ):
        assert secret not in dump
        assert secret.encode().hex() not in dump
    assert key.key.prefix in dump


@dataclass
class Audited:
    database: Database
    auth: AuthClient
    superuser_dsn: str

    async def problem(self) -> AuditProblem | None:
        secrets = Secrets(self.auth.settings)
        await secrets.start()
        async with self.database.transaction() as tx:
            return await verify_audit_log(tx, secrets, self.auth.clock)

    async def tamper(self, statement: str) -> None:
        async with await psycopg.AsyncConnection.connect(self.superuser_dsn, autocommit=True) as connection:
            await connection.execute("SET session_replication_role = replica")  # no triggers
            await connection.execute(cast(LiteralString, statement))


@pytest.fixture
async def audited(auth: AuthClient, postgres_dsn: str, postgres_server: PostgresForTests):
    name = conninfo_to_dict(postgres_dsn)["dbname"]
    database = Database(postgres_dsn, "auth")
    await database.start()
    ada = await auth.register("ada")
    await refused(auth.login("ada", "wrong password"))
    await auth.login("ada")
    await auth.make_key(ada)
    yield Audited(database, auth, postgres_server.address.dsn(str(name), user="postgres"))
    await database.stop()


async def test_the_audit_log_tells_what_happened_and_refuses_changes(audited: Audited):
    assert await audited.problem() is None
    async with audited.database.transaction() as tx:
        kinds = await tx.value("SELECT array_agg(kind ORDER BY seq) FROM audit_log")
    assert kinds == ["registered", "login_failed", "login_ok", "key_created"]
    for statement in ("UPDATE audit_log SET kind='x'", "DELETE FROM audit_log", "TRUNCATE audit_log"):
        with pytest.raises(psycopg.errors.IntegrityConstraintViolation):
            async with audited.database.transaction() as tx:
                await tx.run(statement)


_COLUMNS = "occurred_at, kind, user_id, team_id, subject, client_address, request_id, detail, mac"


@pytest.mark.parametrize(
    ("statement", "seq"),
    [
        ("UPDATE auth.audit_log SET client_address = 'elsewhere' WHERE seq = 2", 2),
        ("UPDATE auth.audit_log SET occurred_at = occurred_at - interval '1 s' WHERE seq = 3", 3),
        ("DELETE FROM auth.audit_log WHERE seq = 2", 2),
        ("DELETE FROM auth.audit_log WHERE seq = 4", 4),
        ("DELETE FROM auth.audit_log", 1),
        (f"INSERT INTO auth.audit_log SELECT 5, {_COLUMNS} FROM auth.audit_log WHERE seq = 4", 5),
    ],
)  # fmt: skip
async def test_tampering_with_the_audit_log_is_found(audited: Audited, statement: str, seq: int):
    await audited.tamper(statement)
    problem = await audited.problem()
    assert problem is not None
    assert problem.seq == seq
