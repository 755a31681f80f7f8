"""Stubs of the services behind the gateway."""

from dataclasses import dataclass

from dantegpu.contracts.gen.dante.v1 import (
    auth_pb2_grpc,
    billing_pb2_grpc,
    jobs_pb2_grpc,
    marketplace_pb2_grpc,
    monitoring_pb2_grpc,
    registry_pb2_grpc,
    storage_pb2_grpc,
)
from dantegpu.kit.rpc import Channels

AUTH = "auth-service"
REGISTRY = "provider-registry-service"
SCHEDULER = "scheduler-orchestrator-service"
STORAGE = "storage-service"
BILLING = "billing-payment-service"
MARKETPLACE = "agora-marketplace"
MONITORING = "monitoring-logging-service"
SERVICES = (AUTH, REGISTRY, SCHEDULER, STORAGE, BILLING, MARKETPLACE, MONITORING)


@dataclass(frozen=True, slots=True)
class Clients:
    """One stub per service."""

    auth: auth_pb2_grpc.AuthServiceStub
    registry: registry_pb2_grpc.RegistryServiceStub
    jobs: jobs_pb2_grpc.JobServiceStub
    storage: storage_pb2_grpc.StorageServiceStub
    billing: billing_pb2_grpc.BillingServiceStub
    marketplace: marketplace_pb2_grpc.MarketplaceServiceStub
    monitoring: monitoring_pb2_grpc.MonitoringServiceStub

    @staticmethod
    def of(channels: Channels) -> "Clients":
        return Clients(
            auth=auth_pb2_grpc.AuthServiceStub(channels.to(AUTH)),
            registry=registry_pb2_grpc.RegistryServiceStub(channels.to(REGISTRY)),
            jobs=jobs_pb2_grpc.JobServiceStub(channels.to(SCHEDULER)),
            storage=storage_pb2_grpc.StorageServiceStub(channels.to(STORAGE)),
            billing=billing_pb2_grpc.BillingServiceStub(channels.to(BILLING)),
            marketplace=marketplace_pb2_grpc.MarketplaceServiceStub(channels.to(MARKETPLACE)),
            monitoring=monitoring_pb2_grpc.MonitoringServiceStub(channels.to(MONITORING)),
        )
