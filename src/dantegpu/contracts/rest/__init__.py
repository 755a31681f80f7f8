"""The REST API's bodies, shared by the gateway and the SDK."""
