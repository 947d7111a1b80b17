"""Settings: precedence, origins, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from lutetia.node.settings import NodeSettings, announced, load_settings, parse_bytes
from lutetia.protocol.schema.identity import Identity
from lutetia.system.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for field in NodeSettings.model_fields:
        monkeypatch.delenv(f"LUTETIA_{field.upper()}", raising=False)
    monkeypatch.setenv("LUTETIA_HOME", str(tmp_path))


def test_flag_beats_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "node.toml"
    file.write_text('ticket = "from file"\nduty = 0.1\nthreads = 3\nlisten = "/ip4/127.0.0.1/tcp/1"\n')
    monkeypatch.setenv("LUTETIA_DUTY", "0.2")
    monkeypatch.setenv("LUTETIA_THREADS", "4")
    settings, origins = load_settings({"duty": 0.3}, file)
    assert (settings.ticket, settings.threads, settings.duty, settings.device) == ("from file", 4, 0.3, "auto")
    assert (origins["ticket"], origins["threads"], origins["duty"], origins["device"]) == (
        "file",
        "environment",
        "flag",
        "default",
    )


def test_state_folder_follows_lutetia_home(tmp_path: Path):
    settings, _ = load_settings({"ticket": "x"})
    assert settings.state_folder == tmp_path


def test_lists_and_sizes_may_be_written_as_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LUTETIA_ANNOUNCE", "/ip4/1.2.3.4/tcp/5, /dns/box/tcp/6")
    settings, _ = load_settings({"ticket": "x", "disk_limit": "50 GB", "upload_rate": "2MiB"})
    assert settings.announce == ("/ip4/1.2.3.4/tcp/5", "/dns/box/tcp/6")
    assert (settings.disk_limit, settings.upload_rate) == (50 * 10**9, 2 << 20)
    assert parse_bytes("lots") == "lots"


@pytest.mark.parametrize(
    ("text", "says"),
    [("dutty = 1", "unknown key 'dutty'"), ("duty = 2", "duty"), ("duty =", "not TOML"), ('device = "tpu"', "device")],
)
def test_bad_file_is_refused_naming_it_and_the_key(tmp_path: Path, text: str, says: str):
    file = tmp_path / "node.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_settings({"ticket": "x"}, file)
    assert str(file) in str(caught.value)


OWN, OTHER = Identity.derived("this node").peer_id, Identity.derived("another node").peer_id


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/203.0.113.5", "/ip4/203.0.113.5/tcp", "/ip4/203.0.113.5/tcp/0", "/ip4/203.0.113.5/tcp/70000", "203.0.113.5:41000",
        "/ip4/203.0.113.5/udp/41000/quic-v1", "/ip4/203.0.113.500/tcp/41000", "/ip6/203.0.113.5/tcp/41000",
        "/ip4/203.0.113.5/tcp/41000/ws", f"/ip4/203.0.113.5/tcp/41000/p2p/{OWN}/p2p-circuit", "/ip4/203.0.113.5/tcp/41000\n",
    ],
)  # fmt: skip
def test_undialable_address_is_refused_with_an_example(address: str):
    with pytest.raises(ConfigError, match=r"options: announce.*/ip4/203\.0\.113\.5/tcp/41000") as caught:
        load_settings({"ticket": "x", "announce": [address]})
    assert "\n" not in str(caught.value)


def test_announced_address_may_name_this_peer_only():
    plain = ("/ip4/203.0.113.5/tcp/41000", "/ip6/2001:db8::1/tcp/41000", "/dns4/box.example.org/tcp/41000")
    settings, _ = load_settings({"ticket": "x", "announce": [plain[0], *(f"{place}/p2p/{OWN}" for place in plain)]})
    assert announced(settings.announce, OWN) == plain
    with pytest.raises(ConfigError, match=f"belongs to peer {OWN}.*this node is {OTHER}"):
        announced(settings.announce, OTHER)


def test_missing_file_and_bad_environment_name_their_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_settings({"ticket": "x"}, tmp_path / "nowhere.toml")
    monkeypatch.setenv("LUTETIA_THREADS", "none")
    with pytest.raises(ConfigError, match="LUTETIA_THREADS"):
        load_settings({"ticket": "x"})


def test_unknown_flag_and_cut_ticket_are_refused():
    with pytest.raises(ConfigError, match="options"):
        load_settings({"ticket": "x", "color": "red"})
    with pytest.raises(ConfigError, match="ticket"):
        _ = load_settings({"ticket": "lutetia1abc"})[0].decoded_ticket


def test_name_is_plain_text_or_refused():
    assert load_settings({"ticket": "x", "name": "Adas lab"})[0].name == "Adas lab"
    assert load_settings({"ticket": "x"})[0].name is None
    for name in ("<b>Ada</b>", "Ada ", "ä" * 3, "a" * 33):
        with pytest.raises(ConfigError, match="cannot be a name"):
            load_settings({"ticket": "x", "name": name})
