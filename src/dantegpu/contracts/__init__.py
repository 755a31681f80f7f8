"""What the parts say to each other: protobuf messages, NATS subjects, REST models."""
