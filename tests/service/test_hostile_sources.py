"""Sources that do their worst, and servers that are killed: what is fetched is bounded, and goes on where it was."""

import gzip
import io
import json
import tarfile
import time

import pytest

from adapters import load
from adapters.files import CONFIG, WEIGHTS
from service.errors import ApiError
from service.sources.fetch import ATTEMPTS
from service.sources.fetches import FOLDER
from tests.service.fetching import fetch, fetching
from tests.service.shops import Shop
from tests.service.source_servers import Handler, files, pack, serve, share, start_body, tag
from tests.service.test_catalog import shop  # noqa: F401 - a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


def config(shop: Shop) -> bytes:  # noqa: F811 - a fixture
    return files(shop.root / "wide")[CONFIG]


async def test_a_body_without_an_end_is_ended(shop: Shop) -> None:  # noqa: F811 - a fixture
    sent = 0

    def answer(handler: Handler) -> None:
        nonlocal sent
        if handler.path.endswith(CONFIG) and "config" not in handler.path.partition("/x/")[0]:
            handler.send(200, config(shop))
            return
        start_body(handler, connection="close")
        while True:
            handler.wfile.write(bytes(2**16))
            sent += 2**16

    with serve(answer) as host:
        async with fetching(shop, host.url) as fetches:
            with pytest.raises(ApiError, match="adapter_model.safetensors is larger than 4194304 bytes"):
                await fetch(fetches, f"{host.url}/x")
            assert sent < 2**24
            with pytest.raises(ApiError, match="adapter_config.json is larger than 1048576 bytes"):
                await fetch(fetches, f"{host.url}/config/x")
    assert not list((shop.catalog.settings.data / FOLDER).glob("*.json"))


async def test_a_size_that_is_too_large_is_not_waited_for(shop: Shop) -> None:  # noqa: F811 - a fixture
    def answer(handler: Handler) -> None:
        if handler.path.endswith(CONFIG):
            handler.send(200, config(shop))
            return
        start_body(handler, content_length=str(2**40))

    with serve(answer) as host:
        async with fetching(shop, host.url) as fetches:
            with pytest.raises(ApiError, match="is larger than"):
                await fetch(fetches, f"{host.url}/x")
    assert len(host.asked) == 2, "once for each file"


@pytest.mark.parametrize("kind", ["head", "body", "trickle", "trickled head"])
async def test_a_source_that_stalls_is_given_up_with_the_reason(shop: Shop, kind: str) -> None:  # noqa: F811 - a fixture
    def answer(handler: Handler) -> None:
        if handler.path.endswith(CONFIG):
            handler.send(200, config(shop))
            return
        if kind == "head":
            time.sleep(1)
        elif kind == "trickled head":
            for _ in range(40):
                handler.wfile.write(b"H" if _ else b"HTTP/1.1 200 OK\r\nX: ")
                time.sleep(0.05)
        else:
            start_body(handler, content_length="1000000")
            for _ in range(40):
                handler.wfile.write(b"." if kind == "trickle" else b"")
                time.sleep(0.05)

    began = time.monotonic()
    with serve(answer) as host:
        async with fetching(shop, host.url, timeout_s=0.2) as fetches:
            with pytest.raises(ApiError, match=f"within 0.2 s, at the last of {ATTEMPTS} attempts") as caught:
                await fetch(fetches, f"{host.url}/x")
            failed = fetches.get("wide")
            assert failed is not None
            assert (failed.state, failed.reason) == ("failed", caught.value.message)
    assert caught.value.status == 502
    assert time.monotonic() - began < 10


