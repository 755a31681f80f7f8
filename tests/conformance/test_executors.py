"""What every executor owes, run against each of them: processes in and without a sandbox, Docker, Podman."""

import asyncio
import json
import multiprocessing
import os
import signal

import pytest

from dantegpu.daemon.executors.base import (
    Adoption,
    AlreadyStarted,
    AttemptRefused,
    AttemptSpec,
    ExitStatus,
    Handle,
    StopReason,
)
from tests.fixtures.executors import (
    TIMEOUT_SECONDS,
    Bench,
    a_job,
    a_python_job,
    a_shell_job,
    be_a_daemon,
    needs,
    processes_of,
    until,
)


async def test_a_job_begins_where_it_asks_to_with_its_files_and_leaves_its_output_exit_code_and_bytes(bench: Bench):
    """Carriage returns of a progress bar, bytes that are no text, and an end without a newline."""
    script = r"""
        pwd; cp ../../input.txt "$DANTE_OUTPUT/copy.txt"; echo err >&2
        printf '\0\377\r 50%%\r100%%\n\033[1mend'; exit 3
    """
    spec = a_shell_job(script, working_dir="src/deep")
    folder = bench.workspace.attempt(spec.attempt_id)
    folder.create()
    (folder.work / "src" / "deep").mkdir(parents=True)
    (folder.work / "input.txt").write_text("data")
    handle = await bench.start(spec)
    assert await bench.executor.wait(handle) == ExitStatus(3)
    where, _, rest = folder.log.read_bytes().partition(b"\n")
    assert where.endswith(b"/work/src/deep")
    assert rest == b"err\n\0\xff\r 50%\r100%\n\x1b[1mend"
    assert (folder.output / "copy.txt").read_text() == "data"


async def test_a_job_fails_by_itself_where_its_folder_or_command_is_not(bench: Bench):
    status, text = await bench.run(a_shell_job("pwd", working_dir="none"))
    assert status.exit_code == 126
    assert "none" in text
    status, text = await bench.run(a_job("no-such-command"))
    assert status.exit_code == 127
    assert "not found" in text


SEEN = """
import json, os, sys
descriptors = sorted(map(int, os.listdir("/proc/self/fd")))[:-1]
print(json.dumps({"environ": dict(os.environ), "descriptors": descriptors, "argument": len(sys.argv[-1])}))
"""


