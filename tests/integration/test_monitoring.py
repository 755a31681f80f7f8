"""monitoring-logging-service: logs appended by machines, read by people, archived to storage."""

import asyncio
import os
import random
from typing import Any

import psycopg
import pytest

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.domain.ids import AttemptId, JobId, MachineId, TeamId
from dantegpu.kit.actor import ANONYMOUS, Actor
from dantegpu.kit.errors import RemoteError
from dantegpu.services.monitoring.service import PIECE_BYTES
from tests.fixtures.actors import a_machine, a_member, an_operator
from tests.fixtures.monitoring import MonitoringClient, MonitoringReplica

NOISE = bytes(range(256)) * 8 + "grün\r\n50%\r100%\r\n模型\x00".encode()
"""Carriage returns, NUL, what is no UTF-8, and characters that a cut falls into."""


def chunk_rows(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        found = connection.execute("SELECT count(*) FROM monitoring.log_chunks").fetchone()
    assert found is not None
    return int(found[0])


async def refused(awaitable: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await awaitable
    return caught.value


# --- append -----------------------------------------------------------------------------------------------------------


async def test_what_a_job_printed_is_read_back_byte_by_byte_from_anywhere(monitoring: MonitoringClient):
    attempt = monitoring.scheduler.place()
    offset = 0
    for start in range(0, len(NOISE), 97):
        offset, stop = await monitoring.append(attempt, offset, NOISE[start : start + 97])
        assert not stop
    assert offset == len(NOISE)
    for at, limit in [(0, 0), (0, 1), (96, 3), (1000, 500), (len(NOISE) - 1, 10), (len(NOISE), 10), (1 << 40, 1)]:
        found = await monitoring.read(attempt.job, at, limit)
        assert found.data == (NOISE[at : at + limit] if limit else NOISE[at:])
        assert (found.offset, found.size_bytes, found.complete, found.truncated) == (at, len(NOISE), False, False)
    assert attempt.job in monitoring.woken


async def test_repeated_overlapping_and_early_chunks_store_each_byte_once(monitoring: MonitoringClient):
    attempt = monitoring.scheduler.place()
    assert await monitoring.append(attempt, 5, b"56789") == (0, False)
    assert await monitoring.append(attempt, 0, b"0123") == (4, False)
    assert await monitoring.append(attempt, 0, b"0123") == (4, False)
    assert await monitoring.append(attempt, 2, b"23456") == (7, False)
    assert await monitoring.append(attempt, 1, b"12") == (7, False)
    assert await monitoring.append(attempt, 8, b"89") == (7, False)
    assert await monitoring.append(attempt, -3, b"xxxxxxxxxxxxxxx") == (7, False)
    assert await monitoring.append(attempt, 7, b"789", last=True) == (10, False)
    assert await monitoring.read_all(attempt.job) == b"0123456789"


@pytest.mark.parametrize("seed", range(3))
async def test_a_log_sent_in_any_pieces_any_number_of_times_arrives_whole(monitoring: MonitoringClient, seed: int):
    chance = random.Random(seed)
    attempts = [monitoring.scheduler.place() for _ in range(4)]
    texts = {attempt.id: chance.randbytes(chance.randrange(1, 40_000)) for attempt in attempts}

    async def ship(sender: int) -> None:
        attempt = attempts[sender % len(attempts)]
        text, stored = texts[attempt.id], 0
        while stored < len(text):
            start = max(0, stored - chance.choice([0, 0, 10, 5000]) + chance.choice([0, 0, 100]))
            stop = start + chance.choice([1, 50, 3000, 20_000])
            stored, stop_sending = await monitoring.append(attempt, start, text[start:stop], last=stop >= len(text))
            assert not stop_sending

    for attempt in attempts:
        await monitoring.as_machine(attempt.machine)
    # Two senders per attempt: a machine whose reply was lost sends again while the first is still on its way.
    await asyncio.gather(*(ship(sender) for sender in range(8)))
    for attempt in attempts:
        assert await monitoring.read_all(attempt.job) == texts[attempt.id]


async def test_a_log_ends_with_its_last_chunk_even_an_empty_one(monitoring: MonitoringClient):
    attempt = monitoring.scheduler.place()
    await monitoring.append(attempt, 0, b"done")
    assert not (await monitoring.read(attempt.job)).complete
    assert await monitoring.append(attempt, 9, b"", last=True) == (4, False)
    assert not (await monitoring.read(attempt.job)).complete
    assert await monitoring.append(attempt, 4, b"", last=True) == (4, False)
    assert (await monitoring.read(attempt.job)).complete
    assert not (await monitoring.read(attempt.job, 0, 2)).complete
    assert await monitoring.append(attempt, 0, b"done", last=True) == (4, False)
    assert await monitoring.append(attempt, 4, b" and more") == (4, True)
    assert await monitoring.read_all(attempt.job) == b"done"


async def test_lines_one_by_one_make_few_rows(monitoring: MonitoringClient, postgres_dsn: str):
    attempt = monitoring.scheduler.place()
    offset = 0
    for number in range(300):
        offset, _ = await monitoring.append(attempt, offset, f"step {number:06}\n".encode())
    assert chunk_rows(postgres_dsn) <= 300 * 12 // 2048 + 1
    assert (await monitoring.read_all(attempt.job)).decode().splitlines()[-1] == "step 000299"


async def test_many_machines_at_once_are_all_stored(monitoring: MonitoringClient):
    machines = [MachineId.new() for _ in range(10)]
    attempts = [monitoring.scheduler.place(machines[number % 10]) for number in range(200)]
    for machine in machines:
        await monitoring.as_machine(machine)
    answers = await asyncio.gather(*(monitoring.append(a, 0, str(a.id).encode(), last=True) for a in attempts))
    assert set(answers) == {(len(str(attempts[0].id)), False)}
    for attempt in attempts[::10]:
        assert await monitoring.read_all(attempt.job) == str(attempt.id).encode()
    assert len(monitoring.scheduler.asked) == len(attempts)


# --- who may send -----------------------------------------------------------------------------------------------------


async def test_a_machine_writes_to_its_own_attempts_only(monitoring: MonitoringClient):
    attempt, liar = monitoring.scheduler.place(), MachineId.new()
    own = monitoring.scheduler.place(machine=liar)
    await monitoring.append(attempt, 0, b"honest")
    chunks = [
        machine_pb2.LogChunk(attempt_id=str(attempt.id), offset=6, data=b" forged", last=True),
        machine_pb2.LogChunk(attempt_id=str(AttemptId.new()), data=b"unknown"),
        machine_pb2.LogChunk(attempt_id="att_nonsense", data=b"malformed"),
        machine_pb2.LogChunk(attempt_id=str(own.id), data=b"own"),
    ]
    reply = await monitoring.send(liar, *chunks)
    assert [(ack.offset, ack.refused) for ack in reply.acks] == [(0, True), (0, True), (0, True), (3, False)]
    assert [ack.attempt_id for ack in reply.acks] == [chunk.attempt_id for chunk in chunks]
    assert await monitoring.read_all(attempt.job) == b"honest"


async def test_what_cannot_be_read_is_not_answered_and_harms_nobody(monitoring: MonitoringClient):
    attempt = monitoring.scheduler.place()
    bus = await monitoring.as_machine(attempt.machine)
    await bus.publish(subjects.machine_logs(attempt.machine), b"\xff not protobuf")
    assert await monitoring.append(attempt, 0, b"hello") == (5, False)


async def test_while_the_scheduler_is_away_machines_are_told_to_send_again(monitoring: MonitoringClient):
    attempt = monitoring.scheduler.place()
    monitoring.scheduler.down = True
    chunk = machine_pb2.LogChunk(attempt_id=str(attempt.id), data=b"x")
    reply = await monitoring.send(attempt.machine, chunk)
    assert (reply.error, list(reply.acks)) == ("unavailable", [])
    monitoring.scheduler.down = False
    assert await monitoring.append(attempt, 0, b"x") == (1, False)


async def test_a_log_over_the_limit_is_cut_marked_and_refused(monitoring_replica: MonitoringReplica):
    async with monitoring_replica(log_limit_bytes=1024) as monitoring:
        attempt = monitoring.scheduler.place()
        assert await monitoring.append(attempt, 0, b"a" * 1000) == (1000, False)
        assert await monitoring.append(attempt, 1000, b"b" * 1000) == (1024, True)
        assert await monitoring.append(attempt, 1024, b"c") == (1024, True)
        found = await monitoring.read(attempt.job)
        assert (found.data, found.truncated, found.complete) == (b"a" * 1000 + b"b" * 24, True, True)


# --- read -------------------------------------------------------------------------------------------------------------


async def test_each_attempt_has_its_own_log_and_the_latest_is_read_by_default(monitoring: MonitoringClient):
    job, team = JobId.new(), TeamId.new()
    first = monitoring.scheduler.place(job=job, team=team)
    second = monitoring.scheduler.place(job=job, team=team, epoch=2)
    empty = await monitoring.read(job)
    assert (empty.epoch, empty.data, empty.size_bytes, empty.complete) == (0, b"", 0, False)
    await monitoring.append(first, 0, b"first")
    await monitoring.append(second, 0, b"second")
    latest, earlier = await monitoring.read(job), await monitoring.read(job, epoch=1)
    assert [(found.epoch, found.data) for found in (latest, earlier)] == [(2, b"second"), (1, b"first")]
    missing = await monitoring.read(job, epoch=7)
    assert (missing.epoch, missing.data) == (7, b"")


async def test_a_read_is_bounded(monitoring: MonitoringClient):
    attempt = monitoring.scheduler.place()
    data = os.urandom(3 << 19)
    await monitoring.append(attempt, 0, data[: 3 << 18])
    await monitoring.append(attempt, 3 << 18, data[3 << 18 :])
    assert (await monitoring.read(attempt.job)).data == data[: 1 << 20]
    assert (await monitoring.read(attempt.job, limit_bytes=2**31 - 1)).data == data[: 1 << 20]
    assert await monitoring.read_all(attempt.job) == data


@pytest.mark.parametrize("bad", [{"offset": -1}, {"limit_bytes": -1}, {"epoch": -1}])
async def test_a_negative_range_is_refused(monitoring: MonitoringClient, bad: dict[str, Any]):
    assert (await refused(monitoring.read(JobId.new(), **bad))).remote_type == "invalid-range"


@pytest.mark.parametrize("stranger", [a_member(TeamId.new()), a_machine(TeamId.new())])
async def test_another_teams_log_is_not_there(monitoring: MonitoringClient, stranger: Actor):
    attempt = monitoring.scheduler.place()
    await monitoring.append(attempt, 0, b"secret")
    assert (await refused(monitoring.read(attempt.job, actor=stranger))).remote_type == "log-not-found"
    assert (await refused(monitoring.read(attempt.job, actor=ANONYMOUS))).remote_type == "unauthenticated"
    for reader in (a_member(attempt.team, "viewer"), an_operator()):
        assert (await monitoring.read(attempt.job, actor=reader)).data == b"secret"


# --- archive ----------------------------------------------------------------------------------------------------------


async def test_an_ended_log_moves_to_storage_and_reads_the_same(
    monitoring_replica: MonitoringReplica, postgres_dsn: str
):
    async with monitoring_replica(archive_after_seconds=0) as monitoring:
        attempt, other = monitoring.scheduler.place(), monitoring.scheduler.place()
        await monitoring.append(other, 0, b"still running")
        await monitoring.append(attempt, 0, NOISE, last=True)
        await monitoring.until(lambda: chunk_rows(postgres_dsn) == 1)
        assert monitoring.storage.puts == [f"logs/{attempt.job}/1/0"]
        assert await monitoring.read_all(attempt.job) == NOISE
        found = await monitoring.read(attempt.job, 1000, 7)
        assert (found.data, found.size_bytes, found.complete) == (NOISE[1000:1007], len(NOISE), False)
        assert (await monitoring.read(attempt.job, len(NOISE) - 3)).complete
        assert (await monitoring.read(attempt.job, len(NOISE))).complete
        # The reply to its last chunk was lost, so the machine sends it again.
        assert await monitoring.append(attempt, 0, NOISE, last=True) == (len(NOISE), False)
        assert await monitoring.read_all(other.job) == b"still running"


async def test_a_long_log_is_archived_in_pieces_that_join_without_a_seam(
    monitoring_replica: MonitoringReplica, postgres_dsn: str
):
    async with monitoring_replica(archive_after_seconds=0) as monitoring:
        attempt = monitoring.scheduler.place()
        data = os.urandom(1 << 20) * 17 + b"end"
        step = 700 << 10
        for start in range(0, len(data), step):
            await monitoring.append(attempt, start, data[start : start + step], last=start + step >= len(data))
        await monitoring.until(lambda: chunk_rows(postgres_dsn) == 0)
        assert monitoring.storage.puts == [f"logs/{attempt.job}/1/{number}" for number in (0, 1)]
        seam = await monitoring.read(attempt.job, PIECE_BYTES - 10, 100)
        assert seam.data == data[PIECE_BYTES - 10 : PIECE_BYTES]
        assert await monitoring.read_all(attempt.job) == data


async def test_an_empty_log_needs_no_object(monitoring_replica: MonitoringReplica, postgres_dsn: str):
    async with monitoring_replica(archive_after_seconds=0) as monitoring:
        attempt = monitoring.scheduler.place()
        await monitoring.append(attempt, 0, b"", last=True)
        await monitoring.until_complete(attempt.job)
        assert (await monitoring.read(attempt.job)).data == b""
        assert monitoring.storage.puts == []


async def test_archiving_goes_on_when_storage_is_back(monitoring_replica: MonitoringReplica, postgres_dsn: str):
    async with monitoring_replica(archive_after_seconds=0) as monitoring:
        monitoring.storage.down = True
        attempt = monitoring.scheduler.place()
        await monitoring.append(attempt, 0, NOISE, last=True)
        assert await monitoring.read_all(attempt.job) == NOISE
        monitoring.storage.down = False
        await monitoring.until(lambda: chunk_rows(postgres_dsn) == 0)
        assert await monitoring.read_all(attempt.job) == NOISE


async def test_the_log_of_a_lost_machine_ends_and_a_silent_live_one_does_not(monitoring_replica: MonitoringReplica):
    async with monitoring_replica(abandoned_after_seconds=0.2) as monitoring:
        lost, quiet = monitoring.scheduler.place(), monitoring.scheduler.place()
        for attempt in (lost, quiet):
            await monitoring.append(attempt, 0, b"so far")
        monitoring.scheduler.attempts[str(lost.id)].live = False
        await monitoring.until_complete(lost.job)
        assert not (await monitoring.read(quiet.job)).complete
        assert await monitoring.append(quiet, 6, b" so good") == (14, False)
        assert await monitoring.append(lost, 6, b" back again") == (6, True)


async def test_logs_outlive_a_restart(monitoring_replica: MonitoringReplica):
    async with monitoring_replica() as before:
        attempt = before.scheduler.place()
        await before.append(attempt, 0, b"one ")
    async with monitoring_replica() as after:
        after.scheduler.attempts = before.scheduler.attempts
        assert await after.append(attempt, 4, b"two", last=True) == (7, False)
        found = await after.read(attempt.job)
        assert (found.data, found.complete) == (b"one two", True)
