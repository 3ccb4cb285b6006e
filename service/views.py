"""What a tenant sees of the registry: its own things, and the public ones that have no name of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from service.records import AdapterRecord, ProfileVersion
from service.snapshot import Snapshot
from service.tenants import SEPARATOR, join_key, split_key

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class View:
    """The snapshot as one tenant sees it, by plain names. Copies nothing: looking up costs the same for any registry.

    A name stands for the tenant's own thing of any kind, or else for the public one: also when the operator has made
    that later. The operator, whose tenant is "", sees what is public.
    """

    snapshot: Snapshot
    tenant: str = ""

    @property
    def adapters(self) -> Mapping[str, AdapterRecord]:
        """By name."""
        return _Visible(self.snapshot.adapters, self)

    @property
    def profiles(self) -> Mapping[str, ProfileVersion]:
        """The current versions, by name."""
        return _Visible(self.snapshot.profiles, self)

    @property
    def versions(self) -> Mapping[str, Mapping[int, ProfileVersion]]:
        """All versions that can be read, by name and number."""
        return _Visible(self.snapshot.versions, self)

    @property
    def damaged_adapters(self) -> Mapping[str, str]:
        """As of `Snapshot`."""
        return _Visible(self.snapshot.damaged_adapters, self)

    @property
    def damaged_profiles(self) -> Mapping[str, str]:
        """As of `Snapshot`."""
        return _Visible(self.snapshot.damaged_profiles, self)

    @property
    def damaged_versions(self) -> Mapping[str, Mapping[int, str]]:
        """As of `Snapshot`."""
        return _Visible(self.snapshot.damaged_versions, self)

    def find_key(self, name: str) -> str:
        """The registered name that `name` is looked up as; of no entry when there is none."""
        return join_key(self.tenant, name) if self.owns(name) else name

    def owns(self, name: str) -> bool:
        """Whether `name` stands for a thing of the tenant itself, or for a version of its profile."""
        if not self.tenant:
            return True
        s, key, plain = self.snapshot, join_key(self.tenant, name), join_key(self.tenant, name.partition("@")[0])
        return key in s.adapters or plain in s.profiles or key in s.damaged_adapters or plain in s.damaged_profiles

    def is_public(self, name: str) -> bool:
        """Whether `name` stands for something that the tenant sees and the operator owns."""
        s = self.snapshot
        if not self.tenant or SEPARATOR in name or self.owns(name):
            return False
        return any(name in names for names in (s.adapters, s.profiles, s.damaged_adapters, s.damaged_profiles))

    def has_fusion(self, digest: str) -> bool:
        """Whether an adapter alone, or a version of a profile, has this fusion digest."""
        fusions = self.snapshot.fusions
        return digest in fusions or join_key(self.tenant, digest) in fusions

    def count_scorecards(self, digest: str) -> int:
        """Scorecards of a fusion, the public ones and the tenant's."""
        return _add_up(self.snapshot.scorecard_counts, self.tenant, digest)

    def measure_scorecards(self, digest: str) -> int:
        """Bytes of these scorecards."""
        return _add_up(self.snapshot.scorecard_bytes, self.tenant, digest)

    def list_scored(self) -> set[str]:
        """Digests of the fusions with such scorecards."""
        return {digest for tenant, digest in map(split_key, self.snapshot.scorecard_counts) if self._sees(tenant)}

    def list_users(self, record: AdapterRecord) -> list[str]:
        """As of `Snapshot`, those that the tenant sees, by plain name."""
        users = map(split_key, self.snapshot.list_users(record))
        return sorted({name for tenant, name in users if self._sees(tenant)})

    def _sees(self, tenant: str) -> bool:
        return not tenant or tenant == self.tenant


def _add_up(counts: Mapping[str, int], tenant: str, digest: str) -> int:
    own = counts.get(join_key(tenant, digest), 0) if tenant else 0
    return counts.get(digest, 0) + own


@dataclass(slots=True)  # made several times a request
class _Visible(Mapping[str, T]):
    """The entries of a dict by registered name that a view has, by plain name."""

    entries: Mapping[str, T]
    view: View

    def __getitem__(self, name: str) -> T:
        if SEPARATOR in name:
            raise KeyError(name)
        return self.entries[self.view.find_key(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and SEPARATOR not in name and self.view.find_key(name) in self.entries

    def __iter__(self) -> Iterator[str]:
        own = self.view.tenant
        for key in self.entries:
            tenant, name = split_key(key)
            if tenant == own or (not tenant and not self.view.owns(name)):
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)
