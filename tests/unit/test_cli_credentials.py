"""The credentials file: whose it is, who can read it, and what it remembers."""

import json
import stat
from pathlib import Path

import pytest

from dantegpu.cli import credentials
from dantegpu.cli.errors import CliError
from dantegpu.cli.session import Cli, FileSession
from dantegpu.sdk import Tokens

URL = "http://127.0.0.1:8400"


@pytest.fixture(autouse=True)
def dante_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("DANTE_HOME", str(folder))
    monkeypatch.delenv("DANTE_URL", raising=False)
    monkeypatch.delenv("DANTE_API_KEY", raising=False)
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_nothing_is_known_before_the_first_login():
    assert credentials.load() is None
    assert Cli(None, False).url == URL


def test_the_file_and_its_folder_are_closed_to_others(dante_home: Path):
    credentials.save(URL, api_key="dante_secret", team_id="team_1", email="ada@example.org")
    assert (mode(dante_home), mode(dante_home / "credentials.json")) == (0o700, 0o600)


def test_the_last_login_is_the_platform_that_commands_talk_to():
    credentials.save(URL, api_key="dante_one")
    credentials.save("https://gpu.example.org/", api_key="dante_two")
    current = credentials.load()
    assert current is not None
    assert (current.url, current.api_key) == ("https://gpu.example.org", "dante_two")
    first = credentials.load(URL + "/")
    assert first is not None
    assert first.api_key == "dante_one"
    assert Cli(None, False).url == "https://gpu.example.org"


def test_the_option_beats_the_environment_and_the_environment_beats_the_last_login(monkeypatch: pytest.MonkeyPatch):
    credentials.save(URL, api_key="dante_one")
    monkeypatch.setenv("DANTE_URL", "http://env:1")
    assert Cli(None, False).url == "http://env:1"
    assert Cli("http://option:1/", False).url == "http://option:1"


def test_forgetting_a_platform_leaves_the_others():
    credentials.save(URL, api_key="dante_one")
    credentials.save("http://other:1", api_key="dante_two")
    assert credentials.forget("http://other:1")
    assert not credentials.forget("http://other:1")
    current = credentials.load()
    assert current is not None
    assert current.url == URL


def test_a_file_that_others_can_read_is_closed_with_a_note(dante_home: Path, capsys: pytest.CaptureFixture[str]):
    credentials.save(URL, api_key="dante_secret")
    (dante_home / "credentials.json").chmod(0o644)
    loaded = credentials.load()
    assert loaded is not None
    assert mode(dante_home / "credentials.json") == 0o600
    told = capsys.readouterr().err
    assert "was open to others (mode 644)" in told
    assert "dante_secret" not in told


def test_a_link_in_place_of_the_file_is_not_followed(dante_home: Path, tmp_path: Path):
    dante_home.mkdir()
    (tmp_path / "elsewhere").write_text("{}")
    (dante_home / "credentials.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CliError, match="cannot read"):
        credentials.load()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "platforms": {"u": {"what": 1}}}'])
def test_a_damaged_file_is_told_with_what_to_do(dante_home: Path, text: str):
    dante_home.mkdir()
    (dante_home / "credentials.json").write_text(text)
    (dante_home / "credentials.json").chmod(0o600)
    with pytest.raises(CliError, match=r"is damaged .* log in again"):
        credentials.load()


def test_a_file_from_a_newer_version_is_told(dante_home: Path):
    dante_home.mkdir(mode=0o700)
    (dante_home / "credentials.json").write_text(json.dumps({"format": 2, "current": None, "platforms": {}}))
    with pytest.raises(CliError, match="newer version"):
        credentials.load()


def test_secrets_do_not_show_in_a_repr():
    credentials.save(URL, access_token="at_secret", refresh_token="rt_secret")
    assert "secret" not in repr(credentials.load())


def test_a_session_shares_its_tokens_through_the_file_and_keeps_the_team():
    credentials.save(URL, access_token="a1", refresh_token="r1", team_id="team_1", email="ada@example.org")
    session = FileSession(URL)
    assert session.load() == Tokens("a1", "r1")
    with session.exclusive():
        session.store(Tokens("a2", "r2"))
    assert FileSession(URL).load() == Tokens("a2", "r2")
    entry = credentials.load(URL)
    assert entry is not None
    assert (entry.team_id, entry.email) == ("team_1", "ada@example.org")


def test_an_api_key_in_the_environment_beats_the_file(monkeypatch: pytest.MonkeyPatch):
    credentials.save(URL, api_key="dante_file")
    monkeypatch.setenv("DANTE_API_KEY", "dante_env")
    with Cli(None, False).client() as client:
        assert client._transport._authorization(None) == {"Authorization": "Bearer dante_env"}  # pyright: ignore[reportPrivateUsage]
