"""Adapters from where they lie, fetched from real servers on loopback and registered."""

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import huggingface_hub
import pytest
from moto.server import ThreadedMotoServer

from adapters import load
from adapters.files import CONFIG, WEIGHTS
from service.errors import ApiError
from service.settings import Settings
from service.sources.fetches import FOLDER, Order
from tests.service.fetching import fetch, fetching
from tests.service.shops import Shop
from tests.service.source_servers import COMMIT, files, hub, pack, registry, serve, share
from tests.service.test_catalog import shop  # noqa: F401 - a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """moto's S3, with the bucket `models`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def bucket(endpoint: str) -> Any:
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    )
    client.create_bucket(Bucket="models")
    return client


S3_TABLE = (
    '["s3://models/"]\nendpoint = "{}"\nregion = "us-east-1"\naccess_key_id = "key"\nsecret_access_key = "secret"'
)


async def test_a_folder_and_an_archive_come_from_a_bucket(shop: Shop, s3: str) -> None:  # noqa: F811 - a fixture
    client = bucket(s3)
    for name, content in files(shop.root / "wide").items():
        client.put_object(Bucket="models", Key=f"team/wide/{name}", Body=content)
    client.put_object(Bucket="models", Key="team/narrow.tar", Body=pack(files(shop.root / "narrow")))
    async with fetching(shop, "s3://models/team/", credentials=S3_TABLE.format(s3)) as fetches:
        assert await fetch(fetches, "s3://models/team/wide") == load(shop.root / "wide").digest
        assert await fetch(fetches, "s3://models/team/narrow.tar", "narrow") == load(shop.root / "narrow").digest
        with pytest.raises(ApiError, match="answered 404 for adapter_config.json; it must hold an adapter_config.json"):
            await fetch(fetches, "s3://models/team/none", "third")
        assert fetches.names() == ["third"]
    assert not list((shop.catalog.settings.data / FOLDER).glob("*"))


async def test_a_bucket_of_google_s_is_asked_with_a_signature_or_openly(shop: Shop) -> None:  # noqa: F811 - a fixture
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

    account = {"type": "service_account", "client_email": "a@b.c", "private_key_id": "1", "private_key": key.decode()}
    contents = {f"/models/wide/{name}": content for name, content in files(shop.root / "wide").items()}

    def answer(handler: Any) -> None:
        handler.path = handler.path.partition("?")[0]
        share(contents)(handler)

    for secret in ("skip_signature = true", f"service_account_key = '{json.dumps(account)}'"):
        with serve(answer) as host:
            table = f'["gs://models/"]\nendpoint = "{host.url}"\n{secret}'
            async with fetching(shop, "gs://models", credentials=table) as fetches:
                assert await fetch(fetches, "gs://models/wide") == load(shop.root / "wide").digest
        assert all(("X-Goog-Signature=" in path) == ("key" in secret) for path in host.paths())


