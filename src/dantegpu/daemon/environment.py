"""What a job is told about itself: its id, its nodes, and where they meet."""

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.daemon.executors.gang import Gang

LOOPBACK = "127.0.0.1"


def gang_of(desired: machine_pb2.DesiredAttempt) -> Gang | None:
    """The network that its nodes share; None where they use their machines' own, or there is only one."""
    if not desired.gang_number:
        return None
    return Gang(desired.gang_number, desired.node_rank, tuple(desired.node_addresses))


def job_environment(desired: machine_pb2.DesiredAttempt) -> dict[str, str]:
    """The job's own variables and the platform's.

    MASTER_ADDR and so on are what torchrun and torch.distributed read; a job that sets them itself knows better.
    WORLD_SIZE counts processes, one per GPU, or one per node without GPUs.
    """
    gang = gang_of(desired)
    addresses = gang.addresses if gang is not None else list(desired.node_addresses) or [LOOPBACK]
    gpus = len(desired.devices)
    rendezvous = {
        "MASTER_ADDR": addresses[0],
        "MASTER_PORT": str(desired.rendezvous_port),
        "NODE_RANK": str(desired.node_rank),
        "WORLD_SIZE": str(len(addresses) * max(gpus, 1)),
    }
    platform = {
        "DANTE_JOB_ID": desired.job_id,
        "DANTE_NODE_RANK": str(desired.node_rank),
        "DANTE_NODES_NUM": str(len(addresses)),
        "DANTE_NODES_IPS": "\n".join(addresses),
        "DANTE_GPUS_PER_NODE": str(gpus),
    }
    return rendezvous | dict(desired.spec.env) | platform
