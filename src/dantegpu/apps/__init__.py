"""Composition: which modules make a process, and the commands that start them."""
