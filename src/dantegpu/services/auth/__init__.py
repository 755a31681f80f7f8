"""auth-service: users, teams, roles, passwords, tokens, API keys, machine credentials, audit log."""
