"""Use cases of auth-service: accounts, teams, API keys, machines."""
