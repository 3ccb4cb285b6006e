"""The bucket that replicas share, on a real S3 server: whole entries or none, whatever fails on the way."""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import obstore
import pytest

from adapters.files import write_checksums
from service import bucket as buckets, shared_store
from service.bucket import Bucket, BucketRemote
from service.settings import Settings, SettingsError
from service.shared_store import SharedStore, SharedStoreError
from tests.service.buckets import BUCKET, list_keys, write_table
from tests.service.source_servers import serve

KEY, OTHER = "1" * 64, "2" * 64
PLACE = "s3://shared/team/replicas"


def open_store(
    folder: Path, endpoint: str, *, budget_bytes: int = 2**40, place: str = PLACE, timeout_s: float = 10
) -> SharedStore:
    folder.mkdir(exist_ok=True)
    bucket = Bucket(place, credentials_file=str(write_table(folder, endpoint)), timeout_s=timeout_s)
    return SharedStore(
        folder / "own", BucketRemote(bucket, "builds", budget_bytes=budget_bytes), budget_bytes=budget_bytes
    )


def write_entry(folder: Path, *, content: bytes = b"weights", count: int = 1) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_bytes(content * count)
    (folder / "report.json").write_text("{}")
    write_checksums(folder)


def read_entry(folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(bucket: Any) -> set[str]:
    return {key.removeprefix("team/replicas/") for key in list_keys(bucket)}


def test_what_one_publishes_the_other_gets_to_the_last_byte(
    tmp_path: Path, s3: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
    one, two = open_store(tmp_path / "1", s3), open_store(tmp_path / "2", s3)
    assert two.fetch(KEY) is None
    content = os.urandom(2**20) * 11 + b"the third part"
    path = one.land(KEY, partial(write_entry, content=content))
    one.publish(KEY)
    sums = {hashlib.sha256(data).hexdigest() for data in read_entry(path).values()}
    assert names(bucket) == {f"builds/{KEY}/{name}" for name in (*sums, "manifest")}
    assert read_entry(two.fetch(KEY)) == read_entry(path)
    assert f"builds/{KEY}/used" in names(bucket)
    two.publish(KEY)  # is there
    assert read_entry(open_store(tmp_path / "3", s3).fetch(KEY)) == read_entry(path)


def test_two_that_publish_at_once_leave_the_entry_of_one(tmp_path: Path, s3: str, bucket: Any) -> None:
    stores = [open_store(tmp_path / str(number), s3) for number in range(4)]
    for number, store in enumerate(stores):
        store.land(KEY, partial(write_entry, content=bytes([number]), count=10_000))
    barrier = threading.Barrier(4)

    def publish(store: SharedStore) -> None:
        barrier.wait(5)
        store.publish(KEY)

    threads = [threading.Thread(target=publish, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    got = [read_entry(open_store(tmp_path / f"reader-{number}", s3).fetch(KEY)) for number in range(2)]
    assert got[0] == got[1]
    assert got[0] in [read_entry(store.get(KEY)) for store in stores]


def test_what_is_half_there_is_not_there(tmp_path: Path, s3: str, bucket: Any) -> None:
    one, two = open_store(tmp_path / "1", s3), open_store(tmp_path / "2", s3)
    one.land(KEY, write_entry)
    one.publish(KEY)
    manifest = f"team/replicas/builds/{KEY}/manifest"
    content = bucket.get_object(Bucket=BUCKET, Key=manifest)["Body"].read()
    bucket.delete_object(Bucket=BUCKET, Key=manifest)  # as of a replica that is killed before it
    assert two.fetch(KEY) is None
    assert not list((tmp_path / "2/own").iterdir())
    one.publish(KEY)
    assert bucket.get_object(Bucket=BUCKET, Key=manifest)["Body"].read() == content
    assert two.fetch(KEY) is not None


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


DAMAGE: dict[str, Callable[[Any, Callable[[str, bytes], object]], object]] = {
    "another content": lambda m, put: put(m["report.json"]["sha256"], b"[]"),
    "a shorter file": lambda m, put: put(m["adapter/adapter_model.safetensors"]["sha256"], b"weight"),
    "a larger file": lambda m, put: put("manifest", json.dumps(m | {"x": {"sha256": sha(b""), "bytes": 9}}).encode()),
    "a missing file": lambda m, put: put("manifest", json.dumps(m | {"x": {"sha256": sha(b"x"), "bytes": 1}}).encode()),
    "a file that no checksum has": lambda m, put: [
        put(sha(b"x"), b"x"),
        put("manifest", json.dumps(m | {"x": {"sha256": sha(b"x"), "bytes": 1}}).encode()),
    ],
    "a path out of it": lambda m, put: put("manifest", json.dumps({"../x": m["report.json"]}).encode()),
    "an absolute path": lambda m, put: put("manifest", json.dumps({"/tmp/x": m["report.json"]}).encode()),
    "no digest": lambda m, put: put("manifest", json.dumps({"x": {"sha256": "../manifest", "bytes": 1}}).encode()),
    "no size": lambda m, put: put("manifest", json.dumps({"x": {"sha256": sha(b"x"), "bytes": -1}}).encode()),
    "no manifest": lambda m, put: put("manifest", b"\xff[]"),
    "no files": lambda m, put: put("manifest", b"{}"),
    "too many files": lambda m, put: put("manifest", json.dumps(dict.fromkeys(map(str, range(99)), 1)).encode()),
    "a large manifest": lambda m, put: put("manifest", b" " * 2**17),
    "a file over the budget": lambda m, put: put(
        "manifest", json.dumps({"x": {"sha256": sha(b"x"), "bytes": 2**50}}).encode()
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_removed_and_made_again(tmp_path: Path, s3: str, bucket: Any, damage: str) -> None:
    one, two = open_store(tmp_path / "1", s3), open_store(tmp_path / "2", s3)
    one.land(KEY, write_entry)
    one.publish(KEY)
    folder = f"team/replicas/builds/{KEY}/"

    def put(name: str, content: bytes) -> None:
        bucket.put_object(Bucket=BUCKET, Key=folder + name, Body=content)

    manifest = json.loads(bucket.get_object(Bucket=BUCKET, Key=f"{folder}manifest")["Body"].read())
    DAMAGE[damage](manifest, put)
    assert two.fetch(KEY) is None
    assert not names(bucket)
    assert [path.name for path in tmp_path.iterdir()] in (["1", "2"], ["2", "1"])
    assert not list((tmp_path / "2/own").iterdir())
    two.land(KEY, write_entry)
    two.publish(KEY)
    assert open_store(tmp_path / "3", s3).fetch(KEY) is not None


def test_a_bucket_keeps_its_budget_and_loses_what_nothing_needs(
    tmp_path: Path, s3: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_store, "EVICT_S", 0)
    store = open_store(tmp_path / "1", s3, budget_bytes=10_000)
    keys = [f"{number:064x}" for number in range(3)]
    for key in keys:
        store.land(key, partial(write_entry, content=b"1", count=4000))
        store.publish(key)
        time.sleep(1.01 if key == keys[0] else 0)  # the resolution of S3's times
    left = {name.split("/")[1] for name in names(bucket)}
    assert left == set(keys[1:])
    monkeypatch.setattr(shared_store, "GRACE_S", -10)
    assert store.tend(lambda key: key == keys[1]) == [keys[2]]
    store.withdraw([keys[2]])
    assert {name.split("/")[1] for name in names(bucket) if "/" in name[7:]} == {keys[1]}
    monkeypatch.setattr(shared_store, "GRACE_S", 3600)
    assert store.tend(lambda _: False) == []
    bucket.delete_object(Bucket=BUCKET, Key=f"team/replicas/builds/{keys[1]}/manifest")


def test_a_bucket_that_does_not_answer_is_named_and_not_waited_for_again(
    tmp_path: Path, s3: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "1", s3)
    store.land(KEY, write_entry)
    monkeypatch.setattr(buckets, "RETRY_S", 1)
    table = write_table(tmp_path / "1", "http://127.0.0.1:9")
    for call in (partial(store.fetch, OTHER), partial(store.publish, KEY)):
        with pytest.raises(SharedStoreError, match=f"failed: {PLACE}: it does not answer as a bucket does") as caught:
            call()
        assert caught.value.status == 503
        assert caught.value.headers["retry-after"]
    began = time.monotonic()
    for _ in range(50):
        with pytest.raises(SharedStoreError):
            store.fetch(OTHER)
    assert time.monotonic() - began < 1
    assert store.fetch(KEY) is not None, "what is here is served"
    write_table(tmp_path / "1", s3)
    time.sleep(1)
    assert store.fetch(OTHER) is None
    store.publish(KEY)
    assert f"builds/{KEY}/manifest" in names(bucket)
    table.write_text("[")
    with pytest.raises(SharedStoreError, match="it does not answer as a bucket does .SettingsError"):
        store.fetch(OTHER)


def test_a_bucket_that_hangs_or_refuses_ends_in_time_and_shows_no_secret(tmp_path: Path) -> None:
    hang = threading.Event()
    answers: list[tuple[Callable[[Any], Any], str]] = [
        (lambda handler: hang.wait(20), "does not answer as a bucket does"),
        (lambda handler: handler.send(503), "does not answer as a bucket does"),
        (lambda handler: handler.send(403, b"<Error>secret</Error>"), "refuses the credentials; check FUSION_SOURCE_C"),
    ]
    for answer, fault in answers:
        with serve(answer) as host:
            store = open_store(tmp_path, host.url, timeout_s=2)
            began = time.monotonic()
            with pytest.raises(SharedStoreError, match=fault) as caught:
                store.fetch(KEY)
            assert time.monotonic() - began < 10
            assert "secret" not in str(caught.value)
            hang.set()
            shutil.rmtree(tmp_path / "own")


def test_while_one_waits_for_a_bucket_the_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "RETRY_S", 0)
    go, failures = threading.Event(), list[Exception]()

    def ask() -> None:
        try:
            store.fetch(KEY)
        except SharedStoreError as error:
            failures.append(error)

    def answer(_: object) -> None:
        go.wait(20)

    with serve(answer) as host:
        store = open_store(tmp_path, host.url)
        ask()
        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.2)
        began = time.monotonic()
        ask()
        assert time.monotonic() - began < 0.5
        assert len(failures) == 2
        assert thread.is_alive()
        go.set()
        thread.join(10)


def test_a_bucket_has_one_registry(tmp_path: Path, s3: str, bucket: Any) -> None:
    def claim(place: str, identity: str) -> None:
        Bucket(place, credentials_file=str(write_table(tmp_path, s3)), timeout_s=2).claim(identity)

    for _ in range(2):
        claim(PLACE, "1" * 32)
    with pytest.raises(
        RuntimeError, match=f"{PLACE}' belongs to another registry .1111*.: choose another place, or th"
    ):
        claim(PLACE, "2" * 32)
    claim("s3://shared", "2" * 32)
    claim("s3://shared/other/", "2" * 32)
    with pytest.raises(RuntimeError, match="cannot be used: the bucket does not exist; create it or correct its name"):
        make_table = write_table(tmp_path, s3).read_text().replace(BUCKET, "none")
        (tmp_path / "credentials.toml").write_text(make_table)
        Bucket("s3://none/x", credentials_file=str(tmp_path / "credentials.toml"), timeout_s=2).claim("1" * 32)


def test_a_server_that_writes_over_what_is_there_is_refused(
    tmp_path: Path, s3: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = obstore.put

    def overwrite(*args: Any, mode: str = "", **options: Any) -> Any:
        return put(*args, **options)

    monkeypatch.setattr(obstore, "put", overwrite)
    with pytest.raises(RuntimeError, match="writes over what is there .it must know If-None-Match"):
        Bucket(PLACE, credentials_file=str(write_table(tmp_path, s3)), timeout_s=2).claim("1" * 32)


def test_other_places_are_refused() -> None:
    for place in ("gs://models/x", "https://models", "s3://", "s3://a b", "s3://key:secret@models/x"):
        with pytest.raises(SettingsError, match="expected a folder, or s3://BUCKET/FOLDER"):
            Settings(store=place, database="postgresql:///x")
