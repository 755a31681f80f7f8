"""Plumbing without business: what every service and the daemon stand on."""
