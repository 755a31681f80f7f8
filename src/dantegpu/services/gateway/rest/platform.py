"""/v1/status and the platform's public keys."""

import asyncio
import time

from fastapi import APIRouter, Response

import dantegpu
from dantegpu.contracts.gen.dante.v1 import common_pb2
from dantegpu.contracts.rest.platform import PlatformStatus, ServiceStatus
from dantegpu.kit import rpc
from dantegpu.services.gateway.clients import SERVICES
from dantegpu.services.gateway.context import Platform

CHECK_TIMEOUT_SECONDS = 1.0

router = APIRouter(tags=["platform"])


@router.get("/v1/status", summary="Does the platform work?")
async def status(platform: Platform) -> PlatformStatus:
    services = await asyncio.gather(*(_reach(platform, name) for name in SERVICES), _reach_nats(platform))
    well = all(service.reachable for service in services)
    return PlatformStatus(status="ok" if well else "degraded", version=dantegpu.__version__, services=services)


async def _reach(platform: Platform, name: str) -> ServiceStatus:
    started = time.monotonic()
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
            await platform.channels.to(name).channel_ready()
        reachable, detail = True, ""
    except TimeoutError:
        reachable, detail = False, f"no answer within {CHECK_TIMEOUT_SECONDS:.0f} s"
    elapsed = round((time.monotonic() - started) * 1000, 1)
    return ServiceStatus(name=name, reachable=reachable, detail=detail, milliseconds=elapsed)


async def _reach_nats(platform: Platform) -> ServiceStatus:
    connected = platform.bus.connected
    return ServiceStatus(name="nats", reachable=connected, detail="" if connected else "disconnected", milliseconds=0)


@router.get("/v1/.well-known/jwks.json", summary="Public keys of the access tokens (RFC 7517)")
async def jwks(platform: Platform) -> Response:
    response = await rpc.call(platform.clients.auth.GetJwks, common_pb2.Empty())
    return Response(
        response.jwks_json, media_type="application/jwk-set+json", headers={"cache-control": "public, max-age=60"}
    )
