"""provider-registry-service: machines, their devices, and whether they are there at this moment."""
