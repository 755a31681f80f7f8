"""Wiring of storage-service. It has no tables: the store itself says what is there."""

from dantegpu.contracts.gen.dante.v1 import storage_pb2_grpc
from dantegpu.kit.deps import Deps
from dantegpu.kit.lifecycle import HttpApp, Service
from dantegpu.services.storage.rest import StorageHttp
from dantegpu.services.storage.rpc import StorageRpc
from dantegpu.services.storage.service import StorageService
from dantegpu.services.storage.settings import StorageSettings
from dantegpu.services.storage.signing import load_or_create_key
from dantegpu.services.storage.store import EmbeddedStore


def build(deps: Deps, settings: StorageSettings) -> Service:
    key = load_or_create_key(settings.secrets_dir)
    store = EmbeddedStore(settings.data_dir, settings.free_bytes_min)
    service = StorageService(store, key, deps.clock, settings)
    return Service(
        name=settings.service_name,
        components=[store],
        register_rpc=lambda server: storage_pb2_grpc.add_StorageServiceServicer_to_server(StorageRpc(service), server),
        http=HttpApp(StorageHttp(store, key, deps.clock), settings.public_listen),
    )
