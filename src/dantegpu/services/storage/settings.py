"""Settings of the storage service."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, SecretStr, model_validator

from dantegpu.kit.settings import ServiceSettings


class StorageSettings(ServiceSettings):
    """`store` chooses where objects lie; the other store's settings are not looked at."""

    service_name: ClassVar[str] = "storage-service"

    store: Literal["embedded", "s3"] = "embedded"
    url_seconds: int = Field(default=900, ge=1, le=900, description="how long a presigned URL is good")
    blob_bytes_max: int = Field(default=10 << 30, ge=1, description="of one uploaded input")
    result_bytes_max: int = Field(default=10 << 30, ge=1, description="of one result file")

    data_dir: Path = Field(default=Path("objects"), description="folder of the embedded object store")
    secrets_dir: Path = Field(default=Path("secrets"), description="holds the key that signs URLs; made when missing")
    public_listen: str = Field(default="127.0.0.1:8401", description="HTTP host:port that serves presigned URLs")
    public_url: str = Field(
        default="", description="how clients and machines reach it: http(s)://host:port; empty = public_listen's"
    )
    free_bytes_min: int = Field(default=256 << 20, ge=0, description="below it uploads are refused: the disk is full")
    uploads_max: int = Field(default=256, ge=1, description="uploads at the same time")
    idle_seconds: float = Field(default=60.0, gt=0, description="an upload that brings nothing for so long is over")

    s3_endpoint: str = Field(default="", description="URL in front of /<bucket>/<key>, as clients reach it, too")
    s3_bucket: str = ""
    s3_region: str = "us-east-1"
    s3_access_key_id: str = ""
    s3_secret_access_key: SecretStr = SecretStr("")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.store == "s3":
            wanted = ("s3_endpoint", "s3_bucket", "s3_access_key_id", "s3_secret_access_key")
            if missing := [name for name in wanted if not getattr(self, name)]:
                raise ValueError(f'store = "s3" needs {", ".join(missing)}')
        elif not self.public_url and self.public_listen.endswith(":0"):
            raise ValueError("public_url is needed when public_listen leaves the port open (:0)")
        return self

    @property
    def base_url(self) -> str:
        """In front of the embedded store's URLs."""
        return self.public_url or f"http://{self.public_listen}"
