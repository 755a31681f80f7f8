"""The real servers that `dante up` starts by itself: PostgreSQL and nats-server, from wheels, with our own settings."""
