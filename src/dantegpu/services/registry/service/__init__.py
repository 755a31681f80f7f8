"""The registry's use cases, one file per concern.

machines      what people and services ask: register, look, pause, drain, leave
inventories   what machines say about themselves, checked
liveness      heartbeats folded in batches, and who was not heard for too long
"""
