"""The services: one package each, all shaped alike."""
