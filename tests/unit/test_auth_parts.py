"""Passwords, key files and the rotation plan of auth-service, without any server."""

import asyncio
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from argon2 import PasswordHasher
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from dantegpu.services.auth.errors import WeakPassword
from dantegpu.services.auth.passwords import Passwords, check_strength, common_passwords
from dantegpu.services.auth.secrets import Secrets, SecretsUnusable, load_or_create_key, new_token
from dantegpu.services.auth.settings import AuthSettings
from dantegpu.services.auth.signing import plan_rotation

NOW = datetime(2026, 5, 1, tzinfo=UTC)
PERIOD, NOTICE = 1000, 100


# --- passwords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("password", ["a quiet heron", "ödegårdsväg", "12 monkeys!", "x1y2z3a4" * 16])
def test_a_good_password_is_accepted(password: str):
    check_strength(SecretStr(password), "ada@example.org")


@pytest.mark.parametrize("password", ["PASSWORD1", "Qwerty123", "ada.love", "ADA.LOVE@x.org", "abababab", "x" * 129])
def test_a_password_that_is_tried_first_is_refused(password: str):
    with pytest.raises(WeakPassword) as caught:
        check_strength(SecretStr(password), "ada.love@x.org")
    assert password not in caught.value.message


def test_the_common_passwords_are_those_that_the_length_lets_through():
    assert len(common_passwords()) >= 200
    assert all(len(word) >= 8 and word == word.casefold() for word in common_passwords())


async def test_a_hash_is_argon2id_of_at_least_the_recommended_cost_and_matches_its_password_alone():
    passwords = Passwords()
    hashed = await passwords.hash(SecretStr("a quiet heron"))
    assert hashed.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert await passwords.matches(SecretStr("a quiet heron"), hashed)
    assert not await passwords.matches(SecretStr("a quiet herom"), hashed)
    assert not await passwords.matches(SecretStr("nobody has this password"), None)
    assert not await passwords.matches(SecretStr("a quiet heron"), "damaged")
    assert not passwords.outdated(hashed)
    assert passwords.outdated(PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("x"))


async def test_a_letter_with_an_accent_is_one_password_however_it_was_typed():
    passwords = Passwords()
    assert await passwords.matches(SecretStr("cafe\u0301 au lait"), await passwords.hash(SecretStr("café au lait")))


async def test_the_event_loop_goes_on_while_passwords_are_hashed():
    passwords = Passwords()
    work = asyncio.gather(*(passwords.hash(SecretStr(f"password {n}")) for n in range(4)))
    turns = 0
    while not work.done():
        await asyncio.sleep(0)
        turns += 1
    await work
    assert turns > 20


# --- keys in files ----------------------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path):
    path = tmp_path / "new" / "auth.kek"
    key = load_or_create_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_key(path) == key
    assert [each.name for each in path.parent.iterdir()] == ["auth.kek"]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 44, b"QUJD"])
def test_a_damaged_key_is_refused_and_not_replaced(tmp_path: Path, content: bytes):
    path = tmp_path / "auth.kek"
    path.write_bytes(content)
    with pytest.raises(SecretsUnusable, match="restore"):
        load_or_create_key(path)
    assert path.read_bytes() == content


async def test_what_is_sealed_opens_for_its_purpose_alone(tmp_path: Path):
    secrets, stranger = [Secrets(AuthSettings(secrets_dir=tmp_path / name)) for name in ("ours", "theirs")]
    await secrets.start()
    await stranger.start()
    sealed = secrets.seal("one", b"secret")
    assert secrets.open("one", sealed) == b"secret"
    assert b"secret" not in sealed
    assert secrets.seal("one", b"secret") != sealed
    for keeper, purpose, data in (
        (secrets, "two", sealed),
        (stranger, "one", sealed),
        (secrets, "one", sealed[:-1] + bytes([sealed[-1] ^ 1])),
        (secrets, "one", b""),
    ):
        with pytest.raises(SecretsUnusable):
            keeper.open(purpose, data)


def test_tokens_have_one_length_and_differ():
    tokens = {new_token("dante_") for _ in range(200)}
    assert len(tokens) == 200
    assert {len(token) for token in tokens} == {49}
    assert all(token.removeprefix("dante_").isalnum() for token in tokens)


# --- rotation ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=30))
def test_whenever_upkeep_runs_one_key_signs_and_the_next_is_announced(pauses: list[int]):
    """Also after long pauses, as when the service was down."""
    keys: list[tuple[str, datetime]] = []
    now = NOW
    for turn, pause in enumerate(pauses):
        now += timedelta(seconds=pause)
        plan = plan_rotation(keys, now, period_seconds=PERIOD, notice_seconds=NOTICE)
        signing_before = [kid for kid, signs_from in keys if signs_from <= now]
        assert not set(signing_before[-1:]) & set(plan.remove)
        keys = [key for key in keys if key[0] not in plan.remove]
        keys += [(f"{turn}.{n}", signs_from) for n, signs_from in enumerate(plan.add_signing_from)]
        coming = [signs_from for _, signs_from in keys if signs_from > now]
        assert any(signs_from <= now for _, signs_from in keys)
        assert len(coming) == 1
        assert all(
            signs_from >= now + timedelta(seconds=NOTICE)
            for signs_from in plan.add_signing_from[-1:]
            if signs_from > now
        )
        assert len(keys) <= 5


def test_a_key_stays_published_until_its_last_token_is_dead():
    keys = [("old", NOW), ("current", NOW + timedelta(seconds=1000)), ("next", NOW + timedelta(seconds=9000))]
    for seconds, removed in ((1000, []), (2200, []), (2201, ["old"])):
        at = NOW + timedelta(seconds=seconds)
        assert plan_rotation(keys, at, period_seconds=PERIOD, notice_seconds=NOTICE).remove == removed
