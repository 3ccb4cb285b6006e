"""Which places may be named, which addresses are internal, and settings of sources that cannot be read."""

from ipaddress import ip_address
from pathlib import Path

import pytest

from service.errors import ApiError
from service.settings import Settings, SettingsError
from service.sources.addresses import is_internal
from service.sources.credentials import read_credentials
from service.sources.fetch import Sources
from service.sources.locations import AllowList, parse_location


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [
        (
            "https://host.example/models",
            ["https://host.example/models/x", "https://HOST.example:443/models/x.tar"],
            [
                "https://host.example/models-evil/x",
                "https://host.example/x",
                "https://host.example.evil.org/models/x",
                "https://host.example:8443/models/x",
                "http://host.example/models/x",
            ],
        ),
        ("s3://models/team/", ["s3://models/team/x"], ["s3://models/teams/x", "s3://models2/team/x", "s3://models/x"]),
        ("hf://team", ["hf://team/x", "hf://team/x@v1/inner"], ["hf://team2/x", "hf://Team/x"]),
        ("hf://", ["hf://anybody/x"], ["s3://anybody/x"]),
        ("oci://ghcr.io/team/", ["oci://ghcr.io/team/x:v1"], ["oci://ghcr.io/teams/x:v1", "oci://ghcr.io/x:v1"]),
    ],
)
def test_the_list_is_matched_on_parts_of_urls(allowed: str, good: list[str], bad: list[str]) -> None:
    known = AllowList([allowed])
    assert all(known.allows(parse_location(text).place) for text in good)
    assert not any(known.allows(parse_location(text).place) for text in bad)


@pytest.mark.parametrize(
    "text",
    [
        "https://host.example/models/../secret",
        "https://host.example/models/%2e%2e/secret",
        "https://host.example/models\\..\\secret",
        "https://user:password@host.example/models/x",
        "https://host.example/models/x?token=secret",
        "https://host.example/models/x#sha256:short",
        "https://host.example@evil.example/models/x",
        "https://host.example:99999/models/x",
        "https://host.example/a//b",
        "https:///models",
        "https://",
        "file:///etc/passwd",
        "ftp://host.example/x",
        "hf://team",
        "hf://team/x@",
        "oci://ghcr.io",
        "https://hóst.example/x",
        "https://host.example/" + "x" * 2000,
        "https://host.example/x\n",
    ],
)
def test_what_is_no_source_is_refused_without_its_secrets(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_location(text)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("168.63.129.16", "192.0.0.192", "255.255.255.255", "::1", "::", "fe80::1", "fd00:ec2::254", "ff02::1"),
        *("::127.0.0.1", "::ffff:0:7f00:1", "fec0::1", "64:ff9b:1::7f00:1", "4000::1", "2001:0:7f00:1::"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "64:ff9b::7f00:1"),
    ],
)
def test_internal_addresses_are_known_in_all_their_forms(address: str) -> None:
    assert is_internal(ip_address(address))
    assert not any(is_internal(ip_address(public)) for public in ("1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1"))


def test_settings_of_sources_that_cannot_be_read_end_the_start(tmp_path: Path) -> None:
    file = tmp_path / "credentials.toml"
    for changes, words in (
        ({"sources": ("ftp://host",)}, "FUSION_SOURCES: .* expected one of hf://"),
        ({"source_networks": ("10.0.0.1/8",)}, "FUSION_SOURCE_NETWORKS: 10.0.0.1/8 has host bits set"),
        ({"source_credentials": str(tmp_path / "none")}, "cannot be read"),
    ):
        with pytest.raises(SettingsError, match=words):
            Sources.open(Settings(**changes))  # type: ignore[arg-type]
    for text, words in (
        ('["hf://"]\npasword = "hunter2"', "has 'pasword' in the table 'hf://'"),
        ('["ftp://"]', "table 'ftp://'"),
        ("x = 1", "'x'"),
        ('["hf://"]\ntoken = hunter2', "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError, match=words) as caught:
            read_credentials(str(file))
        assert "hunter2" not in str(caught.value)
