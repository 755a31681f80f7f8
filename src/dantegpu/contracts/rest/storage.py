"""Uploads of packed working directories, content-addressed per team."""

from pydantic import Field

from dantegpu.contracts.rest.base import Request, Response

MAX_UPLOADS_PER_CALL = 1000


class BlobWant(Request):
    """Content that a job will need."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=1, le=1 << 44)


class PrepareUploads(Request):
    """What a client is about to upload."""

    blobs: list[BlobWant] = Field(min_length=1, max_length=MAX_UPLOADS_PER_CALL)


class BlobUpload(Response):
    """Where to send one content, unless the platform has it."""

    sha256: str
    exists: bool = Field(description="The platform has it: nothing to send")
    url: str | None = Field(default=None, description="Presigned PUT of exactly these bytes, valid for a few minutes")


class Uploads(Response):
    """The answers, in the order asked."""

    uploads: list[BlobUpload]