async def test_a_job_sees_its_variables_and_arguments_whole_and_nothing_of_the_daemon(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DAEMON_SECRET", "hunter2")
    quoted = 'it\'s $HOME `x` "y" \\ \n end'
    env = {"WORD": quoted, "HOME": "/tmp/h", "BIG": "'" * 100_000}
    inherited = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        _, text = await bench.run(a_job("python3", "-c", SEEN, "x" * 100_000, env=env))
    finally:
        os.close(inherited)
    seen = json.loads(text)
    environ = seen["environ"]
    assert (len(environ["BIG"]), seen["argument"]) == (100_000, 100_000)
    assert (environ["WORD"], environ["HOME"], environ["CUDA_VISIBLE_DEVICES"]) == (quoted, "/tmp/h", "")
    allowed = {"PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "PYTHONUNBUFFERED", "DANTE_OUTPUT", "WORD", "BIG"}
    allowed |= bench.kind.variables
    devices = {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"}
    assert set(environ) - allowed - devices <= {"DANTE_ATTEMPT_ID", "PWD", "OLDPWD", "LC_CTYPE"}
    assert seen["descriptors"] == [0, 1, 2]


async def test_a_signal_is_told_apart(bench: Bench):
    status, _ = await bench.run(a_shell_job("kill -SEGV $$"))
    assert status.signal == signal.SIGSEGV


async def test_a_job_over_its_memory_limit_is_killed_alone_while_another_is_measured(bench: Bench):
    await needs(bench, "memory")
    other = await bench.start(a_python_job("x = bytearray(50 << 20); print('ready'); import time; time.sleep(600)"))
    status, _ = await bench.run(a_python_job("x = bytearray(400 << 20)", memory_bytes=64 << 20))
    assert status.oom_killed
    assert status.exit_code == 137
    await bench.until_logged(other, "ready")
    assert await bench.executor.adopt(other) is Adoption.RUNNING
    stats = await bench.executor.stats(other)
    assert (stats.memory_bytes or 0) > 50 << 20
    assert stats.pids >= 1
    assert stats.cpu_seconds is not None
    await bench.executor.stop(other, grace_seconds=0, reason=StopReason.REQUESTED)


async def test_a_fork_bomb_stops_at_the_pids_limit_and_nothing_stays(bench: Bench):
    await needs(bench, "pids")
    script = """
        import os, time
        children = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(60)
                children += 1
        except BlockingIOError:
            print(f"after {children} refused", flush=True)
            time.sleep(60)
    """
    handle = await bench.start(a_python_job(script, pids_max=30))
    text = await bench.until_logged(handle, "refused")
    assert 20 <= int(text.split()[-2]) <= 40
    await bench.executor.stop(handle, grace_seconds=0, reason=StopReason.REQUESTED)
    assert (await bench.executor.stats(handle)).pids == 0


async def test_a_job_gets_no_more_than_its_share_of_a_processor(bench: Bench):
    await needs(bench, "cpu")
    script = """
        import time
        end = time.monotonic() + 1
        while time.monotonic() < end: pass
        print(time.process_time())
    """
    _, text = await bench.run(a_python_job(script, cpu_milli=300))
    assert float(text) < 0.5


async def test_sigterm_reaches_the_job_which_may_end_by_itself(bench: Bench):
    handle = await bench.start(a_shell_job("trap 'echo saved; exit 7' TERM; echo ready; while :; do sleep 0.01; done"))
    await bench.until_logged(handle, "ready")
    await bench.executor.stop(handle, grace_seconds=TIMEOUT_SECONDS, reason=StopReason.TIMED_OUT)
    status = await bench.executor.wait(handle)
    assert "saved" in bench.log(handle)
    assert status.exit_code == 7
    assert status.timed_out


async def test_a_job_that_ignores_sigterm_is_killed_after_the_grace(bench: Bench):
    handle = await bench.start(a_shell_job("trap '' TERM; echo ready; while :; do sleep 0.01; done"))
    await bench.until_logged(handle, "ready")
    await bench.executor.stop(handle, grace_seconds=0.1, reason=StopReason.REQUESTED)
    status = await bench.executor.wait(handle)
    assert (status.exit_code, status.stop_reason) == (137, StopReason.REQUESTED)
    assert (await bench.executor.stats(handle)).pids == 0


async def test_a_child_that_was_forked_twice_dies_with_the_job(bench: Bench):
    script = """
        import os, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        os.wait()
    """
    spec = a_python_job(script)
    status, _ = await bench.run(spec)
    assert status.exit_code == 0
    assert not processes_of(spec.attempt_id)


async def test_an_attempt_starts_once_however_often_and_by_how_many_daemons_it_is_asked_to(bench: Bench):
    spec = a_shell_job("echo started; exec sleep 60")
    handle = await bench.prepare(spec)
    other = bench.kind.make(bench.workspace.root)
    assert await other.prepare(bench.kind.fit(spec)) == handle
    results = await asyncio.gather(
        bench.executor.start(handle, bench.kind.fit(spec)),
        other.start(handle, bench.kind.fit(spec)),
        return_exceptions=True,
    )
    assert sorted(type(result).__name__ for result in results) == ["AlreadyStarted", "NoneType"]
    for executor in (other, bench.executor):
        with pytest.raises(AlreadyStarted):
            await executor.start(handle, bench.kind.fit(spec))
    await bench.until_logged(handle, "started")
    await other.close()
    await bench.executor.adopt(handle)
    await bench.executor.stop(handle, grace_seconds=0, reason=StopReason.REQUESTED)
    assert bench.log(handle) == "started\n"


def a_daemon_that_is_killed(bench: Bench, spec: AttemptSpec, *, start: bool) -> Handle:
    """Prepare, and start if asked to, in a process of its own, which then gets SIGKILL."""
    # Its processes are forks of one that has imported all they need: an interpreter for each would cost a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fixtures.executors"])
    ours, theirs = context.Pipe(duplex=False)
    daemon = context.Process(target=be_a_daemon, args=(bench.kind, bench.workspace.root, spec, start, theirs))
    daemon.start()
    theirs.close()
    handle = Handle.loads(ours.recv())
    daemon.kill()
    daemon.join()
    return handle


async def test_a_job_outlives_its_daemon_and_the_next_one_gets_its_exit_code(bench: Bench):
    spec = a_shell_job("echo one; until [ -e go ]; do sleep 0.01; done; echo two; exit 5")
    handle = a_daemon_that_is_killed(bench, spec, start=True)
    assert await bench.executor.adopt(handle) is Adoption.RUNNING
    await bench.until_logged(handle, "one")
    (bench.workspace.attempt(spec.attempt_id).work / "go").touch()
    assert await bench.executor.wait(handle) == ExitStatus(5)
    assert bench.log(handle) == "one\ntwo\n"


async def test_a_job_that_ended_while_no_daemon_ran_keeps_its_exit_code(bench: Bench):
    spec = a_shell_job("exit 6")
    handle = a_daemon_that_is_killed(bench, spec, start=True)
    await until(lambda: not processes_of(spec.attempt_id))
    assert await bench.executor.adopt(handle) in (Adoption.ENDED, Adoption.RUNNING)
    assert await bench.executor.wait(handle) == ExitStatus(6)


async def test_an_adopted_job_can_be_stopped(bench: Bench):
    spec = a_shell_job("trap 'exit 8' TERM; echo ready; while :; do sleep 0.01; done")
    handle = a_daemon_that_is_killed(bench, spec, start=True)
    await bench.executor.adopt(handle)
    await bench.until_logged(handle, "ready")
    await bench.executor.stop(handle, grace_seconds=TIMEOUT_SECONDS, reason=StopReason.REQUESTED)
    assert (await bench.executor.wait(handle)).exit_code == 8


async def test_what_was_only_prepared_is_started_by_the_next_daemon(bench: Bench):
    spec = a_shell_job("echo hello")
    handle = a_daemon_that_is_killed(bench, spec, start=False)
    assert await bench.executor.adopt(handle) is Adoption.NOT_STARTED
    await bench.executor.start(handle, bench.kind.fit(spec))
    assert (await bench.executor.wait(handle)).exit_code == 0
    assert bench.log(handle) == "hello\n"


async def test_the_sweep_leaves_known_attempts_and_removes_the_rest(bench: Bench):
    kept = await bench.start(a_shell_job("sleep 600"))
    unknown = await bench.start(a_shell_job("mkdir a; touch a/b; chmod 000 a; echo ready; sleep 600"))
    await bench.until_logged(unknown, "ready")
    await bench.executor.sweep({kept.attempt_id})
    assert [folder.root.name for folder in bench.workspace.attempts()] == [str(kept.attempt_id)]
    assert await bench.executor.adopt(kept) is Adoption.RUNNING
    assert not bench.workspace.attempt(unknown.attempt_id).root.exists()
    # Destroying is harmless as often as it is done.
    for handle in (kept, kept, unknown):
        await bench.executor.destroy(handle)
    assert not bench.workspace.attempts()


async def test_network_is_refused_where_the_provider_gives_none(bench: Bench):
    with pytest.raises(AttemptRefused, match="no network"):
        await bench.prepare(a_job("true", network=True))


async def test_signals_that_python_ignores_are_not_ignored_in_a_job(bench: Bench):
    _, text = await bench.run(a_job("grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"))
    # Signals 32 and 33 are the C library's own.
    assert [int(line.split()[1], 16) & 0x7FFFFFFF for line in text.splitlines()] == [0, 0]
