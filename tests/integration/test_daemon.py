"""The daemon against a real NATS server: attempts from the first push to the last trace of them."""

import asyncio
import os
import random
import signal
import socket
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.daemon import agent, link, owner
from dantegpu.daemon.enrol import EnrolmentRefused
from dantegpu.daemon.executors.processes import descendants, processes_with_env
from dantegpu.daemon.journal import Journal
from dantegpu.daemon.module import AlreadyRunning
from tests.fixtures.machines import KilledDaemon, MachinePlatform, RunningDaemon, a_tar, daemon_settings, until
from tests.fixtures.servers import NatsForTests


def attempts_left(daemon: RunningDaemon) -> list[Path]:
    return list((daemon.settings.state / "work" / "attempts").iterdir())


async def test_a_job_runs_and_its_log_and_results_arrive(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    script = 'cat data.txt; mkdir "$DANTE_OUTPUT/sub"; echo 42 > "$DANTE_OUTPUT/sub/answer.txt"; sleep 0.2'
    attempt_id = await machine_platform.place("sh", "-c", script, files={"data.txt": b"hello\n"})
    status = await machine_platform.ended(attempt_id)
    assert (status.state, status.outcome, status.exit_code) == (jobs_pb2.SUCCEEDED, jobs_pb2.OUTCOME_SUCCEEDED, 0)
    assert machine_platform.logs[attempt_id] == b"hello\n"
    assert machine_platform.results == {"sub/answer.txt": b"42\n"}
    assert [(result.path, result.size_bytes) for result in status.results] == [("sub/answer.txt", 3)]
    assert status.sandbox == "bubblewrap"
    assert machine_platform.states[attempt_id] == ["STARTING", "RUNNING", "SUCCEEDED"]
    await until(lambda: not attempts_left(running_daemon))


async def test_a_job_that_writes_nothing_costs_no_log_unless_an_attempt_before_it_may_have_one(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    first, second = await machine_platform.place("true"), await machine_platform.place("true", epoch=2)
    assert [(await machine_platform.ended(each)).log_bytes for each in (first, second)] == [0, 0]
    assert machine_platform.logs == {second: b""}
    await until(lambda: not attempts_left(running_daemon))


async def test_commands_run_in_order_and_stop_at_the_first_that_fails(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    attempt_id = await machine_platform.place()
    machine_platform.desired[attempt_id].spec.commands.extend(["echo one", "false", "echo two"])
    await machine_platform.change()
    status = await machine_platform.ended(attempt_id)
    assert (status.outcome, status.message) == (jobs_pb2.OUTCOME_FAILED, "exit code 1")
    assert machine_platform.logs[attempt_id] == b"one\n"


async def test_sixty_four_attempts_run_at_once_and_none_is_lost(machine_platform: MachinePlatform, tmp_path: Path):
    daemon = RunningDaemon(daemon_settings(machine_platform, tmp_path / "machine", sandbox="none"))
    await daemon.start()
    go = tmp_path / "go"
    os.mkfifo(go)
    ids = [await machine_platform.place("sh", "-c", f"read word < {go}; echo went", partial=True) for _ in range(64)]
    for attempt_id in ids:
        await machine_platform.reached(attempt_id, jobs_pb2.RUNNING)
    assert not any(status.state == jobs_pb2.SUCCEEDED for status in machine_platform.statuses.values())
    writer = os.open(go, os.O_RDWR)
    os.write(writer, b"\n" * len(ids))
    for attempt_id in ids:
        assert (await machine_platform.ended(attempt_id)).outcome == jobs_pb2.OUTCOME_SUCCEEDED
    os.close(writer)
    await until(lambda: not attempts_left(daemon))
    assert [machine_platform.logs[attempt_id] for attempt_id in ids] == [b"went\n"] * len(ids)
    await daemon.stop()


async def test_a_lost_push_is_repaired_by_the_next_sync(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    attempt_id = await machine_platform.place("true", push=False)
    assert (await machine_platform.ended(attempt_id)).state == jobs_pb2.SUCCEEDED


async def test_a_push_that_was_under_way_for_longer_than_its_lease_starts_nothing(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    known = await machine_platform.place("true")
    await machine_platform.ended(known)
    machine_platform.answers_syncs = False
    machine_platform.push_delay_seconds = machine_platform.lease_ms / 1000
    late = await machine_platform.place("sleep", "600")
    del machine_platform.desired[late]
    machine_platform.push_delay_seconds = 0.0
    in_time = await machine_platform.place("sleep", "600")
    await machine_platform.reached(in_time, jobs_pb2.RUNNING)
    assert late not in machine_platform.states
    assert late not in {folder.name for folder in attempts_left(running_daemon)}


async def test_a_push_of_what_is_new_leaves_the_other_attempts_as_they_are(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    first = await machine_platform.place("sh", "-c", "until [ -e go ]; do sleep 0.01; done")
    await machine_platform.reached(first, jobs_pb2.RUNNING)
    second = await machine_platform.place("true", partial=True)
    assert (await machine_platform.ended(second)).state == jobs_pb2.SUCCEEDED
    work = running_daemon.settings.state / "work" / "attempts" / first / "work"
    (work / "go").touch()
    assert (await machine_platform.ended(first)).state == jobs_pb2.SUCCEEDED


async def test_an_end_that_was_acknowledged_by_a_push_is_forgotten_without_a_sync(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    await machine_platform.ended(await machine_platform.place("true"))
    machine_platform.answers_syncs = False
    attempt_id = await machine_platform.place("true")
    await machine_platform.reached(attempt_id, jobs_pb2.SUCCEEDED)
    await machine_platform.acknowledge(attempt_id)
    await until(lambda: attempt_id not in {folder.name for folder in attempts_left(running_daemon)})


async def test_a_push_that_comes_once_more_after_the_end_starts_nothing(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    first = await machine_platform.place("true")
    again = machine_platform.desired[first]
    await machine_platform.ended(first)
    await until(lambda: not attempts_left(running_daemon))
    machine_platform.answers_syncs = False
    # It goes out beside the next one, like a message that was under way for long.
    again.spec.argv[:] = ["sleep", "600"]
    machine_platform.desired[first] = again
    second = await machine_platform.place("true")
    await machine_platform.reached(second, jobs_pb2.SUCCEEDED)
    await machine_platform.acknowledge(second)
    await until(lambda: not attempts_left(running_daemon))


async def test_an_old_push_changes_nothing(machine_platform: MachinePlatform, running_daemon: RunningDaemon):
    attempt_id = await machine_platform.place("sh", "-c", "until [ -e go ]; do sleep 0.01; done")
    await machine_platform.reached(attempt_id, jobs_pb2.RUNNING)
    machine_platform._revision -= 1  # pyright: ignore[reportPrivateUsage]
    kept = machine_platform.desired.pop(attempt_id)
    await machine_platform._bus.publish(  # pyright: ignore[reportPrivateUsage]
        f"dante.machine.{machine_platform.machine_id}.desired",
        machine_pb2.DesiredState(machine_id=str(machine_platform.machine_id), revision=0),
    )
    machine_platform.desired[attempt_id] = kept
    machine_platform._revision += 1  # pyright: ignore[reportPrivateUsage]
    work = running_daemon.settings.state / "work" / "attempts" / attempt_id / "work"
    (work / "go").touch()
    assert (await machine_platform.ended(attempt_id)).state == jobs_pb2.SUCCEEDED


async def test_a_stopped_job_gets_sigterm_and_counts_as_cancelled(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    # No `wait`: a signal just before it is noticed only when the child ends.
    command = "trap 'echo bye; exit 0' TERM; echo hi; while :; do sleep 0.05; done 2>/dev/null"
    attempt_id = await machine_platform.place("sh", "-c", command)
    await until(lambda: machine_platform.logs.get(attempt_id))
    machine_platform.desired[attempt_id].stop = True
    machine_platform.desired[attempt_id].stop_reason = "user"
    await machine_platform.change()
    status = await machine_platform.ended(attempt_id)
    assert (status.state, status.outcome) == (jobs_pb2.CANCELLED, jobs_pb2.OUTCOME_CANCELLED)
    assert machine_platform.logs[attempt_id] == b"hi\nbye\n"
    assert machine_platform.states[attempt_id][-2:] == ["STOPPING", "CANCELLED"]


async def test_a_job_over_its_time_is_ended(machine_platform: MachinePlatform, running_daemon: RunningDaemon):
    attempt_id = await machine_platform.place("sleep", "600", seconds=1)
    status = await machine_platform.ended(attempt_id)
    assert status.outcome == jobs_pb2.OUTCOME_TIMED_OUT
    assert 1000 <= status.ran_ms < 10_000


async def test_a_job_out_of_memory_says_so(machine_platform: MachinePlatform, running_daemon: RunningDaemon):
    attempt_id = await machine_platform.place(
        "python3", "-c", "print('big'); x = bytearray(300 << 20)", memory_bytes=64 << 20
    )
    status = await machine_platform.ended(attempt_id)
    assert status.outcome == jobs_pb2.OUTCOME_FAILED
    assert "more memory than the 64MB" in status.message


async def test_an_attempt_that_is_no_longer_wanted_is_killed(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    attempt_id = await machine_platform.place("sleep", "600")
    await machine_platform.reached(attempt_id, jobs_pb2.RUNNING)
    del machine_platform.desired[attempt_id]
    await machine_platform.change()
    status = await machine_platform.ended(attempt_id)
    assert status.outcome == jobs_pb2.OUTCOME_LOST
    await until(lambda: not attempts_left(running_daemon))


async def test_a_machine_that_cannot_renew_kills_its_attempt_before_the_lease_is_over(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    machine_platform.lease_ms = 3000
    attempt_id = await machine_platform.place("sleep", "600")
    await machine_platform.reached(attempt_id, jobs_pb2.RUNNING)
    loop = asyncio.get_running_loop()
    machine_platform.answers_syncs = False
    began = loop.time()
    started = running_daemon.settings.state / "work" / "attempts" / attempt_id / "started"
    cell = int(started.read_text().split()[0])
    assert descendants(cell)
    await until(lambda: not descendants(cell))
    # The last renewal went out up to one sync before; the lease's margin is a fifth, and it is checked every second.
    assert loop.time() - began < 3.8
    machine_platform.answers_syncs = True
    assert (await machine_platform.ended(attempt_id)).outcome == jobs_pb2.OUTCOME_LOST


async def test_logs_wait_for_a_store_that_is_away_and_nothing_is_lost(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    machine_platform.stores_logs = False
    attempt_id = await machine_platform.place("sh", "-c", "for i in 1 2 3; do echo line $i; done")
    await machine_platform.reached(attempt_id, jobs_pb2.RUNNING)
    machine_platform.stores_logs = True
    await machine_platform.ended(attempt_id)
    await until(lambda: not attempts_left(running_daemon))
    assert machine_platform.logs[attempt_id] == b"line 1\nline 2\nline 3\n"


async def test_a_large_log_arrives_up_to_its_limit(machine_platform: MachinePlatform, running_daemon: RunningDaemon):
    attempt_id = await machine_platform.place("sh", "-c", "yes 0123456789 | head -c 2000000")
    assert (await machine_platform.ended(attempt_id)).state == jobs_pb2.SUCCEEDED
    assert len(machine_platform.logs[attempt_id]) == 1 << 20


async def test_an_input_whose_content_changed_is_the_providers_fault(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    packed = a_tar({"a": b"1"})
    attempt_id = await machine_platform.place("true", files=packed, blob=packed[:-1] + b"?")
    status = await machine_platform.ended(attempt_id)
    assert status.outcome == jobs_pb2.OUTCOME_PROVIDER_FAULT
    assert "hash" in status.message


async def test_an_input_that_leads_out_of_its_folder_is_refused(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    attempt_id = await machine_platform.place("true", files={"../../evil": b"x"})
    status = await machine_platform.ended(attempt_id)
    assert status.outcome == jobs_pb2.OUTCOME_FAILED
    assert "leads out of the folder" in status.message


async def test_heartbeats_bring_the_inventory_and_the_load(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    await until(lambda: len(machine_platform.heartbeats) > 2)
    first = machine_platform.heartbeats[0]
    assert first.inventory.cpu_milli == len(os.sched_getaffinity(0)) * 1000
    assert first.memory_used_bytes > 0
    assert not machine_platform.heartbeats[1].HasField("inventory")


async def test_a_wrong_join_token_is_an_error_that_says_why(machine_platform: MachinePlatform, tmp_path: Path):
    settings = daemon_settings(machine_platform, tmp_path / "m", join_token=SecretStr("wrong"))
    with pytest.raises(EnrolmentRefused, match="has been used"):
        await RunningDaemon(settings).start()


async def test_a_second_daemon_on_the_same_folder_is_refused(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    with pytest.raises(AlreadyRunning):
        await RunningDaemon(running_daemon.settings).start()


async def test_the_key_is_private_and_stays_the_same(machine_platform: MachinePlatform, tmp_path: Path):
    settings = daemon_settings(machine_platform, tmp_path / "m")
    for _ in range(2):
        daemon = RunningDaemon(settings)
        await daemon.start()
        machine_platform.heartbeats.clear()
        await until(lambda: machine_platform.heartbeats)
        await daemon.stop()
    await until(lambda: machine_platform.heartbeats[-1].leaving)
    assert len(machine_platform.enrolments) == 1
    assert {path.name for path in settings.state.iterdir() if path.stat().st_mode & 0o077 and path.is_file()} <= {
        "leases.json"
    }


@pytest.fixture
def daemon(machine_platform: MachinePlatform, tmp_path: Path) -> Iterator[KilledDaemon]:
    started = KilledDaemon(machine_platform, tmp_path / "m")
    yield started
    started.kill()


async def test_a_job_survives_kill_9_of_the_daemon_and_runs_exactly_once(
    machine_platform: MachinePlatform, tmp_path: Path, daemon: KilledDaemon
):
    script = "echo start >> count; echo begun; until [ -e go ]; do sleep 0.01; done; cp count $DANTE_OUTPUT/; echo end"
    attempt_id = await machine_platform.place("sh", "-c", script)
    await until(lambda: machine_platform.logs.get(attempt_id))
    await asyncio.to_thread(daemon.kill)
    (tmp_path / "m" / "work" / "attempts" / attempt_id / "work" / "go").touch()
    daemon.start_again()
    status = await machine_platform.ended(attempt_id)
    assert status.outcome == jobs_pb2.OUTCOME_SUCCEEDED
    assert machine_platform.logs[attempt_id] == b"begun\nend\n"
    assert machine_platform.results == {"count": b"start\n"}
    assert await asyncio.to_thread(daemon.end) == 0


async def test_after_kill_9_an_attempt_without_lease_is_killed(
    machine_platform: MachinePlatform, tmp_path: Path, daemon: KilledDaemon
):
    attempt_id = await machine_platform.place("sh", "-c", "echo begun; sleep 600")
    await until(lambda: machine_platform.logs.get(attempt_id))
    pid = int((tmp_path / "m" / "work" / "attempts" / attempt_id / "started").read_text().split()[0])
    await asyncio.to_thread(daemon.kill)
    assert Path(f"/proc/{pid}").exists()
    del machine_platform.desired[attempt_id]
    await machine_platform.change()
    daemon.start_again()
    await until(lambda: not Path(f"/proc/{pid}").exists())
    assert (await machine_platform.ended(attempt_id)).outcome == jobs_pb2.OUTCOME_LOST
    assert await asyncio.to_thread(daemon.end) == 0


async def test_what_was_killed_for_its_lease_by_a_daemon_that_could_not_say_so_is_lost(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    attempt_id = await machine_platform.place("sh", "-c", 'echo 1 > "$DANTE_OUTPUT/x"; echo $$; kill -STOP $$')
    await until(lambda: machine_platform.logs.get(attempt_id))
    folder = running_daemon.settings.state / "work" / "attempts" / attempt_id
    (folder / "stop").write_text("lease_lost")
    for pid in processes_with_env(f"DANTE_ATTEMPT_ID={attempt_id}".encode()):
        os.kill(pid, signal.SIGKILL)
    status = await machine_platform.ended(attempt_id)
    assert (status.state, status.outcome) == (jobs_pb2.FAILED, jobs_pb2.OUTCOME_LOST)
    assert not machine_platform.results


async def test_a_daemon_told_to_stop_ends_its_jobs_and_hands_them_back(
    machine_platform: MachinePlatform, tmp_path: Path, daemon: KilledDaemon
):
    attempt_id = await machine_platform.place("sh", "-c", "echo begun; sleep 600")
    await until(lambda: machine_platform.logs.get(attempt_id))
    assert await asyncio.to_thread(daemon.end) == 0
    await until(lambda: machine_platform.statuses[attempt_id].outcome == jobs_pb2.OUTCOME_PREEMPTED)
    journal = Journal(tmp_path / "m" / "journal.db")
    journal.open()
    assert all(row.ended for row in journal.attempts())
    journal.close()


async def test_a_daemon_is_replaced_by_another_version_of_itself_while_its_jobs_run_on(
    machine_platform: MachinePlatform, tmp_path: Path, daemon: KilledDaemon
):
    attempt_id = await machine_platform.place("sh", "-c", "echo begun; until [ -e go ]; do sleep 0.01; done; echo end")
    await until(lambda: machine_platform.logs.get(attempt_id))
    assert await asyncio.to_thread(daemon.end, signal.SIGUSR1) == 0
    assert not any(heartbeat.leaving for heartbeat in machine_platform.heartbeats)
    daemon.start_again()
    (tmp_path / "m" / "work" / "attempts" / attempt_id / "work" / "go").touch()
    assert (await machine_platform.ended(attempt_id)).outcome == jobs_pb2.OUTCOME_SUCCEEDED
    assert machine_platform.logs[attempt_id] == b"begun\nend\n"
    assert await asyncio.to_thread(daemon.end) == 0


async def test_a_daemon_that_is_killed_again_and_again_loses_doubles_and_leaves_nothing(
    machine_platform: MachinePlatform, tmp_path: Path, daemon: KilledDaemon
):
    """`dante bench adopt` does the same for longer. The seed is of the moments only; they differ with the machine."""
    dice = random.Random(4)
    machine_platform.lease_ms = 120_000
    script = "echo start; sleep {}; echo end"
    jobs = [await machine_platform.place("sh", "-c", script.format(dice.uniform(0.1, 2.0))) for _ in range(4)]
    for _ in range(4):
        machine_platform.heartbeats.clear()
        await until(lambda: machine_platform.heartbeats)
        await asyncio.sleep(dice.uniform(0.0, 0.3))
        await asyncio.to_thread(daemon.kill)
        daemon.start_again()
    for attempt_id in jobs:
        status = await machine_platform.ended(attempt_id)
        assert (status.outcome, status.exit_code) == (jobs_pb2.OUTCOME_SUCCEEDED, 0)
        assert machine_platform.logs[attempt_id] == b"start\nend\n"
    work = tmp_path / "m" / "work" / "attempts"
    await until(lambda: not list(work.iterdir()))
    assert await asyncio.to_thread(daemon.end) == 0
    marks = [f"DANTE_ATTEMPT_ID={attempt_id}".encode() for attempt_id in jobs]
    assert not [mark for mark in marks if processes_with_env(mark)]


async def test_a_machine_whose_credential_runs_out_renews_it_and_comes_back(
    machine_platform: MachinePlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(link, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(link, "REBUILD_AFTER_SECONDS", 0.3)
    machine_platform.credential_seconds = 2
    daemon = RunningDaemon(daemon_settings(machine_platform, tmp_path / "m"))
    await daemon.start()
    attempt_id = await machine_platform.place("sh", "-c", "until [ -e go ]; do sleep 0.05; done")
    await machine_platform.reached(attempt_id, jobs_pb2.RUNNING)
    await until(lambda: machine_platform.renewals >= 3)
    machine_platform.heartbeats.clear()
    await until(lambda: machine_platform.heartbeats)
    (tmp_path / "m" / "work" / "attempts" / attempt_id / "work" / "go").touch()
    assert (await machine_platform.ended(attempt_id)).outcome == jobs_pb2.OUTCOME_SUCCEEDED
    await daemon.stop()


async def test_a_job_runs_on_while_nats_is_away_and_its_log_arrives_afterwards(
    machine_platform: MachinePlatform, nats_server: NatsForTests, running_daemon: RunningDaemon
):
    attempt_id = await machine_platform.place("sh", "-c", "echo one; until [ -e go ]; do sleep 0.01; done; echo two")
    await until(lambda: machine_platform.logs.get(attempt_id))
    await nats_server.server.stop()
    (running_daemon.settings.state / "work" / "attempts" / attempt_id / "work" / "go").touch()
    log = running_daemon.settings.state / "work" / "attempts" / attempt_id / "output.log"
    await until(lambda: log.read_bytes() == b"one\ntwo\n")
    await nats_server.server.start()
    assert (await machine_platform.ended(attempt_id)).outcome == jobs_pb2.OUTCOME_SUCCEEDED
    assert machine_platform.logs[attempt_id] == b"one\ntwo\n"


async def test_an_operator_can_ask_the_daemon_how_it_is(machine_platform: MachinePlatform, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    daemon = RunningDaemon(daemon_settings(machine_platform, tmp_path / "m", ops_listen=address))
    await daemon.start()
    await until(lambda: machine_platform.heartbeats)
    async with httpx.AsyncClient(verify=False, base_url=f"http://{address}") as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        assert (await client.get("/readyz")).status_code == 200
        assert "dante_daemon_connected 1.0" in (await client.get("/metrics")).text
        assert (await client.get("/other")).status_code == 404
        assert (await client.post("/healthz")).status_code == 405
    await daemon.stop()


async def test_the_owners_idle_job_runs_until_something_is_rented(
    machine_platform: MachinePlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(owner, "IDLE_BEFORE_SECONDS", 0.1)
    idle = f"sh -c 'echo $$ > {tmp_path}/idle; exec sleep 600'"
    daemon = RunningDaemon(daemon_settings(machine_platform, tmp_path / "m", idle_command=idle))
    await daemon.start()
    pid = await until(lambda: (tmp_path / "idle").exists() and (tmp_path / "idle").read_text().strip())
    attempt_id = await machine_platform.place("sh", "-c", "until [ -e go ]; do sleep 0.01; done")
    await machine_platform.reached(attempt_id, jobs_pb2.RUNNING)
    await until(lambda: not Path(f"/proc/{pid}").exists())
    (tmp_path / "m" / "work" / "attempts" / attempt_id / "work" / "go").touch()
    await machine_platform.ended(attempt_id)
    await daemon.stop()


async def test_outside_of_its_hours_a_machine_says_so_and_hands_back_what_runs(
    machine_platform: MachinePlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(agent, "HOURS_CHECK_SECONDS", 0.05)
    later = datetime.now().astimezone() + timedelta(hours=3)
    daemon = RunningDaemon(
        daemon_settings(machine_platform, tmp_path / "m", hours=f"{later:%H:%M}-{later + timedelta(hours=1):%H:%M}")
    )
    await daemon.start()
    attempt_id = await machine_platform.place("sleep", "600")
    status = await machine_platform.ended(attempt_id)
    assert status.outcome == jobs_pb2.OUTCOME_PREEMPTED
    assert "hours are over" in status.message
    await until(lambda: any("outside of its hours" in beat.inventory.closed for beat in machine_platform.heartbeats))
    await daemon.stop()
