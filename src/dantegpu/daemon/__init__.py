"""The agent on a provider's machine (beatrice-core-services): finds devices, runs attempts in isolation, reports."""
