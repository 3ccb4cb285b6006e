"""Which adapters are of the served base: by shapes, by name, and what is said of the others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterError, LoraAdapter
from service.base_model import check_registered, read_fitting
from service.layers import BaseLayers, Shapes
from service.records import AdapterRecord
from service.routes.adapters import adapter_card
from service.settings import BaseMatch, Settings
from tests.adapters import samples
from tests.service.conftest import adapter_info
from tests.service.shops import Shop, open_shop

SETTINGS: Mapping[BaseMatch, Settings] = {
    match: Settings(base="/models/served", base_name=samples.BASE, base_aliases=("alias",), base_match=match)
    for match in ("shapes", "name")
}
NAMES: Mapping[str | None, str | None] = {
    samples.BASE: None,
    "alias": None,
    "/models/served": None,
    "/models/../models/served/": None,
    None: None,
    "org/A-Small-Base": "org/A-Small-Base",
    "/home/someone/a-small-base": "…/a-small-base",
    "../a-small-base": "…/a-small-base",
    r"C:\models\other": "…/other",
}


def fit(adapter: LoraAdapter, setting: BaseMatch, key: BaseMatch | None) -> tuple[LoraAdapter, str | None]:
    return read_fitting(lambda: adapter, BaseLayers(samples.SHAPES), SETTINGS[setting], key)


@pytest.mark.parametrize("declared", NAMES)
@pytest.mark.parametrize(("setting", "key"), [("shapes", None), ("shapes", "shapes"), ("name", "shapes")])
def test_a_base_spelled_otherwise_is_accepted_and_said(
    declared: str | None, setting: BaseMatch, key: BaseMatch | None
) -> None:
    """A2 and A3."""
    adapter, mismatch = fit(samples.adapter(7, 2, base=declared), setting, key)
    assert mismatch == NAMES[declared]
    assert adapter.base == (declared if mismatch is None else samples.BASE), "no other base is written into exports"


@pytest.mark.parametrize("declared", NAMES)
@pytest.mark.parametrize(("setting", "key"), [("name", None), ("name", "name"), ("shapes", "name")])
def test_or_refused_if_one_insists(declared: str | None, setting: BaseMatch, key: BaseMatch | None) -> None:
    adapter = samples.adapter(7, 2, base=declared)
    if NAMES[declared] is None:
        assert fit(adapter, setting, key)[1] is None
    else:
        with pytest.raises(AdapterError, match=r"base_match='shapes', or add that name to FUSION_BASE_ALIASES"):
            fit(adapter, setting, key)


def test_a_base_of_another_name_and_other_shapes_is_refused() -> None:
    shapes = {**samples.SHAPES, "model.layers.0.self_attn.q_proj": (1, 1)}
    adapter = samples.adapter(7, 2, base="org/other")
    with pytest.raises(AdapterError, match=r"'org/other'.*does not fit.*\[base\]"):
        read_fitting(lambda: adapter, BaseLayers(shapes), SETTINGS["shapes"], None)


@pytest.mark.anyio
async def test_what_was_registered_on_another_base_ends_the_start(tmp_path: Path) -> None:
    def check(shop: Shop, shapes: Shapes = samples.SHAPES, **settings: Any) -> None:
        records = list(shop.catalog.registry.adapters.values())
        given = Settings(**{"base_name": samples.BASE, **settings})
        check_registered(records, BaseLayers(shapes), given, shop.materializer.open)

    wider = {name: (out, 2 * size) for name, (out, size) in samples.SHAPES.items()}
    async with open_shop(tmp_path) as shop:
        check(shop, wider, base_name="new")
        for name in ("wide", "narrow"):
            await shop.catalog.add(name, shop.root / name)
        check(shop)
        with pytest.raises(RuntimeError, match=r"2 adapters .* a base of another name than 'new': another base needs"):
            check(shop, base_name="new")
        check(shop, base_name="new", base_aliases=(samples.BASE,))
        with pytest.raises(RuntimeError, match=r"do not fit .*: another base needs .*'wide': .* it is of another base"):
            check(shop, wider)
        for name in ("wide", "narrow"):  # damage is for others to tell
            shop.materializer.remove(shop.catalog.registry.adapters[name].digest)
        check(shop, wider)


def test_modules_under_another_root_are_taken_under_the_base_s_names() -> None:
    """E1, where the base's shapes say which reading is right."""
    plain = samples.adapter(1)
    modules = {name.replace("model.", "model.language_model."): module for name, module in plain.modules.items()}
    adapter, _ = fit(LoraAdapter(modules, samples.BASE), "shapes", None)
    assert adapter.digest == plain.digest
    assert "read under the base's names" in adapter.notes[0]


def test_an_answer_has_the_notes_and_the_other_name() -> None:
    info = adapter_info(notes="one\ntwo", base_mismatch="org/other")
    card = adapter_card(AdapterRecord("a", "0" * 64, info, "2026-01-01T00:00:00+00:00"), {})
    assert (card.notes, card.base_mismatch) == (["one", "two"], "org/other")
