"""The `dante` commands as people type them, against a platform that `dante up` started."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.fixtures.cluster import wait_until
from tests.fixtures.platform import DANTE, UpPlatform, json_of, run_dante

pytestmark = pytest.mark.needs("bubblewrap")

SMALL = ("--cpu", "0.1", "--memory", "128MB")
IMPOSSIBLE = ("--gpu", "H100:8")


@dataclass(slots=True)
class Typist:
    """Somebody with a DANTE_HOME, logged in by password."""

    platform: UpPlatform
    home: Path
    email: str
    password: str
    team_id: str

    def dante(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        return self.platform.dante(*arguments, home=self.home, **options)

    def json(self, *arguments: str, **options: Any) -> Any:
        """The object of a command that must succeed."""
        done = self.dante(*arguments, "--json", **options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("\n") == 1
        return json_of(done)

    def submit(self, *arguments: str) -> str:
        """`dante run --no-files --detach`; the job's id."""
        done = self.dante("run", *SMALL, "--no-files", "--detach", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait(self, job: str, *states: str) -> Any:
        def reached() -> Any:
            found = self.json("show", job)["job"]
            return found if found["state"] in states else None

        return wait_until(reached, f"{job} is {states}")


def a_typist(platform: UpPlatform, home: Path, amount: str = "5") -> Typist:
    email, password = f"{uuid4().hex}@example.org", uuid4().hex
    done = platform.dante("register", email, "--password-stdin", "--json", home=home, stdin=password + "\n")
    assert done.returncode == 0, done.stderr
    team_id = json_of(done)["team"]["id"]
    if amount != "0":
        assert platform.dante("admin", "credit", team_id, amount).returncode == 0
    return Typist(platform, home, email, password, team_id)


@pytest.fixture(scope="module")
def ann(platform: UpPlatform, tmp_path_factory: pytest.TempPathFactory) -> Typist:
    return a_typist(platform, tmp_path_factory.mktemp("ann"))


@pytest.fixture(scope="module")
def bob(platform: UpPlatform, tmp_path_factory: pytest.TempPathFactory) -> Typist:
    return a_typist(platform, tmp_path_factory.mktemp("bob"), "0")


def test_run_sends_the_folder_prints_what_the_job_prints_and_brings_the_results(ann: Typist, tmp_path: Path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "data.txt").write_text("41")
    (project / ".gitignore").write_text("*.bin\n")
    (project / "large.bin").write_bytes(b"x" * 1000)
    (project / "train.py").write_text(
        "import os, sys\n"
        "print(sorted(os.listdir('.')))\n"
        "answer = int(open('data.txt').read()) + 1\n"
        "open(os.environ['DANTE_OUTPUT'] + '/answer.txt', 'w').write(str(answer))\n"
        "sys.stdout.buffer.write(b'\\xff\\n')\n"
    )
    done = subprocess.run(
        [*DANTE, "run", *SMALL, "--", "python3", "train.py"],
        cwd=project, capture_output=True, check=False, timeout=120,
        env={**os.environ, "DANTE_HOME": str(ann.home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"['.gitignore', 'data.txt', 'train.py']\n\xff\n"
    told = done.stderr.decode()
    for words in ("sent 3 files", "submitted job_", "placed: on ", "running", "SUCCEEDED", "cost 0.0"):
        assert words in told
    fetched = ann.dante("results", "last", "-o", str(tmp_path / "out"))
    assert fetched.returncode == 0, fetched.stderr
    assert (tmp_path / "out" / "answer.txt").read_text() == "42"
    assert "answer.txt" in ann.dante("results", "last").stdout


def test_run_ends_with_the_jobs_exit_code(ann: Typist):
    done = ann.dante("run", *SMALL, "--no-files", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, sorted(done.stdout.split())) == (7, ["err", "out"])


def test_run_with_json_prints_one_object_and_the_log_elsewhere(ann: Typist):
    done = ann.dante("run", *SMALL, "--no-files", "--json", "--", "sh", "-c", "echo out; exit 3")
    answer = json_of(done)
    assert (done.returncode, answer["exit_code"], answer["job"]["state"]) == (3, 3, "FAILED")
    assert answer["job"]["settled"]
    assert "out" in done.stderr


def test_what_a_job_cost_is_the_same_in_its_receipt_and_in_the_wallet(ann: Typist):
    job = ann.submit("--", "sleep", "1.2")
    ended = wait_until(
        lambda: found if (found := ann.json("show", job)["job"])["settled"] else None, "the job is settled"
    )
    receipt = ann.json("receipt", job)["receipt"]
    entries = [entry for entry in ann.json("wallet", "entries")["entries"] if entry["job_id"] == job]
    assert ended["cost_udgpu"] == receipt["total_udgpu"] == -sum(entry["amount_udgpu"] for entry in entries) > 0
    assert f"{job}" in ann.dante("receipt", job).stdout
    assert ann.platform.dante("admin", "ledger").stdout.startswith("the books are right")


def test_a_job_that_nothing_fits_waits_and_why_says_what_excludes_the_machines(ann: Typist):
    job = ann.submit(*IMPOSSIBLE, "--name", "impossible", "--priority", "7", "--deadline", "8h", "--", "true")
    waiting = wait_until(
        lambda: found if (found := ann.json("show", job)["job"])["reason"] != "new" else None, "it has been looked at"
    )
    assert (waiting["state"], waiting["reason"]) == ("QUEUED", "no_matching_gpu")
    assert "No machine online has the requested GPUs" in ann.dante("ps").stdout
    explanation = ann.json("why", "impossible")["explanation"]
    assert explanation["machines_fitting"] == 0
    assert "excluded by gpu_model" in ann.dante("why", job).stdout
    shown = ann.dante("show", job).stdout
    assert re.search(r"^priority +7$", shown, re.MULTILINE)
    assert re.search(r"^deadline +8h after submission$", shown, re.MULTILINE)
    assert ann.dante("stop", job[-8:]).stdout == f"{job} CANCELLED\n"
    assert job not in ann.dante("ps").stdout
    assert job in ann.dante("ps", "--all").stdout


def test_no_wait_refuses_a_job_that_nothing_fits(ann: Typist):
    done = ann.dante("run", *IMPOSSIBLE, "--no-files", "--no-wait", "--json", "--", "true")
    assert (done.returncode, json_of(done)["error"]["code"]) == (1, "no-offer-fits")


def test_a_wrong_request_is_refused_before_anything_is_sent(ann: Typist):
    done = ann.dante("run", "--gpu", "A100:40GB..:x", "--", "true")
    assert done.returncode == 2
    assert "resources.gpu" in done.stderr
    assert "Traceback" not in done.stderr


def test_submit_takes_a_file_with_several_jobs_and_the_shells_environment(ann: Typist, tmp_path: Path):
    (tmp_path / "hello.txt").write_text("from the folder\n")
    (tmp_path / "jobs.yaml").write_text(
        "name: one\nfiles: [.]\nenv: [WORD]\ncommands: ['echo $WORD', cat hello.txt]\n"
        "resources: {cpu: 0.1, memory: 128MB}\n---\nname: two\ncommand: [echo, second]\n"
        "resources: {cpu: 0.1, memory: 128MB}\n"
    )
    jobs = ann.json("submit", str(tmp_path / "jobs.yaml"), env={"WORD": "given"})["jobs"]
    assert [job["name"] for job in jobs] == ["one", "two"]
    assert ann.dante("logs", "-f", jobs[0]["id"]).stdout == "given\nfrom the folder\n"
    assert ann.dante("logs", "-f", "last").stdout == "second\n"


def test_submit_reads_standard_input_and_can_follow(ann: Typist):
    text = "commands: [echo piped, exit 5]\nresources: {cpu: 0.1, memory: 128MB}\n"
    done = ann.dante("submit", "-", "--follow", stdin=text)
    assert (done.returncode, done.stdout) == (5, "piped\n")


def test_a_wrong_job_file_is_told_by_line_and_submits_nothing(ann: Typist, tmp_path: Path):
    before = len(ann.json("ps", "--all", "-n", "500")["jobs"])
    (tmp_path / "job.yaml").write_text("name: x\ncomands: [true]\nvolumes: []\n")
    done = ann.dante("submit", "job.yaml", cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith("job.yaml:2: comands: unknown field; did you mean 'commands'?")
    assert lines[1].startswith("job.yaml:3: volumes: 'volumes' is not supported yet")
    assert len(ann.json("ps", "--all", "-n", "500")["jobs"]) == before


def test_a_job_file_that_is_not_there_is_told(ann: Typist):
    done = ann.dante("submit", "nothing.yaml")
    assert (done.returncode, done.stderr) == (2, "dante: cannot read nothing.yaml: No such file or directory\n")


def test_ctrl_c_while_following_leaves_the_job_running_and_says_how_to_stop_it(ann: Typist):
    follower = subprocess.Popen(
        [*DANTE, "run", *SMALL, "--no-files", "--", "sh", "-c", "echo started; sleep 600"],
        env={**os.environ, "DANTE_HOME": str(ann.home)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert follower.stdout is not None
    assert follower.stdout.readline() == "started\n"
    follower.send_signal(signal.SIGINT)
    _, told = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert "goes on" in told
    assert "dante stop job_" in told
    assert "Traceback" not in told
    assert ann.json("show", "last")["job"]["state"] == "RUNNING"
    assert ann.dante("stop", "last").returncode == 0
    assert ann.wait("last", "CANCELLED")["outcome"] == "cancelled"


def test_logs_follow_a_job_live(ann: Typist):
    job = ann.submit("--", "sh", "-c", "echo first; read line; echo never")
    follower = subprocess.Popen(
        [*DANTE, "logs", "-f", job], env={**os.environ, "DANTE_HOME": str(ann.home)}, stdout=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    assert follower.stdout.readline() == "first\n"
    ann.dante("stop", job)
    assert follower.wait(timeout=60) == 0
    follower.stdout.close()


def test_other_teams_jobs_are_not_there(ann: Typist, bob: Typist):
    job = ann.submit("--", "true")
    for arguments in (["show"], ["logs"], ["results"], ["why"], ["receipt"], ["stop"]):
        done = bob.dante(*arguments, job, "--json")
        assert (arguments, done.returncode) == (arguments, 3)
        assert json_of(done)["error"]["code"] == "job-not-found"
    assert bob.json("ps", "--all")["jobs"] == []


def test_without_funds_a_job_waits_with_that_reason_and_starts_when_money_comes(platform: UpPlatform, tmp_path: Path):
    poor = a_typist(platform, tmp_path, "0")
    job = poor.submit("--", "echo", "at last")
    wait_until(lambda: poor.json("show", job)["job"]["reason"] == "no_funds", "it waits for funds")
    assert "wallet cannot cover" in poor.dante("why", job).stdout
    assert platform.dante("admin", "credit", poor.team_id, "1").returncode == 0
    assert poor.dante("logs", "-f", job).stdout == "at last\n"
    poor.wait(job, "SUCCEEDED")


@pytest.mark.parametrize(
    "arguments", [["credit", "team_01h455vb4pex5vsknk084sn02q", "1"], ["ledger"], ["teams"], ["jobs"]]
)
def test_only_the_operator_may_administer(ann: Typist, arguments: list[str]):
    done = ann.dante("admin", *arguments, "--json")
    assert (done.returncode, json_of(done)["error"]["status"]) == (4, 403)


def test_a_wrong_password_is_told_and_changes_nothing(ann: Typist):
    done = ann.dante("login", ann.email, "--password-stdin", stdin="wrong password\n")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert ann.json("whoami")["user"]["email"] == ann.email


def test_without_a_login_the_way_in_is_told(platform: UpPlatform, tmp_path: Path):
    done = platform.dante("ps", home=tmp_path)
    assert done.returncode == 4
    assert "dante login" in done.stderr


def test_an_access_token_that_is_not_valid_any_more_is_renewed_unseen(ann: Typist):
    path = ann.home / "credentials.json"
    document = json.loads(path.read_text())
    entry = document["platforms"][ann.platform.running.url]
    spoilt = entry["access_token"] = entry["access_token"][:-8] + "AAAAAAAA"
    path.write_text(json.dumps(document))
    assert ann.json("whoami")["user"]["email"] == ann.email
    renewed = json.loads(path.read_text())["platforms"][ann.platform.running.url]
    assert renewed["access_token"] != spoilt
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_works_for_programs_until_it_is_revoked(ann: Typist, tmp_path: Path):
    made = ann.json("keys", "create", "program", "--expires", "1h")
    assert made["key"]["id"] in ann.dante("keys").stdout
    with_key = {"DANTE_API_KEY": made["secret"]}
    as_program = ann.platform.dante("whoami", "--json", home=tmp_path, env=with_key)
    assert json_of(as_program)["team_id"] == ann.team_id
    logged_in = ann.platform.dante("login", "--api-key-stdin", home=tmp_path, stdin=made["secret"] + "\n")
    assert logged_in.returncode == 0
    assert ann.dante("keys", "revoke", made["key"]["id"]).returncode == 0
    wait_until(lambda: ann.platform.dante("whoami", home=tmp_path).returncode == 4, "the key is refused")


def test_teams_can_be_made_used_and_shared(platform: UpPlatform, ann: Typist, tmp_path: Path):
    carl = a_typist(platform, tmp_path, "0")
    team = carl.json("teams", "create", "lab")["team"]
    assert carl.dante("teams", "use", "lab").returncode == 0
    assert carl.json("whoami")["team_id"] == team["id"]
    assert carl.json("wallet")["wallet"]["team_id"] == team["id"]
    assert carl.dante("teams", "add", ann.email, "--role", "viewer").returncode == 0
    members = [(m["email"], m["role"]) for m in carl.json("teams", "members")["members"]]
    assert members == sorted([(carl.email, "owner"), (ann.email, "viewer")])
    assert carl.dante("teams", "remove", ann.email).returncode == 0
    assert len(carl.json("teams", "members")["members"]) == 1


def test_logging_out_forgets_the_secret(platform: UpPlatform, tmp_path: Path):
    dora = a_typist(platform, tmp_path, "0")
    assert dora.dante("logout").returncode == 0
    assert dora.dante("ps").returncode == 4
    assert dora.dante("logout").returncode == 3
    again = dora.dante("login", dora.email, "--password-stdin", stdin=dora.password + "\n")
    assert again.returncode == 0, again.stderr


@pytest.fixture
def machine(platform: UpPlatform) -> Iterator[str]:
    """The platform's machine, put back as it was."""
    found = json_of(platform.dante("provider", "list", "--json"))["machines"][0]["id"]
    yield found
    platform.dante("provider", "resume")
    platform.dante("provider", "price", "--cpu-hour", "0.01")


def test_a_provider_sets_the_price_that_offers_show_and_jobs_pay(platform: UpPlatform, ann: Typist, machine: str):
    assert platform.dante("provider", "price", "--cpu-hour", "3.60").returncode == 0
    offers = ann.json("offers")["offers"]
    assert [offer["ask"]["price_udgpu_per_cpu_hour"] for offer in offers if offer["machine"]["id"] == machine] == [
        3_600_000
    ]
    assert machine in ann.dante("offers").stdout
    job = ann.submit("--", "true")
    wait_until(lambda: ann.json("show", job)["job"]["settled"], "the job is settled")
    # A tenth of a core at 3.60 an hour is 100 micro-$dGPU per second.
    line = ann.json("receipt", job)["receipt"]["lines"][0]
    assert line["rate_udgpu_per_hour"] == 360_000
    assert line["charged_udgpu"] == 100 * line["used_seconds"]


def test_a_paused_machine_takes_nothing_new_until_it_is_resumed(platform: UpPlatform, ann: Typist, machine: str):
    assert platform.dante("provider", "pause").stdout.startswith(f"{machine} is paused")
    job = ann.submit("--", "true")
    wait_until(lambda: ann.json("show", job)["job"]["reason"] not in (None, "new"), "it has been looked at")
    assert ann.json("show", job)["job"]["state"] == "QUEUED"
    assert platform.dante("provider", "resume", machine).returncode == 0
    ann.wait(job, "SUCCEEDED")


def test_somebody_elses_machine_cannot_be_touched(ann: Typist, machine: str):
    for arguments in (
        ["show", machine],
        ["pause", machine],
        ["price", machine, "--gpu-hour", "1"],
        ["leave", machine, "--yes"],
    ):
        done = ann.dante("provider", *arguments, "--json")
        assert (arguments, done.returncode) == (arguments, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ps"], ["ps", "--all"], ["offers"], ["wallet"], ["wallet", "entries"], ["whoami"], ["keys"], ["teams"],
        ["provider", "list"], ["provider", "show"], ["provider", "token"], ["admin", "ledger"], ["admin", "teams"],
        ["admin", "jobs"],
    ],
)  # fmt: skip
def test_every_listing_is_one_json_object_and_readable_text(platform: UpPlatform, arguments: list[str]):
    as_json, as_text = platform.dante(*arguments, "--json"), platform.dante(*arguments)
    assert (as_json.returncode, as_text.returncode) == (0, 0), as_json.stdout + as_text.stderr
    assert isinstance(json_of(as_json), dict)
    assert as_json.stderr == ""
    assert as_text.stdout + as_text.stderr


def test_nothing_at_the_address_is_told_with_an_exit_code_of_its_own(tmp_path: Path):
    done = run_dante("ps", "--json", home=tmp_path, url="http://127.0.0.1:9")
    assert (done.returncode, json_of(done)["error"]["code"]) == (5, "unreachable")
