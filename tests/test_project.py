"""The project as a whole: no clash of names, tables that are the record and the code."""

import importlib.metadata

import pytest

from benchmarks import tables
from tests.conftest import ROOT

PACKAGES = ("adapters", "service", "training", "eval_clients", "lora_fusion")


def test_no_other_distribution_owns_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    assert {name: owners[name] for name in PACKAGES if set(owners.get(name, [])) - {"lora-fusion"}} == {}


@pytest.mark.parametrize("file", tables.TABLES)
def test_tables_are_the_recorded_figures_and_the_code_s_own(file: str) -> None:
    assert tables.fill_tables(file) == (ROOT / file).read_text()
