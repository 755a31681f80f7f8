"""Wiring of storage-service. It has no tables: the store itself says what is there."""

from dantegpu.contracts.gen.dante.v1 import storage_pb2_grpc
from dantegpu.kit.deps import Deps
from dantegpu.kit.lifecycle import HttpApp, Service
from dantegpu.services.storage.rest import StorageHttp
from dantegpu.services.storage.rpc import StorageRpc
from dantegpu.services.storage.service import StorageService
from dantegpu.services.storage.settings import StorageSettings
from dantegpu.services.storage.signing import load_or_create_key
from dantegpu.services.storage.store.base import ObjectStore
from dantegpu.services.storage.store.embedded import EmbeddedStore
from dantegpu.services.storage.store.s3 import S3Config, S3ObjectStore


def build(deps: Deps, settings: StorageSettings) -> Service:
    http: HttpApp | None = None
    store: ObjectStore
    if settings.store == "s3":
        store = S3ObjectStore(
            S3Config(
                settings.s3_endpoint,
                settings.s3_bucket,
                settings.s3_region,
                settings.s3_access_key_id,
                settings.s3_secret_access_key,
            ),
            deps.clock,
        )
    else:
        key = load_or_create_key(settings.secrets_dir)
        store = EmbeddedStore(settings.data_dir, settings.free_bytes_min, settings.base_url, key)
        app = StorageHttp(store, key, deps.clock, uploads_max=settings.uploads_max, idle_seconds=settings.idle_seconds)
        http = HttpApp(app, settings.public_listen)
    service = StorageService(store, deps.clock, settings)
    return Service(
        name=settings.service_name,
        components=[store],
        register_rpc=lambda server: storage_pb2_grpc.add_StorageServiceServicer_to_server(StorageRpc(service), server),
        http=http,
        checks={"store": store.ready},
    )
