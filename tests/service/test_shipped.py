"""What the settings name is registered at the start; what clients have done meanwhile ends no start."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import ApiError
from service.settings import Settings
from service.shipped import register_shipped
from tests.service.shops import Shop, open_shop

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


def is_fetched(order: object) -> None:
    raise ApiError(409, "It is being fetched from elsewhere.")


async def start(shop: Shop, adapters: tuple[str, ...] = (), profiles: tuple[str, ...] = ()) -> None:
    """The registrations of a start with these settings."""
    service: Any = SimpleNamespace(
        settings=Settings(adapters=adapters, profiles=profiles),
        names=shop.catalog.names,
        registry=shop.catalog.registry,
        catalog=shop.catalog,
        fetches=SimpleNamespace(start=is_fetched),
        profiles=shop.profiles,
    )
    await register_shipped(service)


async def test_what_clients_have_registered_ends_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_shop(tmp_path, max_names=2) as shop:
        for name in ("wide", "half@1"):  # which has the form of a version
            await shop.catalog.add(name, shop.root / name.replace("half@1", "narrow"))
        with caplog.at_level(logging.WARNING, "fusion"):
            await start(
                shop,
                (f"third={shop.root / 'third'}", "far=https://example.org/far"),
                ("half=0.5*wide", "one=1*wide", "two=0.5*wide", "three=0.25*wide"),
            )
        assert list(shop.catalog.registry.adapters) == ["wide", "half@1"]
        assert list(shop.catalog.registry.profiles) == ["one", "two"]
        for words in (
            "'third=.*already 2 adapters",
            "'far=https://example.org/far' is not registered: It is being fetched from elsewhere",
            "profile 'half' waits .*would have the form of the adapter 'half@1'",
            "profile 'three' waits .*already 2 profiles",
        ):
            assert re.search(words, caplog.text), words


async def test_a_slip_in_the_settings_ends_the_start(tmp_path: Path) -> None:
    async with open_shop(tmp_path) as shop:
        for adapters, profiles, words in (
            ((f"x={tmp_path / 'none'}",), (), "FUSION_ADAPTERS names 'x=.*is not a folder"),
            ((), ("half=0.5*",), "FUSION_PROFILES names 'half=0.5"),
            ((), ("a b@1=0.5*wide",), "FUSION_PROFILES names 'a b@1="),
        ):
            with pytest.raises(RuntimeError, match=words):
                await start(shop, adapters, profiles)