async def test_a_repository_comes_from_a_hub_at_one_commit(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = files(shop.root / "wide")
    digest = hashlib.sha256(contents[WEIGHTS]).hexdigest()
    with (
        serve(share({f"/{digest}": contents[WEIGHTS]})) as cdn,
        serve(hub("team/wide", contents, cdn.url, token="hf_secret")) as host,
    ):
        table = f'["hf://team/"]\nendpoint = "{host.url}"\ntoken = "hf_secret"'
        for name in (CONFIG, WEIGHTS):  # the hub is one, for its own client
            path = huggingface_hub.hf_hub_download(
                "team/wide", name, endpoint=host.url, token="hf_secret", cache_dir=shop.root / "cache"
            )
            assert Path(path).read_bytes() == contents[name]
        host.asked.clear()
        cdn.asked.clear()
        async with fetching(shop, "hf://team/", credentials=table) as fetches:
            with pytest.raises(ApiError, match=r"redirects to http://127.0.0.1, which is not in FUSION_SOURCES"):
                await fetch(fetches, "hf://team/wide@main")
        async with fetching(shop, "hf://team/", cdn.url, credentials=table) as fetches:
            assert await fetch(fetches, "hf://team/wide@main") == load(shop.root / "wide").digest
            with pytest.raises(ApiError, match="the hub answered 'RepoNotFound'"):
                await fetch(fetches, "hf://team/other", "other")
        assert f"/team/wide/resolve/{COMMIT}/{WEIGHTS}" in host.paths()
        assert all("authorization" not in {key.lower() for key in sent} for _, _, sent in cdn.asked), "the token stays"
        async with fetching(shop, "hf://team/", credentials=table.replace("hf_secret", "hf_wrong")) as fetches:
            with pytest.raises(ApiError, match="'GatedRepo' for adapter_config.json; check the token") as caught:
                await fetch(fetches, "hf://team/wide", "other")
            assert "hf_wrong" not in str(caught.value)


async def test_an_artifact_comes_from_a_registry(shop: Shop) -> None:  # noqa: F811 - a fixture
    answer, digest = registry("team/wide", files(shop.root / "wide"), "ada", "s3cret")
    with serve(answer) as host:
        table = f'["oci://{host.name}/"]\nendpoint = "{host.url}"\nusername = "ada"\npassword = "s3cret"'
        async with fetching(shop, f"oci://{host.name}/team", credentials=table) as fetches:
            for source in (f"oci://{host.name}/team/wide:v1", f"oci://{host.name}/team/wide@{digest}"):
                assert await fetch(fetches, source) == load(shop.root / "wide").digest
            with pytest.raises(ApiError, match="the registry answered 404 for its manifest"):
                await fetch(fetches, f"oci://{host.name}/team/wide:v2", "other")
        async with fetching(shop, f"oci://{host.name}", credentials=table.replace("s3cret", "wrong")) as fetches:
            with pytest.raises(ApiError, match="the registry gave no token; check FUSION_SOURCE_CREDENTIALS"):
                await fetch(fetches, f"oci://{host.name}/team/wide:v1", "other")
    bad = dict(zip((CONFIG, WEIGHTS), (b"{}", b"other"), strict=True))
    forged, _ = registry("team/wide", bad, "ada", "s3cret")

    def swap(handler: Any) -> None:
        (forged if "/blobs/" not in handler.path else lambda each: each.send(200, b"not that"))(handler)

    with serve(swap) as host:
        table = f'["oci://{host.name}/"]\nendpoint = "{host.url}"\nusername = "ada"\npassword = "s3cret"'
        async with fetching(shop, f"oci://{host.name}", credentials=table) as fetches:
            with pytest.raises(ApiError, match="adapter_config.json is not what its digest says"):
                await fetch(fetches, f"oci://{host.name}/team/wide:v1", "other")

    def forge(handler: Any) -> None:
        handler.path = handler.path.replace(digest, "v1")
        forged(handler)

    with serve(forge) as host:
        table = f'["oci://{host.name}/"]\nendpoint = "{host.url}"\nusername = "ada"\npassword = "s3cret"'
        async with fetching(shop, f"oci://{host.name}", credentials=table) as fetches:
            with pytest.raises(ApiError, match="its manifest is not what its digest says"):
                await fetch(fetches, f"oci://{host.name}/team/wide@{digest}", "other")


async def test_a_digest_pins_the_content(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {
        f"/{name}/{file}": data for name in ("wide", "narrow") for file, data in files(shop.root / name).items()
    }
    wide = load(shop.root / "wide").digest
    with serve(share(contents)) as host:
        async with fetching(shop, host.url) as fetches:
            assert await fetch(fetches, f"{host.url}/wide#sha256:{wide}") == wide
            with pytest.raises(ApiError, match="its digest is [0-9a-f]{64}, not the one pinned by '#sha256:'"):
                await fetch(fetches, f"{host.url}/narrow#sha256:{wide}", "narrow")
            assert "narrow" not in shop.catalog.registry.adapters


async def test_nothing_is_allowed_by_default(shop: Shop) -> None:  # noqa: F811 - a fixture
    assert Settings().sources == ()
    with serve(share({})) as host:
        async with fetching(shop) as fetches:
            for source in (f"{host.url}/x", "hf://team/x", "s3://models/x", "gs://models/x", f"oci://{host.name}/x:1"):
                with pytest.raises(ApiError, match="is not in FUSION_SOURCES") as caught:
                    fetches.start(Order("wide", source))
                assert caught.value.status == 403
        assert not host.asked


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]", "0.0.0.0"])
async def test_names_of_internal_addresses_are_refused(shop: Shop, host: str) -> None:  # noqa: F811 - a fixture
    with serve(share({})) as server:
        port = server.url.rpartition(":")[2]
        async with fetching(shop, "http://", networks=()) as fetches:
            with pytest.raises(ApiError, match="has an internal address; the operator can allow its network") as caught:
                await fetch(fetches, f"http://{host}:{port}/x")
        assert caught.value.status == 403
        assert not server.asked


async def test_a_name_that_changes_its_address_is_checked_every_time(
    shop: Shop,  # noqa: F811 - a fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers, looked_up = iter(["127.0.0.1", "169.254.169.254"]), []
    known = socket.getaddrinfo

    def look_up(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host != "models.example":
            return known(host, port, *args, **options)
        looked_up.append(host)
        return known(next(answers), port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    contents = {f"/x/{name}": content for name, content in files(shop.root / "wide").items()}
    with serve(share(contents)) as host:
        port = host.url.rpartition(":")[2]
        async with fetching(shop, "http://") as fetches:
            with pytest.raises(ApiError, match="'models.example' has an internal address"):
                await fetch(fetches, f"http://models.example:{port}/x")
    assert len(looked_up) == 2, "once for each connection, none between the check and the connection"
    assert host.paths() == [f"/x/{CONFIG}"]
    assert host.asked[0][2]["Host"] == f"models.example:{port}"


async def test_redirects_out_of_the_list_are_not_followed(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/ok/{name}": content for name, content in files(shop.root / "wide").items()}
    with serve(share(contents)) as inner:

        def answer(handler: Any) -> None:
            folder, _, name = handler.path.strip("/").partition("/")
            places = {
                "ok": f"{inner.url}/ok/{name}",
                "path": f"{inner.url}/secret/{name}",
                "dots": f"{inner.url}/ok/../secret/{name}",
                "code": f"{inner.url}/ok/%2e%2e/secret/{name}",
                "back": f"{inner.url}/ok/..%5csecret/{name}",
                "meta": "http://169.254.169.254/latest/meta-data/",
                "file": "file:///etc/passwd",
                "user": f"http://a:b@{inner.name}/ok/{name}",
                "loop": f"/loop/{name}",
            }
            handler.send(302, location=places[folder])

        with serve(answer) as host:
            async with fetching(shop, host.url, f"{inner.url}/ok/") as fetches:
                assert await fetch(fetches, f"{host.url}/ok") == load(shop.root / "wide").digest
                for folder in ("path", "dots", "code", "back", "meta", "file", "user"):
                    with pytest.raises(ApiError, match="which is not in FUSION_SOURCES"):
                        await fetch(fetches, f"{host.url}/{folder}", "other")
                with pytest.raises(ApiError, match="redirects more than 5 times"):
                    await fetch(fetches, f"{host.url}/loop", "other")
            async with fetching(shop, "http://", networks=()) as fetches:
                with pytest.raises(ApiError, match="internal address"):
                    await fetch(fetches, f"{host.url}/meta", "other")
    assert inner.paths() == [f"/ok/{CONFIG}", f"/ok/{WEIGHTS}"]