async def test_a_connection_that_breaks_is_taken_up_where_it_was(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = files(shop.root / "wide")
    half = len(contents[WEIGHTS]) // 2

    def answer(handler: Handler) -> None:
        if handler.path.endswith(WEIGHTS) and "range" not in {name.lower() for name in handler.headers}:
            start_body(handler, content_length=str(2 * half), etag=tag(contents[WEIGHTS]))
            handler.wfile.write(contents[WEIGHTS][:half])
            handler.close_connection = True
        else:
            share({f"/x/{name}": content for name, content in contents.items()})(handler)

    with serve(answer) as host:
        async with fetching(shop, host.url) as fetches:
            assert await fetch(fetches, f"{host.url}/x") == load(shop.root / "wide").digest
    assert host.asked[-1][2]["range"] == f"bytes={half}-"
    assert len(host.asked) == 3, "the configuration is not fetched again"


async def test_a_file_that_has_changed_meanwhile_is_fetched_anew(shop: Shop) -> None:  # noqa: F811 - a fixture
    old, new = files(shop.root / "wide"), files(shop.root / "narrow")

    def answer(handler: Handler) -> None:
        if handler.path.endswith(WEIGHTS) and "range" not in {name.lower() for name in handler.headers}:
            start_body(handler, content_length=str(len(old[WEIGHTS])), etag='"old"')
            handler.wfile.write(old[WEIGHTS][:1000])
            handler.close_connection = True
        else:
            share({f"/x/{name}": content for name, content in new.items()})(handler)

    with serve(answer) as host:
        async with fetching(shop, host.url) as fetches:
            assert await fetch(fetches, f"{host.url}/x") == load(shop.root / "narrow").digest


async def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/x/{name}": content for name, content in files(shop.root / "wide").items()}

    def answer(handler: Handler) -> None:
        if len(host.asked) % 2:
            handler.send(503)
        else:
            share(contents)(handler)

    with serve(answer) as host:
        async with fetching(shop, host.url) as fetches:
            assert await fetch(fetches, f"{host.url}/x") == load(shop.root / "wide").digest
            del contents[f"/x/{WEIGHTS}"]
            host.asked.clear()
            with pytest.raises(ApiError, match="answered 404 for adapter_model.safetensors"):
                await fetch(fetches, f"{host.url}/x", "other")
            assert len(host.asked) <= 4


async def test_what_is_compressed_is_refused(shop: Shop) -> None:  # noqa: F811 - a fixture
    bomb = gzip.compress(bytes(2**26))
    with serve(lambda handler: handler.send(200, bomb, content_encoding="gzip")) as host:
        async with fetching(shop, host.url) as fetches:
            with pytest.raises(ApiError, match="sends it compressed"):
                await fetch(fetches, f"{host.url}/x")
    assert host.asked[0][2]["accept-encoding"] == "identity"


def hostile_archives(good: dict[str, bytes]) -> dict[str, tuple[bytes, str]]:
    """Archives, and what is said of them."""

    def make(kind: bytes, name: str, link: str = "", content: bytes = b"") -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, link, len(content)
            archive.addfile(entry, io.BytesIO(content))
            for other in {CONFIG, WEIGHTS} - {name}:
                entry = tarfile.TarInfo(other)
                entry.size = len(good[other])
                archive.addfile(entry, io.BytesIO(good[other]))
        return out.getvalue()

    return {
        "symlink": (make(tarfile.SYMTYPE, WEIGHTS, "/etc/passwd"), "holds no plain file"),
        "hardlink": (make(tarfile.LNKTYPE, WEIGHTS, "../../registry.sqlite"), "holds no plain file"),
        "pickle": (pack({CONFIG: good[CONFIG], "adapter_model.bin": b"x"}), "a pickle, which can run code"),
        "gzip": (gzip.compress(bytes(2**20)), "this is gzip"),
        "cut": (pack(good)[:2000], "cut short"),
        "junk": (b"\xff" * 5000, "this is none, or a damaged one"),
    }


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "pickle", "gzip", "cut", "junk"])
async def test_no_archive_leaves_its_folder(shop: Shop, kind: str) -> None:  # noqa: F811 - a fixture
    content, words = hostile_archives(files(shop.root / "wide"))[kind]
    up = pack({f"../../{name}": data for name, data in files(shop.root / "wide").items()})
    before = sorted(path.name for path in shop.catalog.settings.data.iterdir())
    with serve(share({"/x.tar": content, "/up.tar": up})) as host:
        async with fetching(shop, host.url) as fetches:
            with pytest.raises(ApiError, match=words):
                await fetch(fetches, f"{host.url}/x.tar")
            assert await fetch(fetches, f"{host.url}/up.tar", "up") == load(shop.root / "wide").digest
    after = sorted(path.name for path in shop.catalog.settings.data.iterdir())
    assert {*after} - {*before} <= {FOLDER, "credentials.toml", "adapters", "builds"}


async def test_what_arrives_passes_the_checks_of_every_adapter(shop: Shop) -> None:  # noqa: F811 - a fixture
    contents = {f"/large/{name}": content for name, content in files(shop.root / "large").items()}
    contents |= {f"/x/{CONFIG}": json.dumps({"peft_type": "LORA", "r": 3}).encode(), f"/x/{WEIGHTS}": b"junk" * 99}
    with serve(share(contents)) as host:
        async with fetching(shop, host.url) as fetches:
            with pytest.raises(ApiError, match="rank 9 is over FUSION_MAX_LORA_RANK=8"):
                await fetch(fetches, f"{host.url}/large", "large")
            with pytest.raises(ApiError, match=r"\[[a-z_]+\]$"):
                await fetch(fetches, f"{host.url}/x", "junk")
    assert not shop.catalog.registry.adapters
    assert not shop.sources.entries()
