"""What holds a secret does not show it when it is printed, and errors about it do not quote it."""

from pathlib import Path
from uuid import uuid4

import pytest
from pydantic import SecretStr

from dantegpu.apps.bootstrap import Login
from dantegpu.apps.targets import TARGETS
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.kit.nats_jwt import TrustFileDamaged, create_trust, load_key, load_or_create_trust
from dantegpu.kit.settings import SettingsError
from dantegpu.sdk.protocol import MemorySession, Tokens

SECRET = uuid4().hex


@pytest.mark.parametrize("name", TARGETS)
def test_no_services_settings_show_the_databases_password(name: str, tmp_path: Path):
    flags = {"database_url": f"postgresql://dante:{SECRET}@db/dante"}
    if name == "auth-service":
        flags["secrets_dir"] = str(tmp_path)
    settings = TARGETS[name].settings_class().load(None, flags)
    assert SECRET in settings.database_url.get_secret_value()
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()}"


def test_wrong_settings_are_told_without_what_they_hold(tmp_path: Path):
    config = tmp_path / "settings.toml"
    config.write_text(f'[platform]\ndatabase_url = ["{SECRET}"]\nunknown = "{SECRET}"\n')
    with pytest.raises(SettingsError) as error:
        TARGETS["billing-payment-service"].settings_class().load(config)
    assert "database_url" in str(error.value)
    assert SECRET not in str(error.value)


def test_the_daemons_settings_do_not_show_its_join_token():
    settings = DaemonSettings.load({"join_token": SECRET})
    assert SECRET not in f"{settings!r} {settings.model_dump()}"


def test_keys_logins_and_sessions_do_not_show_their_secrets():
    trust = create_trust()
    session = MemorySession(Tokens(SECRET, SECRET))
    login = Login("http://x", SecretStr(SECRET), "team", "a@b")
    shown = f"{trust!r} {trust.account!r} {session!r} {session.tokens!r} {login!r}"
    assert [secret for secret in (SECRET, trust.account_seed.get_secret_value()) if secret in shown] == []


def test_a_damaged_seed_is_not_quoted(tmp_path: Path):
    seed = create_trust().account_seed.get_secret_value()
    with pytest.raises(ValueError, match="not a NATS seed") as error:
        load_key(SecretStr(seed[:-1]))
    assert seed[:20] not in f"{error.value} {error.value.__cause__} "
    (tmp_path / "trust.json").write_text(f'{{"operator_seed": "{SECRET}", "account_seed": ["{SECRET}"]}}')
    with pytest.raises(TrustFileDamaged) as damaged:
        load_or_create_trust(tmp_path)
    assert SECRET not in f"{damaged.value} {damaged.value.__cause__}"
