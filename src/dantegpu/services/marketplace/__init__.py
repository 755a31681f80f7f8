"""agora-marketplace: what providers ask for their machines, and the offers that a team can rent."""
