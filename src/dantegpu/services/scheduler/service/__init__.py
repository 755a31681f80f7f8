"""The scheduler's use cases, one file per concern.

transitions   the one way in which jobs and attempts change
intake        what users ask: submit, look, stop, why
inventory     what machines there are and what they cost
placement     the leader's rounds: queue in, plan out
machines      what machines say and what they are told
timers        leases that ran out, durations that are over
settlement    holds and what is posted of them
"""
