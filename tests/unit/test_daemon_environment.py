"""What a job is told about itself and its nodes."""

from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.daemon.environment import job_environment
from dantegpu.daemon.executors.gang import Gang
from dantegpu.daemon.probe.machine import address_towards


def environment_of(env: dict[str, str] | None = None, gpus: int = 0, **fields: Any) -> dict[str, str]:
    return job_environment(
        machine_pb2.DesiredAttempt(
            job_id="job_1",
            spec=jobs_pb2.JobSpec(env=env or {}),
            devices=[machine_pb2.DeviceLease(index=index) for index in range(gpus)],
            rendezvous_port=21_000,
            **fields,
        )
    )


def test_a_job_with_one_node_meets_itself():
    assert environment_of(gpus=2) == {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "21000",
        "NODE_RANK": "0",
        "WORLD_SIZE": "2",
        "DANTE_JOB_ID": "job_1",
        "DANTE_NODE_RANK": "0",
        "DANTE_NODES_NUM": "1",
        "DANTE_NODES_IPS": "127.0.0.1",
        "DANTE_GPUS_PER_NODE": "2",
    }


def test_the_nodes_of_a_gang_meet_at_node_0_and_count_one_process_per_gpu():
    found = environment_of(gpus=4, node_rank=1, node_addresses=["10.0.0.7", "10.0.0.9"])
    assert (found["MASTER_ADDR"], found["NODE_RANK"], found["WORLD_SIZE"]) == ("10.0.0.7", "1", "8")
    assert (found["DANTE_NODES_NUM"], found["DANTE_NODES_IPS"].splitlines()) == ("2", ["10.0.0.7", "10.0.0.9"])


def test_nodes_without_gpus_count_one_process_each():
    assert environment_of(node_addresses=["10.0.0.7", "10.0.0.9"])["WORLD_SIZE"] == "2"


def test_a_job_may_choose_its_meeting_place_but_not_who_it_is():
    found = environment_of({"MASTER_PORT": "29500", "DANTE_NODE_RANK": "9", "LR": "1"})
    assert (found["MASTER_PORT"], found["DANTE_NODE_RANK"], found["LR"]) == ("29500", "0", "1")


def test_a_machine_finds_its_address_on_the_way_to_the_platform():
    assert address_towards("http://127.0.0.1:8400") == "127.0.0.1"
    assert address_towards("https://[::1]") in ("::1", "")
    assert address_towards("https://no-such-host.invalid") == ""


def test_containers_of_a_gang_meet_at_the_addresses_of_their_own_network():
    gang = 77 << 6
    found = [
        environment_of(gang_number=gang, node_rank=rank, node_addresses=["10.0.0.7", "10.0.0.9"]) for rank in (0, 1)
    ]
    addresses = found[0]["DANTE_NODES_IPS"].splitlines()
    assert found[1]["DANTE_NODES_IPS"].splitlines() == addresses
    assert found[1]["MASTER_ADDR"] == addresses[0]
    assert all(address.startswith("198.19.") for address in addresses)


@pytest.mark.parametrize("nodes", [1, 2, 6, 7, 8, 63, 64])
def test_each_node_and_each_machine_of_a_gang_has_an_address_of_its_own_in_its_network(nodes: int):
    gangs = [Gang(0xFFFFC0, rank, ("10.0.0.1",) * nodes) for rank in range(nodes)]
    subnet = gangs[0].subnet
    used = [*gangs[0].addresses, *(gang.gateway for gang in gangs)]
    assert len(set(used)) == 2 * nodes
    assert all(IPv4Address(address) in list(subnet.hosts()) for address in used)
    assert subnet.subnet_of(IPv4Network("198.19.0.0/16"))
    assert max(gangs[0].vni(rank) for rank in range(nodes)) < 1 << 24
