"""The place that replicas share: within its budget, cleared of what nothing needs, of one registry."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from adapters import Store
from adapters.files import CHECKSUMS, is_whole, write_checksums
from service import shared_store
from service.settings import Settings, SettingsError
from service.shared_store import FolderRemote, SharedStore, SharedStoreError, claim_folder
from tests.service.replicas import Replica, filled_pair as filled_pair

KEY = "0" * 64


def write_bytes(count: int, folder: Path) -> None:
    (folder / "file").write_bytes(bytes(count))


def test_what_nothing_needs_goes_from_the_shared_place_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SharedStore(tmp_path / "own", FolderRemote(tmp_path / "shared", budget_bytes=2**40), budget_bytes=2**40)
    keys = [f"{number:064x}" for number in range(3)]
    for key in keys:
        store.land(key, partial(write_bytes, 7))
        store.publish(key)
    for key in keys[:2]:
        os.utime(tmp_path / "shared" / key, (0, 0))
    assert store.tend(keys[0].__eq__) == [keys[1]]  # one is needed, one is young
    store.withdraw(keys[:2])
    assert not (tmp_path / "shared" / keys[1]).exists()
    assert store.get(keys[1]) is not None
    assert store.tend(keys[0].__eq__) == []
    assert (tmp_path / "shared" / keys[0]).exists(), "what went by mistake comes back"
    assert not (tmp_path / "shared" / keys[1]).exists()
    monkeypatch.setattr(shared_store, "GRACE_S", -10)
    assert store.tend(lambda _: False) == [keys[2], keys[0]]


def test_the_shared_place_keeps_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_store, "EVICT_S", 0)
    store = SharedStore(tmp_path / "own", FolderRemote(tmp_path / "shared", budget_bytes=2000), budget_bytes=2**40)
    for number in range(4):
        store.land(f"{number:064x}", partial(write_bytes, 800))
        store.publish(f"{number:064x}")
        os.utime(tmp_path / "shared" / f"{number:064x}", (number, number))
    shared = Store(tmp_path / "shared", budget_bytes=0)
    assert shared.nbytes <= 2000
    assert shared.entries()[-1].key == f"{3:064x}"
    assert len(store.entries()) == 4


class Flaky(FolderRemote):
    """A folder of which so many readings go wrong."""

    faults = 0

    def fetch(self, key: str, folder: Path) -> bool:
        found = super().fetch(key, folder)
        if self.faults:
            self.faults -= 1
            (folder / "file").write_bytes(b"garbled")
        return found


@pytest.mark.parametrize(("faults", "only_reads", "stays"), [(1, False, True), (2, False, False), (2, True, True)])
def test_an_entry_goes_when_two_readings_are_wrong_and_never_from_who_only_reads(
    tmp_path: Path, faults: int, only_reads: bool, stays: bool
) -> None:
    shared = tmp_path / "shared" / KEY
    maker = SharedStore(tmp_path / "1", Flaky(tmp_path / "shared", budget_bytes=2**40), budget_bytes=2**40)
    maker.land(KEY, partial(write_bytes, 7))
    maker.publish(KEY)
    remote = Flaky(tmp_path / "shared", budget_bytes=2**40)
    remote.faults = faults
    store = SharedStore(tmp_path / "2", remote, budget_bytes=2**40, only_reads=only_reads)
    found = store.fetch(KEY)
    assert shared.exists() == stays
    assert (found is not None) == (faults == 1)
    assert found is None or (found / "file").read_bytes() == bytes(7)


def test_a_folder_that_fails_is_no_folder_without_the_entry(tmp_path: Path) -> None:
    store = SharedStore(tmp_path / "own", FolderRemote(tmp_path / "shared", budget_bytes=2**40), budget_bytes=2**40)
    store.land("0" * 64, partial(write_bytes, 7))
    assert store.fetch("1" * 64) is None
    shutil.rmtree(tmp_path / "shared")
    assert store.fetch("0" * 64) is not None, "what is here is served"
    with pytest.raises(
        SharedStoreError, match="failed: its folder is not mounted; try again, or see that ever"
    ) as info:
        store.fetch("1" * 64)
    assert info.value.status == 503
    (tmp_path / "shared").write_text("in the way")
    with pytest.raises(SharedStoreError, match="The store that replicas share failed: .*") as info:
        store.publish("0" * 64)


def test_a_store_has_one_registry(tmp_path: Path) -> None:
    claim_folder(str(tmp_path / "shared"), "1" * 32)
    claim_folder(str(tmp_path / "shared"), "1" * 32)
    with pytest.raises(
        RuntimeError, match=f"belongs to another registry \\({'1' * 32}\\): choose another place, or th"
    ):
        claim_folder(str(tmp_path / "shared"), "2" * 32)
    claim_folder(str(tmp_path / "shared"), "1" * 32)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/lock").touch()
    with pytest.raises(RuntimeError, match="is the data folder of a server: choose a folder of its own"):
        claim_folder(str(tmp_path / "data"), "1" * 32)
    with pytest.raises(SettingsError, match="FUSION_STORE is set, but FUSION_DATABASE is not a postgresql:// URL"):
        Settings(store="shared")


@pytest.mark.anyio
async def test_a_damaged_adapter_is_copied_again_or_registered_anew_for_all(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    digest = one.registry.adapters["a"].digest

    def change(*folders: Path) -> None:
        for folder in folders:
            (path,) = (folder / digest).rglob("*.safetensors")
            path.write_bytes(path.read_bytes()[:-1] + b"!")

    shared, own = one.data.parent / "shared/adapters", two.data / "adapters"
    assert two.materializer.check(digest)
    change(own)
    assert two.materializer.check(digest), "copied again"
    change(own, shared)
    write_checksums(shared / digest)  # as whoever forges it would
    assert not two.materializer.check(digest)
    assert "content has changed" in two.materializer.damage[digest]
    assert one.materializer.check(digest), "who has a copy needs no other"
    await two.add("a")
    assert two.materializer.check(digest)
    assert is_whole(shared / digest)
    assert (shared / digest / CHECKSUMS).read_text() == (own / digest / CHECKSUMS).read_text()
