"""siger-api-gateway: the one public door. REST and server-sent events outside, gRPC inside; no database of its own."""
