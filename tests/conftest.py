"""Loads every module of tests/fixtures as a plugin; put new fixtures there, not here."""

from pathlib import Path

import pytest
from hypothesis import settings

# Before the first import: fixtures import one another.
pytest.register_assert_rewrite("tests.fixtures")

# How long an example takes says more of the machine than of the code.
settings.register_profile("dante", deadline=None)
settings.load_profile("dante")

pytest_plugins = [
    f"tests.fixtures.{path.stem}"
    for path in sorted((Path(__file__).parent / "fixtures").glob("*.py"))
    if not path.stem.startswith("_")
]
