"""Following a job while the platform goes away and comes back."""

import contextlib
import os
import pty
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from tests.fixtures.platform import DANTE, UpPlatform, json_of, start_up, stop_up

pytestmark = pytest.mark.needs("bubblewrap")

LINES = [str(number) for number in range(1, 31)]


def a_free_port() -> int:
    """The first of four in a row, below the range that the kernel gives away by itself."""
    for first in range(20_000 + os.getpid() % 5_000, 32_000, 4):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + 4):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


def test_run_goes_on_following_after_the_platform_was_restarted(dante_home: Path):
    port = str(a_free_port())
    platform = start_up(dante_home, "--port", port)
    try:
        script = "for i in $(seq 30); do echo $i; sleep 0.1; done"
        follower = subprocess.Popen(
            [*DANTE, "run", "--cpu", "0.1", "--memory", "128MB", "--no-files", "--", "sh", "-c", script],
            env={**os.environ, "DANTE_HOME": str(dante_home)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        stdout, stderr = follower.stdout, follower.stderr
        assert stdout is not None
        assert stderr is not None
        told: list[str] = []
        listening = threading.Thread(target=lambda: told.extend(stderr))
        listening.start()
        assert stdout.readline() == "1\n"
        stop_up(platform)
        platform = start_up(dante_home, "--port", port)
        rest = stdout.read().split()
        assert follower.wait(timeout=60) == 0
        listening.join()
        assert rest[-len(LINES) :] == LINES or ["1", *rest] == LINES
        assert any("trying again" in line for line in told)
        assert any("SUCCEEDED" in line for line in told)
    finally:
        stop_up(platform)


def on_a_terminal(home: Path, *arguments: str) -> tuple["subprocess.Popen[bytes]", int]:
    """A command whose three streams are a terminal; its process, and the other end of the terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*DANTE, *arguments], env={**os.environ, "DANTE_HOME": str(home), "TERM": "xterm"},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def read_until(terminal: int, word: str) -> str:
    """What comes, up to `word`; all of it when it never comes."""
    text = ""
    while word not in text:
        try:
            text += os.read(terminal, 4096).decode()
        except OSError:
            break
    return text


@pytest.mark.parametrize(("answer", "state", "exit_code"), [("y", "CANCELLED", 143), ("n", "RUNNING", 130)])
def test_on_a_terminal_ctrl_c_asks_whether_to_stop_the_job(
    platform: UpPlatform, answer: str, state: str, exit_code: int
):
    command = ("run", "--cpu", "0.1", "--memory", "128MB", "--no-files", "--", "sh", "-c", "echo ready; sleep 600")
    process, terminal = on_a_terminal(platform.home, *command)
    try:
        assert "ready" in read_until(terminal, "ready")
        process.send_signal(signal.SIGINT)
        assert "Stop job_" in read_until(terminal, "[y/N]")
        os.write(terminal, f"{answer}\n".encode())
        rest = read_until(terminal, "no such word")
        assert process.wait(timeout=60) == exit_code
        assert ("CANCELLED" if answer == "y" else "goes on") in rest
        assert json_of(platform.dante("show", "last", "--json"))["job"]["state"] == state
    finally:
        os.close(terminal)
        platform.dante("stop", "last")


def test_on_a_terminal_tables_show_whole_ids(platform: UpPlatform):
    process, terminal = on_a_terminal(platform.home, "provider", "list")
    shown = read_until(terminal, "no such word")
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    machine = json_of(platform.dante("provider", "list", "--json"))["machines"][0]["id"]
    assert machine in shown
