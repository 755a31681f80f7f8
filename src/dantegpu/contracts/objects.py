"""Keys of objects in storage that several services must agree on."""


def results_prefix(job_id: str, epoch: int, node_rank: int) -> str:
    """Where the results of one attempt lie. A job with one node has only node 0."""
    return f"results/{job_id}/{epoch_folder(epoch, node_rank)}"


def checkpoint_prefix(job_id: str, epoch: int, node_rank: int) -> str:
    """Where the checkpoint that one attempt saved lies."""
    return f"checkpoints/{job_id}/{epoch_folder(epoch, node_rank)}"


def benchmark_key(machine_id: str) -> str:
    """What a machine sends and fetches to measure its network; each time the same object."""
    return f"benchmarks/{machine_id}/network"


def epoch_folder(epoch: int, node_rank: int) -> str:
    """The part of a key that tells the attempts of a job apart. No user's path can look like another node's."""
    return str(epoch) if node_rank == 0 else f"{epoch}-{node_rank}"
