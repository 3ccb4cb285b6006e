"""The weights that an adapter's maker recommends: from its adapter_config.json to the card that the page shows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterError, load, save
from adapters.cli import main
from adapters.files import CONFIG
from service.records import AdapterRecord, read_adapter
from service.routes.adapters import adapter_card
from tests.adapters import samples
from tests.service.conftest import adapter_info
from tests.service.shops import Shop
from tests.service.test_catalog import shop as shop  # a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


def write(folder: Path, value: Any) -> Path:
    """A folder whose adapter_config.json states this range."""
    save(samples.adapter(7), folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"weight_range": value}))
    return folder


async def test_a_range_is_read_saved_shown_and_no_part_of_the_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = load(write(tmp_path / "a", [0.3, 1]))
    assert (read.weight_range, read.notes, read.digest) == ((0.3, 1.0), (), samples.adapter(7).digest)
    save(read, tmp_path / "b")
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["weight_range"] == [0.3, 1]
    assert load(tmp_path / "b", lazy=True).weight_range == (0.3, 1.0)
    assert load(write(tmp_path / "c", None)).weight_range is None
    save(samples.adapter(7), tmp_path / "plain")
    assert "weight_range" not in json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert main(["show", str(tmp_path / "a")]) == 0
    assert "recommended weights: 0.3 to 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value",
    [[1, 0.3], [0.3], [0.3, 1, 2], [True, 1], ["0.3", "1"], [0, 1e9], "0.3..1", {"low": 0}, 1, [float("nan"), 1]],
)
async def test_what_is_no_range_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(AdapterError, match=r"\[bad_config\]"):
        load(write(tmp_path / "a", value))


async def test_a_registered_adapter_s_card_has_its_range(shop: Shop) -> None:
    save(replace(load(shop.root / "wide"), weight_range=(-0.5, 1.5)), shop.root / "ranged")
    record, _ = await shop.catalog.add("ranged", shop.root / "ranged")
    stored = read_adapter(record.key, record.digest, json.dumps(dict(record.info)), record.created)
    assert (stored, stored.weight_range) == (record, (-0.5, 1.5))
    assert adapter_card(stored, {}).model_dump(mode="json", exclude_unset=True)["weight_range"] == [-0.5, 1.5]


async def test_a_record_without_a_range_has_none() -> None:
    plain = AdapterRecord("plain", "a" * 64, adapter_info(), "2026-01-31T12:00:00+00:00")
    half = replace(plain, info=adapter_info(weight_low=0.3))
    for record in (plain, half):
        assert record.weight_range is None
        assert "weight_range" not in adapter_card(record, {}).model_dump(exclude_unset=True)
