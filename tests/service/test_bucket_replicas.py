"""Replicas that share a bucket: the same bytes, what they do without it, and who clears it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from service import bucket as buckets, replicas, shared_store
from service.errors import ApiError
from tests.service.buckets import BUCKET, list_keys, write_table
from tests.service.databases import Postgres
from tests.service.replicas import Replica, run_replica, until, write_samples
from tests.service.test_replicas import TIES, read_bytes

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


@asynccontextmanager
async def run_pair(postgres: Postgres, folder: Path, s3: str) -> AsyncIterator[tuple[Replica, Replica]]:
    write_samples(folder / "root")
    file = str(write_table(folder, s3))
    settings: dict[str, Any] = {"store": "s3://shared/x", "source_credentials": file, "source_timeout_s": 2.0}
    with postgres.fresh() as url:
        async with run_replica(url, folder, "1", **settings) as one, run_replica(url, folder, "2", **settings) as two:
            yield one, two


def keys(bucket: Any) -> set[str]:
    """Of all adapters."""
    return {key.split("/")[2] for key in list_keys(bucket, "x/adapters/")}


@pytest.mark.usefixtures("bucket")
async def test_all_replicas_get_the_same_bytes_from_a_bucket(postgres: Postgres, tmp_path: Path, s3: str) -> None:
    async with run_pair(postgres, tmp_path, s3) as (one, two):
        await one.add("a")
        await two.add("b")
        await until(lambda: {"a", "b"} == one.registry.adapters.keys() == two.registry.adapters.keys())
        first, second = await one.lease(TIES), await two.lease(TIES)
        assert (first.source, second.source) == ("built", "loaded")
        made = [read_bytes(replica.data / "builds") for replica in (one, two)]
        both = made[0].keys() & made[1].keys()
        assert len(both) == 5
        assert all(made[0][path] == made[1][path] for path in both)
        assert read_bytes(two.data / "adapters").items() < read_bytes(one.data / "adapters").items(), "a copy of b"


async def test_without_its_bucket_a_replica_makes_what_it_can(
    postgres: Postgres, tmp_path: Path, s3: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "RETRY_S", 0.5)
    async with run_pair(postgres, tmp_path, s3) as (one, two):
        for name in ("a", "b"):
            await one.add(name)
        await until(lambda: "b" in two.registry.adapters)
        write_table(tmp_path, "http://127.0.0.1:9")
        assert (await one.lease("0.5*a + 0.5*b")).source == "built"
        for call in (two.lease("0.5*a + 0.25*b"), two.add("c")):
            with pytest.raises(
                ApiError, match="The store that replicas share failed: s3://shared/x: .*; try a"
            ) as caught:
                await call
            assert caught.value.status == 503
        assert not two.materializer.damage, "no file is damaged"
        assert "c" not in two.registry.adapters
        write_table(tmp_path, s3)
        await anyio.sleep(0.6)
        await two.add("c")
        assert (await two.lease(TIES)).source == "built"
        assert two.registry.adapters["c"].digest in keys(bucket)


async def test_a_bucket_gets_back_what_it_lost_and_loses_what_nothing_needs(
    postgres: Postgres, tmp_path: Path, s3: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "COLLECT_S", 0.2)
    monkeypatch.setattr(shared_store, "GRACE_S", -10)
    async with run_pair(postgres, tmp_path, s3) as (one, two):
        for name in ("a", "b"):
            await one.add(name)
        a, b = (one.registry.adapters[name].digest for name in ("a", "b"))
        assert keys(bucket) == {a, b}
        for key in list_keys(bucket, f"x/adapters/{b}"):
            bucket.delete_object(Bucket=BUCKET, Key=key)
        await one.catalog.remove("a")
        await until(lambda: keys(bucket) == {b}, 5)
        assert (await two.lease("ties(1*b, density=0.5)")).source == "built", "from a copy of b"
