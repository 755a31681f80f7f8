"""NATS keys, tokens and the file that keeps them."""

import base64
import json
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from dantegpu.domain.ids import MachineId
from dantegpu.kit.nats_jwt import (
    TrustFileDamaged,
    create_trust,
    create_user_key,
    creds_file_text,
    is_user_public_key,
    load_key,
    load_or_create_trust,
    machine_permissions,
    services_permissions,
    sign_user_jwt,
)


def _part(token: str, index: int) -> dict[str, Any]:
    text = token.split(".")[index]
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def test_a_user_token_names_its_account_its_subjects_and_its_end():
    trust, user, machine = create_trust(), create_user_key(), MachineId.new()
    token = sign_user_jwt(
        trust.account_seed,
        trust.account_public,
        user.public,
        "m",
        machine_permissions(machine),
        datetime(2030, 1, 1, tzinfo=UTC),
    )
    assert _part(token, 0) == {"typ": "JWT", "alg": "ed25519-nkey"}
    claims = _part(token, 1)
    assert (claims["iss"], claims["sub"], claims["exp"]) == (trust.account_public, user.public, 1893456000)
    assert claims["nats"]["pub"] == {"allow": [f"dante.machine.{machine}.>"]}
    assert claims["nats"]["sub"] == {"allow": [f"_INBOX_{machine}.>", f"dante.machine.{machine}.desired"]}


def test_two_users_have_different_keys():
    assert create_user_key().public != create_user_key().public


def test_a_key_comes_back_from_its_seed():
    key = create_user_key()
    assert load_key(key.seed).public == key.public


@pytest.mark.parametrize("text", ["", "SUAM", "not a seed at all", "é"])
def test_what_is_no_seed_is_refused_without_being_quoted(text: str):
    with pytest.raises(ValueError, match="not a NATS seed") as caught:
        load_key(SecretStr(text))
    assert caught.value.__cause__ is None


def test_only_the_public_half_of_a_users_key_may_be_signed():
    trust, user = create_trust(), create_user_key()
    swapped = user.public[:-1] + ("A" if user.public[-1] != "A" else "B")
    wrong = [trust.account_public, user.seed.get_secret_value(), swapped, "", "U" * 56, "é" * 56]
    assert is_user_public_key(user.public)
    for text in wrong:
        assert not is_user_public_key(text)
        with pytest.raises(ValueError, match="public half"):
            sign_user_jwt(trust.account_seed, trust.account_public, text, "x", services_permissions(), None)


def test_an_end_without_a_time_zone_is_refused():
    trust, user = create_trust(), create_user_key()
    naive = datetime(2030, 1, 1)  # noqa: DTZ001 - the point of the test
    with pytest.raises(ValueError, match="time zone"):
        sign_user_jwt(trust.account_seed, trust.account_public, user.public, "x", services_permissions(), naive)


def test_seeds_do_not_show_in_a_repr():
    trust = create_trust()
    for key in (trust.operator, trust.account):
        assert key.seed.get_secret_value() not in repr(trust)


def test_the_credentials_file_holds_token_and_seed():
    text = creds_file_text("TOKEN", SecretStr("SEED"))
    assert "-----BEGIN NATS USER JWT-----\nTOKEN\n------END NATS USER JWT------" in text
    assert "-----BEGIN USER NKEY SEED-----\nSEED\n------END USER NKEY SEED------" in text


def test_trust_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path):
    first = load_or_create_trust(tmp_path / "trust")
    second = load_or_create_trust(tmp_path / "trust")
    assert (first.operator, first.account) == (second.operator, second.account)
    (path,) = (tmp_path / "trust").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content", ["", "{}", '{"operator_seed": "SOA", "system_account_seed": "x", "account_seed": "y"}']
)
def test_a_damaged_trust_file_is_named_and_never_replaced(tmp_path: Path, content: str):
    path = tmp_path / "trust.json"
    path.write_text(content)
    with pytest.raises(TrustFileDamaged, match=str(path)):
        load_or_create_trust(tmp_path)
    assert path.read_text() == content
