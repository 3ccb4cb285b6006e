"""Which public names this server answers without loading anything: what routers that know adapters ask of a replica."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from adapters import FusionError, RecipeError
from service.errors import ApiError
from service.forms import list_forms
from service.loaded_series import LoadedName, Survey
from service.placement import place
from service.pool import Pool
from service.records import AdapterRecord, ProfileVersion
from service.resolve import Names


@dataclass(frozen=True, slots=True)
class Seat:
    """What has to be in the engine for a name: a stack that holds these adapters, or this build."""

    digests: frozenset[str]
    build: str | None
    rank: int


class LoadedNames:
    """Adapters and profiles by what is resident now. A mix counts for its profiles and for each of its adapters.

    `survey` may be called in any thread: what it reads is copied at once.
    """

    def __init__(self, names: Names, pool: Pool, forms: Collection[str], slots: int) -> None:
        self._names = names
        self._pool = pool
        self._forms = forms
        self._slots = slots
        self._seats: dict[str, Seat] = {}
        """By fusion digest, which says all of a recipe and its adapters' contents."""

    def survey(self) -> Survey:
        """Everything a router may want to know about names at this moment."""
        residents = sorted(self._pool.residents, key=lambda r: (r.leases > 0, r.last_used), reverse=True)
        stacks = {r.key: frozenset(r.widths) for r in residents if r.kind == "stack"}
        loaded, making = _Index(stacks), _Index(self._pool.list_making())
        active = {r.key for r in residents[: self._slots]}
        keys, pinned = {r.key for r in residents}, set(self._pool.list_pinned())
        names: list[LoadedName] = []
        waiting: list[str] = []
        for name, seat in self._list_seats():
            found = {seat.build} & keys if seat.build else loaded.find(seat.digests)
            if found:
                names.append(LoadedName(name, seat.rank, not active.isdisjoint(found), not pinned.isdisjoint(found)))
            elif seat.build in making.keys if seat.build else making.find(seat.digests):
                waiting.append(name)
        busy = sum(r.leases > 0 for r in residents)
        return Survey(tuple(names), tuple(waiting), self._pool.count_room(), max(0, self._slots - busy))

    def _list_seats(self) -> Iterator[tuple[str, Seat]]:
        snapshot = self._names.registry.snapshot
        seen: set[str] = set()
        for name, record in list(snapshot.adapters.items()):
            if not record.gate and (seat := self._find_seat(record, seen)) is not None:
                yield from ((form, seat) for form in self._list_forms(name))
        for name, profile in list(snapshot.profiles.items()):
            forms = dict.fromkeys(self._list_forms(name), profile)
            if "versions" in self._forms:
                forms |= {f"{name}@{number}": v for number, v in dict(snapshot.versions.get(name, {})).items()}
            for form, version in forms.items():
                if (seat := self._find_seat(version, seen)) is not None:
                    yield form, seat
        for digest in self._seats.keys() - seen:
            self._seats.pop(digest, None)

    def _list_forms(self, name: str) -> tuple[str, ...]:
        return list_forms(self._names.base, name, self._forms)

    def _find_seat(self, entry: AdapterRecord | ProfileVersion, seen: set[str]) -> Seat | None:
        digest = entry.digest if isinstance(entry, ProfileVersion) else str(entry.info["fusion_digest"])
        seen.add(digest)
        if (seat := self._seats.get(digest)) is None and (seat := self._make_seat(entry)) is not None:
            self._seats[digest] = seat
        return seat

    def _make_seat(self, entry: AdapterRecord | ProfileVersion) -> Seat | None:
        try:
            if isinstance(entry, ProfileVersion):
                fusion = self._names.resolve_profile(entry)
            else:
                fusion = self._names.bind(entry.recipe, [entry])
            placement = place(fusion, (), (), self._pool.limits)
        except (ApiError, FusionError, RecipeError):
            return None
        is_build = placement.kind == "build"
        return Seat(frozenset(placement.digests), placement.key if is_build else None, fusion.rank)


class _Index:
    """Stacks by the adapters that they hold."""

    def __init__(self, stacks: Mapping[str, Collection[str]]) -> None:
        self.keys = stacks.keys()
        self._holding: dict[str, set[str]] = defaultdict(set)
        for key, digests in stacks.items():
            for digest in digests:
                self._holding[digest].add(key)

    def find(self, digests: frozenset[str]) -> set[str]:
        """The stacks that hold all of these."""
        found = [self._holding.get(digest, set()) for digest in digests]
        return set.intersection(*found) if found else set()
