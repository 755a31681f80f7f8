"""Events on the wire: a protobuf message in an Envelope that says what, when, who and in which trace."""

from datetime import datetime

from google.protobuf.message import Message

from dantegpu.contracts.gen.dante.v1 import common_pb2, events_pb2
from dantegpu.domain.ids import EventId


class UnexpectedEvent(ValueError):
    """The envelope holds another message type than the reader expected."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected an envelope with {expected}, found {found or 'no type at all'}")


def wrap(
    event: Message,
    *,
    event_id: EventId,
    occurred_at: datetime,
    actor: common_pb2.Actor | None = None,
    traceparent: str = "",
    request_id: str = "",
) -> events_pb2.Envelope:
    envelope = events_pb2.Envelope(
        id=str(event_id),
        type=event.DESCRIPTOR.full_name,
        traceparent=traceparent,
        request_id=request_id,
        actor=actor,
        payload=event.SerializeToString(),
    )
    envelope.occurred_at.FromDatetime(occurred_at)
    return envelope


def unwrap[M: Message](data: bytes, event_type: type[M]) -> tuple[events_pb2.Envelope, M]:
    """The envelope in `data` and its payload. Raises UnexpectedEvent, or DecodeError when it is not protobuf."""
    envelope = events_pb2.Envelope.FromString(data)
    if envelope.type != event_type.DESCRIPTOR.full_name:
        raise UnexpectedEvent(event_type.DESCRIPTOR.full_name, envelope.type)
    payload = event_type()
    payload.ParseFromString(envelope.payload)
    return envelope, payload
