"""I1 to I6 of the failure model, looked at after each commit, each start and each end of a process.

The checks know what really runs. They read what is committed and never what production code believes, and they repeat
the schema's rules on purpose: a planted bug may take a constraint away.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from dantegpu.domain.ids import AttemptId
from tests.simulation import coverage
from tests.simulation.coverage import Outcome
from tests.simulation.hardware import Hardware, JobProcess
from tests.simulation.loop import Process
from tests.simulation.memory.billing import ledger_problems
from tests.simulation.memory.engine import Change, MemoryTx, Row
from tests.simulation.memory.scheduler import TERMINAL
from tests.simulation.world import Accepted, World

UNSUPERVISED_SECONDS = 2.5
"""After its daemon was stopped or dead, a machine needs so long to end what has lost its lease."""
ROUNDING_SECONDS = 1
CLOCK_SLACK_SECONDS = 0.5
MAX_LATE_SECONDS = 16.0
"""A renewal counts from its receipt; the longest that a message is under way here (a cut line, a stopped scheduler)."""
GPU_MILLI = 1000


class Checks:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._jobs = world.database.schemas["scheduler"].tables["jobs"].rows
        self._attempts = world.database.schemas["scheduler"].tables["attempts"].rows
        self._claims = world.database.schemas["scheduler"].tables["claims"].rows
        self._leases = world.database.schemas["scheduler"].tables["device_leases"].rows
        self._billing = world.database.schemas["billing"].tables
        self._leaders = world.database.schemas["scheduler"].tables["leader"].rows
        self._holders: dict[UUID, Process | None] = {}
        self._billed: dict[UUID, list[tuple[datetime, datetime, int, UUID]]] = {}
        self._look = {
            "scheduler": {
                "jobs": self._job,
                "attempts": self._attempt,
                "leader": self._leader,
                "device_leases": self._lease,
            },
            "billing": {"holds": self._hold, "transfers": self._transfer, "balances": self._balance},
        }
        world.watchers.commit = self.committed
        world.watchers.started = self.started
        world.watchers.ended = self.ended
        world.watchers.answered = self.answered

    def _violate(self, invariant: str, what: str) -> None:
        if not self._world.stopped:
            self._world.violate(invariant, what)

    def _note(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._world.happened[outcome] += 1

    # --- what happens -------------------------------------------------------------------------------------------------

    def answered(self, accepted: Accepted) -> None:
        if (accepted.job_id.uuid,) not in self._jobs:
            self._violate("I1", f"{accepted.job_id} was answered with 2xx and is not committed")

    def committed(self, tx: MemoryTx, changes: Sequence[Change]) -> None:
        """One transaction became visible."""
        schema = tx.schema.name
        look = self._look[schema]
        self._fenced(tx, changes)
        for change in changes:
            if (check := look.get(change.table)) is not None:
                check(change.before, change.after)
        if schema == "billing" and any(change.table == "balances" for change in changes):
            total = sum(row["balance_udgpu"] for row in self._billing["balances"].rows.values())
            if total:
                self._violate("I4", f"all balances add up to {total}")

    def started(self, hardware: Hardware, process: JobProcess) -> None:
        """A command runs."""
        attempt = self._attempts.get((process.attempt_id.uuid,))
        self._world.say(f"a process of {process.attempt_id} starts", hardware.name)
        if attempt is None:
            self._violate("I2", f"a process of {process.attempt_id} started, which was never committed")
            return
        if not any(row["attempt_id"] == attempt["id"] for row in self._billing["holds"].rows.values()):
            self._violate("I5", f"{process.attempt_id} started without a hold")
        self._one_process_per_job(attempt)
        self._devices_of(hardware)
        if process.restored:
            self._note(Outcome.RESTORED)
            self._goes_on(attempt, AttemptId.parse(process.restored).uuid)

    def _goes_on(self, attempt: Row, saved_id: UUID) -> None:
        """What lies at its checkpoint's path is what the last attempt that saved anything has saved."""
        saved = self._attempts[(saved_id,)]
        same = (saved["job_id"], saved["node_rank"]) == (attempt["job_id"], attempt["node_rank"])
        if not same or saved["epoch"] >= attempt["epoch"] or not saved["checkpoint_number"]:
            self._violate("I7", f"{attempt['id']} began with a checkpoint of {saved_id}")
        later = [row for row in self._attempts.values() if saved["epoch"] < row["epoch"] < attempt["epoch"]]
        if any(row["checkpoint_sha256"] for row in later if row["job_id"] == attempt["job_id"] and row["nodes"] == 1):
            self._violate("I7", f"{attempt['id']} began with an older checkpoint than its job has")

    def ended(self, hardware: Hardware, process: JobProcess) -> None:
        self._world.say(f"the process of {process.attempt_id} ends with {process.exit_code}", hardware.name)

    # --- I1, I2 -------------------------------------------------------------------------------------------------------

    def _job(self, before: Row | None, after: Row | None) -> None:
        if after is None:
            self._violate("I1", f"job {before and before['id']} was deleted")
            return
        self._tell_job(before, after)
        self._note(coverage.of_job(before, after))
        if before is None:
            return
        if before["state"] in TERMINAL and any(before[it] != after[it] for it in ("state", "outcome", "exit_code")):
            self._violate("I1", f"job {after['id']} ended {before['state']} and then became {after['state']}")
        if after["epoch"] < before["epoch"]:
            self._violate("I2", f"job {after['id']}: its epoch fell from {before['epoch']} to {after['epoch']}")

    def _attempt(self, before: Row | None, after: Row | None) -> None:
        if after is None:
            self._violate("I2", f"attempt {before and before['id']} was deleted")
            return
        self._note(coverage.of_attempt(before, after))
        if before is None:
            self._attempt_opened(after)
        else:
            self._attempt_changed(before, after)

    def _attempt_opened(self, new: Row) -> None:
        job = self._jobs[(new["job_id"],)]
        self._world.name(AttemptId(new["id"]), f"attempt {new['epoch']} of {job['id']}")
        self._world.name(new["id"], f"attempt {new['epoch']} of {job['id']}")
        for other in self._attempts.values():
            if other["job_id"] != new["job_id"] or other["id"] == new["id"]:
                continue
            same_gang = other["epoch"] == new["epoch"] and other["node_rank"] != new["node_rank"]
            if other["ended_at"] is None and not same_gang:
                self._violate("I2", f"{new['id']} and {other['id']} are live at the same time")
            if other["epoch"] >= new["epoch"] and not same_gang:
                self._violate("I2", f"{new['id']} has epoch {new['epoch']}, an older one has {other['epoch']}")
        gang = [it for it in self._attempts.values() if (it["job_id"], it["epoch"]) == (new["job_id"], new["epoch"])]
        if len(gang) != new["nodes"]:
            self._violate("I2", f"{len(gang)} of the {new['nodes']} nodes of job {new['job_id']} were placed")
        self._capacity(new["machine_id"])
        hold = self._hold_of(new["id"], 0)
        if hold is None or hold["state"] != "open":
            self._violate("I5", f"{new['id']} was placed without an open hold")

    def _attempt_changed(self, before: Row, after: Row) -> None:
        if before["ended_at"] is not None:
            final = ("ended_at", "outcome", "exit_code", "state", "billed_seconds", "running_at", "lease_renewed_at")
            if changed := [name for name in final if before[name] != after[name]]:
                self._violate("I2", f"{after['id']} had ended and changed its {', '.join(changed)}")
        elif after["ended_at"] is not None:
            self._attempt_ended(after)
        if after["stop_reason"] == "preempted" and not after["spot"]:
            self._violate("spot", f"{after['id']} was preempted and is no spot work")
        if before["lease_expires_at"] <= after["lease_renewed_at"] != before["lease_renewed_at"]:
            self._violate("I6", f"the lease of {after['id']} was renewed after it had run out")
        if after["windows_closed"] < before["windows_closed"] or after["cost_udgpu"] < before["cost_udgpu"]:
            self._violate("I3", f"{after['id']}: closed windows or cost went back")

    def _attempt_ended(self, row: Row) -> None:
        """The truth about what ended: on which machine it ran, and how."""
        hardware, process = self._process_of(row)
        if process is not None and process.alive and not self._unsupervised(hardware):
            self._violate(
                "I6", f"{row['id']} ended ({row['outcome']}) and gave its devices back while its process still runs"
            )
        really = process.exit_code if process is not None else None
        if row["outcome"] in ("succeeded", "failed") and row["exit_code"] not in (None, really):
            self._violate("I2", f"{row['id']} is said to have ended with {row['exit_code']}; really: {really}")
        self._billed_time(row, hardware, process)

    def _one_process_per_job(self, attempt: Row) -> None:
        running = [
            hardware
            for hardware, process in self._running()
            if (row := self._attempts.get((process.attempt_id.uuid,))) is not None
            and (row["job_id"], row["node_rank"]) == (attempt["job_id"], attempt["node_rank"])
            and not self._unsupervised(hardware)
        ]
        if len(running) > 1:
            self._violate("I2", f"job {attempt['job_id']} runs on {' and '.join(it.name for it in running)} at once")

    def _devices_of(self, hardware: Hardware) -> None:
        """What the processes on this machine really use of its devices."""
        if self._unsupervised(hardware):
            return
        used: dict[UUID, int] = {}
        for owner, process in self._running():
            if owner is hardware:
                for lease in self._leases.values():
                    if lease["attempt_id"] == process.attempt_id.uuid:
                        used[lease["device_id"]] = used.get(lease["device_id"], 0) + lease["milli"]
        for device, milli in used.items():
            if milli > GPU_MILLI:
                self._violate("I2", f"device {device} of {hardware.name} is used by {milli}/1000 at once")

    def _capacity(self, machine_id: UUID) -> None:
        """What live attempts hold of a machine, by what is committed."""
        hardware = next(machine for machine in self._world.machines if machine.id.uuid == machine_id)
        inventory = hardware.inventory()
        live = [row for row in self._attempts.values() if row["machine_id"] == machine_id and row["ended_at"] is None]
        ids = {row["id"] for row in live}
        used: dict[UUID, int] = {}
        for lease in self._leases.values():
            if lease["attempt_id"] in ids:
                used[lease["device_id"]] = used.get(lease["device_id"], 0) + lease["milli"]
        if max(used.values(), default=0) > GPU_MILLI:
            self._violate("I2", f"a device of {hardware.name} is leased twice")
        if sum(row["cpu_milli"] for row in live) > inventory.cpu_milli:
            self._violate("I2", f"more CPUs of {hardware.name} are leased than it has")

    def _fenced(self, tx: MemoryTx, changes: Sequence[Change]) -> None:
        """Only who holds the leader's lease at the moment of the commit may place anything."""
        for change in changes:
            if change.table == "leader" and change.after is not None:
                self._holders.setdefault(change.after["holder"], tx.process)
        if any(change.table == "attempts" and change.before is None for change in changes):
            holder = self._leaders[("placement",)]["holder"]
            if self._holders[holder] is not tx.process:
                self._violate("I2", f"{tx.process and tx.process.name} placed a job and does not lead any more")

    def _lease(self, before: Row | None, after: Row | None) -> None:
        if before is None and after is not None:
            self._claimed(after)
        if after is None:
            self._violate("I2", "a lease of a device was deleted")
        elif after["released"] and self._attempts[(after["attempt_id"],)]["ended_at"] is None:
            self._violate("I6", f"{after['device_id']} was given back while {after['attempt_id']} is still live")

    def _claimed(self, lease: Row) -> None:
        """What somebody gave way for is kept for the job as long as that waits and can pay."""
        job_id = self._attempts[(lease["attempt_id"],)]["job_id"]
        for claim in self._claims.values():
            waits = self._jobs[(claim["job_id"],)]["reason"] == "reserved"
            if waits and lease["device_id"] in claim["device_ids"] and claim["job_id"] != job_id:
                self._violate("spot", f"{lease['device_id']} is kept for {claim['job_id']} and was given to {job_id}")

    def _leader(self, before: Row | None, after: Row | None) -> None:
        if before is not None and after is not None and after["epoch"] < before["epoch"]:
            self._violate("I2", "the leader's epoch fell")
        elif before is not None and after is not None and after["epoch"] > before["epoch"]:
            self._note(Outcome.LEADER_CHANGED)

    # --- I3 -----------------------------------------------------------------------------------------------------------

    def _billed_time(self, row: Row, hardware: Hardware, process: JobProcess | None) -> None:
        seconds = row["billed_seconds"]
        if not seconds:
            return
        since: datetime = row["running_at"] or row["ended_at"]
        if row["outcome"] == "provider_fault":
            self._violate("I3", f"{row['id']} ended by the provider's fault and is billed {seconds} s")
        until: datetime = row["ended_at"] if row["exit_code"] is not None else row["lease_expires_at"]
        if seconds > math.ceil((until - since).total_seconds() + CLOCK_SLACK_SECONDS) + ROUNDING_SECONDS:
            self._violate("I3", f"{row['id']} is billed {seconds} s, its lease allows {until - since}")
        if process is None:
            self._violate("I3", f"{row['id']} is billed {seconds} s and no process of it ever ran")
            return
        ended = process.ended_at_seconds if process.ended_at_seconds is not None else self._world.loop.time()
        ran = ended - process.started_at_seconds
        # Until its daemon saw the end, or the last renewal arrived; never longer than the lease, see above.
        unseen = ended <= self._world.supervised_since(hardware)
        late = MAX_LATE_SECONDS if unseen or row["exit_code"] is None else CLOCK_SLACK_SECONDS
        if seconds > math.ceil(ran + late) + ROUNDING_SECONDS:
            self._violate("I3", f"{row['id']} is billed {seconds} s, its process ran {ran:.1f} s")
        self._no_second_twice(row, since, seconds)

    def _no_second_twice(self, row: Row, since: datetime, seconds: int) -> None:
        # Whole seconds are billed, so the last one of an attempt may overlap the first one of the next.
        until = since + timedelta(seconds=max(0, seconds - ROUNDING_SECONDS))
        for lease in self._leases.values():
            if lease["attempt_id"] != row["id"]:
                continue
            known = self._billed.setdefault(lease["device_id"], [])
            for other_since, other_until, milli, other in known:
                overlap = (min(until, other_until) - max(since, other_since)).total_seconds()
                if overlap > CLOCK_SLACK_SECONDS and milli + lease["milli"] > GPU_MILLI:
                    self._violate(
                        "I3", f"{overlap:.1f} s of device {lease['device_id']} are billed to {other} and {row['id']}"
                    )
            known.append((since, until, lease["milli"], row["id"]))

    # --- I4, I5 -------------------------------------------------------------------------------------------------------

    def _hold(self, before: Row | None, after: Row | None) -> None:
        if after is None:
            self._violate("I5", "a hold was deleted")
        elif before is not None and before["state"] != "open":
            self._violate("I5", f"the hold of window {after['window_index']} of {after['attempt_id']} was closed twice")
        elif before is not None and after["used_seconds"] is not None:
            self._note(Outcome.LATER_WINDOW if after["window_index"] and after["used_seconds"] else None)
            self._world.say(
                f"window {after['window_index']} of {after['attempt_id']}: {after['used_seconds']} s billed"
            )

    def _hold_of(self, attempt_id: UUID, window: int) -> Row | None:
        for row in self._billing["holds"].rows.values():
            if row["attempt_id"] == attempt_id and row["window_index"] == window:
                return row
        return None

    def _transfer(self, before: Row | None, after: Row | None) -> None:
        if before is not None or after is None:
            self._violate("I4", "a transfer was changed or deleted")
            return
        window = (after["attempt_id"], after["window_index"], after["kind"])
        same = [
            row
            for row in self._billing["transfers"].rows.values()
            if after["attempt_id"] is not None and (row["attempt_id"], row["window_index"], row["kind"]) == window
        ]
        if len(same) > 1:
            self._violate("I3", f"window {after['window_index']} of {after['attempt_id']} is billed twice")

    def _balance(self, before: Row | None, after: Row | None) -> None:
        if after is not None and after["kind"] != "issuance" and after["balance_udgpu"] < after["held_udgpu"]:
            self._violate("I4", f"account {after['account_id']} is overdrawn")

    # --- the truth ----------------------------------------------------------------------------------------------------

    def _running(self) -> list[tuple[Hardware, JobProcess]]:
        return [
            (machine, process) for machine in self._world.machines for process in machine.all_processes if process.alive
        ]

    def _process_of(self, row: Mapping[str, Any]) -> tuple[Hardware, JobProcess | None]:
        hardware = next(machine for machine in self._world.machines if machine.id.uuid == row["machine_id"])
        found = [process for process in hardware.all_processes if process.attempt_id.uuid == row["id"]]
        if len(found) > 1:
            self._violate("I2", f"{row['id']} was started {len(found)} times on {hardware.name}")
        return hardware, found[-1] if found else None

    def _unsupervised(self, hardware: Hardware) -> bool:
        """Its daemon is dead or stopped, or was a moment ago: nobody could end what has lost its lease."""
        now = self._world.loop.time()
        return now - self._world.supervised_since(hardware) < UNSUPERVISED_SECONDS

    # --- the end ------------------------------------------------------------------------------------------------------

    def unfinished(self) -> str:
        """What keeps the run from being over; empty: everything has come to its end."""
        world = self._world
        if len(world.accepted) < len(world.scenario.jobs):
            return "not every submission was answered"
        for row in self._jobs.values():
            if row["state"] not in TERMINAL or not row["settled"]:
                return f"job {row['id']} is {row['state']} ({row['reason']}), settled: {row['settled']}"
        for row in self._billing["holds"].rows.values():
            if row["state"] == "open":
                return f"the hold of window {row['window_index']} of {row['attempt_id']} is open"
        for machine in world.machines:
            if machine.journal_file.execute("SELECT count(*) FROM attempts").fetchone()[0]:
                return f"{machine.name} has attempts that nobody has acknowledged"
            if any(process.alive for process in machine.all_processes):
                return f"something still runs on {machine.name}"
        return ""

    def at_the_end(self) -> None:
        """Once everything is over."""
        for problem in ledger_problems(lambda table: list(self._billing[table].rows.values())):
            self._violate("I4", problem)
        for accepted in self._world.accepted:
            self._bill_of(accepted)

    def _bill_of(self, accepted: Accepted) -> None:
        job = self._jobs[(accepted.job_id.uuid,)]
        charged = sum(
            row["charged_udgpu"] or 0 for row in self._billing["holds"].rows.values() if row["job_id"] == job["id"]
        )
        if charged != job["cost_udgpu"]:
            self._violate("I3", f"job {job['id']} says that it cost {job['cost_udgpu']}, {charged} were charged")
        if job["state"] == "SUCCEEDED" and accepted.plan.exit_code != 0:
            self._violate("I2", f"job {job['id']} succeeded although its command fails")

    def _tell_job(self, before: Row | None, after: Row) -> None:
        if before is None or before["state"] != after["state"]:
            detail = after["reason"] or after["outcome"] or ""
            self._world.say(f"job {after['id']} is {after['state']} (epoch {after['epoch']}) {detail}", "database")
