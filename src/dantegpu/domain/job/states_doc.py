"""docs/job_states.md, from the transition table: `python -m dantegpu.domain.job.states_doc > docs/job_states.md`."""

from dantegpu.domain.job import TRANSITIONS, JobState, Outcome, QueueReason

_MEANINGS: dict[JobState, tuple[str, str, str]] = {
    JobState.QUEUED: (
        "Waits for a machine, and has a reason why.",
        "the scheduler's next round, or the submitter by stopping it",
        "Nothing is held. The new leader loads it from PostgreSQL.",
    ),
    JobState.PLACED: (
        "Devices are leased, the first hold is open, the machine is being told.",
        "the machine's first report; or the lease's end",
        "The machine asks for its desired attempts when it is back; else the lease runs out and the job is retried.",
    ),
    JobState.STARTING: (
        "The machine prepares image and inputs. Not billed.",
        "the machine's report; or the lease's end",
        "The daemon takes the attempt up from its journal, or reports a provider's fault.",
    ),
    JobState.RUNNING: (
        "The command runs and is billed per second.",
        "the machine's report; a stop; or the lease's end",
        "The daemon adopts the running process. Without a renewal it kills it, and billing ends at the last renewal.",
    ),
    JobState.STOPPING: (
        "Somebody asked for an end; the machine is ending the command. Billed until it says so.",
        "the machine's report; or the lease's end",
        "The stop flag is part of the desired attempt, so it is told again.",
    ),
    JobState.SUCCEEDED: ("The command ended with exit code 0.", "nobody", "Nothing is left to do but to settle."),
    JobState.FAILED: ("It ended otherwise, and no retry is left.", "nobody", "Nothing is left to do but to settle."),
    JobState.CANCELLED: ("It was stopped by a person.", "nobody", "Nothing is left to do but to settle."),
}

_OUTCOMES: dict[Outcome, tuple[str, str, str]] = {
    Outcome.SUCCEEDED: ("exit code 0", "SUCCEEDED", "the seconds it ran"),
    Outcome.FAILED: (
        "the job's own error, out of memory included",
        "FAILED; a retry if `error` is in `retry.on_events`",
        "the seconds it ran",
    ),
    Outcome.CANCELLED: ("stopped by its team or the operator", "CANCELLED", "the seconds it ran"),
    Outcome.LOST: (
        "the machine stopped answering and its lease ran out",
        "a retry, else FAILED",
        "to the last renewal",
    ),
    Outcome.PREEMPTED: (
        "gave way: other work, a drained machine, or no funds",
        "a retry that uses up no try",
        "the seconds it ran",
    ),
    Outcome.TIMED_OUT: ("max_duration or budget used up", "FAILED", "the seconds it ran"),
    Outcome.PROVIDER_FAULT: ("the machine's own fault", "a retry elsewhere if possible, else FAILED", "nothing"),
}


def job_states_markdown() -> str:
    """The whole page."""
    lines = [
        "# Job states",
        "",
        "Made from the transition table in `dantegpu.domain.job` by `python -m dantegpu.domain.job.states_doc`.",
        "A pair of state and event that is not listed here raises an error.",
        "",
        *_diagram(),
        "",
        "## States",
        "",
        "| state | meaning | who moves it on | after a crash |",
        "|---|---|---|---|",
    ]
    for state, (meaning, mover, crash) in _MEANINGS.items():
        lines.append(f"| `{state.value}` | {meaning} | {mover} | {crash} |")
    lines += ["", "## Transitions", "", "| state | event | next | what it means |", "|---|---|---|---|"]
    for (state, event), row in sorted(TRANSITIONS.items(), key=lambda it: (_order(it[0][0]), it[0][1].__name__)):
        targets = ", ".join(f"`{target.value}`" for target in row.to)
        lines.append(f"| `{state.value}` | `{event.__name__}` | {targets} | {row.says} |")
    lines += ["", "## Outcomes of an attempt", "", "| outcome | when | the job then | billed |", "|---|---|---|---|"]
    for outcome, (when, then, billed) in _OUTCOMES.items():
        lines.append(f"| `{outcome.value}` | {when} | {then} | {billed} |")
    lines += ["", "## Reasons of a queued job", "", "| reason | text |", "|---|---|"]
    lines += [f"| `{reason.value}` | {reason.text} |" for reason in QueueReason]
    return "\n".join(lines) + "\n"


def _order(state: JobState) -> int:
    return list(JobState).index(state)


def _diagram() -> list[str]:
    edges = {(state, target) for (state, _), row in TRANSITIONS.items() for target in row.to if target is not state}
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> QUEUED"]
    lines += [
        f"    {state.value} --> {target.value}"
        for state, target in sorted(edges, key=lambda edge: (_order(edge[0]), _order(edge[1])))
    ]
    lines += [f"    {state.value} --> [*]" for state in JobState if state.terminal]
    return [*lines, "```"]


if __name__ == "__main__":
    print(job_states_markdown(), end="")
