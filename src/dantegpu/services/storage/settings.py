"""Settings of the storage service."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from dantegpu.kit.settings import ServiceSettings


class StorageSettings(ServiceSettings):
    service_name: ClassVar[str] = "storage-service"

    data_dir: Path = Field(default=Path("objects"), description="folder of the embedded object store")
    secrets_dir: Path = Field(default=Path("secrets"), description="holds the key that signs URLs; made when missing")
    public_listen: str = Field(default="127.0.0.1:0", description="HTTP host:port that serves presigned URLs")
    public_url: str = Field(default="", description="how clients and machines reach it: http(s)://host:port")
    url_seconds: int = Field(default=900, ge=1, le=900, description="how long a presigned URL is good")
    blob_bytes_max: int = Field(default=10 << 30, ge=1)
    free_bytes_min: int = Field(default=256 << 20, ge=0, description="below it uploads are refused: the disk is full")
