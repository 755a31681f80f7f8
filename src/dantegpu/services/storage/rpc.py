"""gRPC edge of the storage service."""

from typing import Any

from dantegpu.contracts.gen.dante.v1 import storage_pb2, storage_pb2_grpc
from dantegpu.domain.ids import TeamId
from dantegpu.kit.actor import current_actor
from dantegpu.kit.errors import InvalidArgument
from dantegpu.services.storage.service import StorageService


class StorageRpc(storage_pb2_grpc.StorageServiceServicer):
    def __init__(self, service: StorageService) -> None:
        self._service = service

    async def PrepareUploads(
        self, request: storage_pb2.PrepareUploadsRequest, context: Any
    ) -> storage_pb2.PrepareUploadsResponse:
        wanted = [(blob.sha256, blob.size_bytes) for blob in request.blobs]
        uploads = await self._service.prepare_uploads(current_actor(), wanted)
        return storage_pb2.PrepareUploadsResponse(
            uploads=[
                storage_pb2.BlobUpload(sha256=upload.sha256, exists=not upload.url, url=upload.url)
                for upload in uploads
            ]
        )

    async def StatBlobs(self, request: storage_pb2.StatBlobsRequest, context: Any) -> storage_pb2.StatBlobsResponse:
        current_actor().require_service()
        sizes = await self._service.stat_blobs(TeamId.parse(request.team_id), request.sha256s)
        return storage_pb2.StatBlobsResponse(sizes_bytes=[-1 if size is None else size for size in sizes])

    async def PresignUrls(self, request: storage_pb2.PresignRequest, context: Any) -> storage_pb2.PresignResponse:
        current_actor().require_service()
        return storage_pb2.PresignResponse(urls=[self._presign(item) for item in request.items])

    def _presign(self, item: storage_pb2.Presign) -> str:
        match item.method:
            case storage_pb2.Presign.GET:
                return self._service.get_url(item.key, item.download_name)
            case storage_pb2.Presign.PUT:
                return self._service.put_url(item.key, item.size_bytes, item.sha256)
            case _:
                raise InvalidArgument("method: GET or PUT")

    async def StatObjects(
        self, request: storage_pb2.StatObjectsRequest, context: Any
    ) -> storage_pb2.StatObjectsResponse:
        current_actor().require_service()
        sizes = await self._service.stat(request.keys)
        return storage_pb2.StatObjectsResponse(sizes_bytes=[-1 if size is None else size for size in sizes])

    async def PutObject(self, request: storage_pb2.PutObjectRequest, context: Any) -> storage_pb2.PutObjectResponse:
        current_actor().require_service()
        await self._service.put(request.key, request.data)
        return storage_pb2.PutObjectResponse()

    async def DeleteObjects(
        self, request: storage_pb2.DeleteObjectsRequest, context: Any
    ) -> storage_pb2.DeleteObjectsResponse:
        current_actor().require_service()
        await self._service.delete(request.keys)
        return storage_pb2.DeleteObjectsResponse()

    async def GetObject(self, request: storage_pb2.GetObjectRequest, context: Any) -> storage_pb2.GetObjectResponse:
        current_actor().require_service()
        data, size_bytes = await self._service.get(request.key, request.offset, request.length)
        return storage_pb2.GetObjectResponse(data=data, size_bytes=-1 if size_bytes is None else size_bytes)
