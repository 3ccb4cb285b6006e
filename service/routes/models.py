"""`/v1/models`: the base first, then adapters and profiles, each with its `fusion` object."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from service.errors import ApiError
from service.forms import list_forms
from service.placement import Group, Home
from service.records import AdapterRecord, ProfileVersion
from service.resolve import Fusion, Names
from service.routes import SeenNames, Service, make_router
from service.routes.schemas import DamagedState, FusionState, Listing, Model
from service.views import View

if TYPE_CHECKING:
    from service.fusion_service import FusionService

PART_BYTES = 64 * 2**10
"""A list is made and sent in parts of about this: it is never in memory as a whole, and other requests go on."""

router = make_router("Models", "/v1/models")


@dataclass(frozen=True, slots=True)
class _Status:
    """What may change about a fusion while its name stands for it."""

    state: str
    reason: str | None
    scorecards: int


def _find_status(service: "FusionService", seen: View, fusion: Fusion, home: Home) -> _Status:
    state, reason = service.pool.home_state(home)
    damage = service.materializer.damage
    if state != "warm" and damage and (damaged := next((digest for digest in fusion.ranks if digest in damage), None)):
        state, reason = "damaged", f"the stored files of an adapter: {damage[damaged]}"
    return _Status(state, reason, seen.count_scorecards(fusion.digest))


def _describe(fusion: Fusion, home: Home, status: _Status) -> FusionState:
    card = FusionState(
        recipe=fusion.recipe.format(),
        digest=fusion.digest,
        rank=sum(fusion.ranks[digest] for digest in fusion.members),
        state=status.state,
        scorecards=status.scorecards,
        stack=home.key,
    )
    if status.reason is not None:
        card.reason = status.reason
    if fusion.profile is not None:
        card.version = fusion.profile.version
    return card


def _make_card(service: "FusionService", name: str, created: str, fusion: FusionState | None) -> Model:
    """The model object of `name`, registered at `created` (ISO 8601 or empty); `fusion` is None for the base."""
    card = Model(
        id=name,
        object="model",
        created=int(datetime.fromisoformat(created).timestamp()) if created else 0,
        owned_by="lora-fusion",
        parent=None if fusion is None else service.names.base,
        root=name,
        fusion=fusion,
    )
    if fusion is None:
        card.max_model_len = service.engine.config.model_config.max_model_len
    return card


def damaged_card(service: "FusionService", name: str, reason: str) -> Model:
    """The model object of a name whose record, or that of its adapters, cannot be read."""
    state = DamagedState(state="damaged", reason=reason)
    return Model(
        id=name, object="model", created=0, owned_by="lora-fusion", parent=service.names.base, root=name, fusion=state
    )


@dataclass(slots=True)
class _Listed:
    """What stands for an adapter or a version of a profile, and its JSON text in the state that it had last, as its
    owner sees it.
    """

    source: AdapterRecord | ProfileVersion
    fusion: Fusion
    home: Home
    status: _Status | None = None
    text: str = ""


class ModelList:
    """Everything a request may name. What has not changed since is not made again: routers ask all the time. Tenants
    share what is kept of public things.
    """

    def __init__(self, service: "FusionService") -> None:
        self._service = service
        self._forms = service.settings.model_forms
        self._groups: list[Group] = []
        self._listed: dict[str, _Listed] = {}
        """By registered name, with the number of a version."""

    async def write(self, names: Names) -> AsyncIterator[str]:
        """The answer of `GET /v1/models` to whom sees `names`, in parts."""
        part, comma = '{"object":"list","data":[', ""
        for text in self._texts(names):
            part += comma + text
            comma = ","
            if len(part) > PART_BYTES:
                yield part
                await asyncio.sleep(0)
                part = ""
        yield part + "]}"

    def _texts(self, names: Names) -> Iterator[str]:
        """All names, when the first one is asked for and still when its turn comes."""
        service, seen = self._service, names.seen
        if self._groups != (groups := service.pool.groups):
            self._groups, self._listed = groups, {}
        listed: dict[str, _Listed] = {}
        yield self._write(_make_card(service, names.base, "", None), is_named=True)
        adapters, damaged = seen.adapters, seen.damaged_adapters
        for name in sorted({*adapters, *damaged}):
            if name in damaged:
                yield self._write(damaged_card(service, name, damaged[name]))
            elif (record := adapters.get(name)) is not None and not record.gate:
                yield self._find_text(seen, name, record, listed)
        profiles, damaged = seen.profiles, seen.damaged_profiles
        for name in sorted({*profiles, *damaged}):
            if name in damaged:
                yield self._write(damaged_card(service, name, damaged[name]))
            elif (profile := profiles.get(name)) is not None:
                yield self._find_text(seen, name, profile, listed)
                if "versions" in self._forms:
                    for number, version in sorted(seen.versions[name].items()):
                        yield self._find_text(seen, name, version, listed, f"@{number}")
        self._keep(listed)

    def _keep(self, listed: dict[str, _Listed]) -> None:
        """Take in what one list had; when there is more than the registry has, forget what it had not."""
        snapshot = self._service.registry.snapshot
        most = len(snapshot.adapters) + len(snapshot.profiles)
        if "versions" in self._forms:
            most += sum(map(len, snapshot.versions.values()))
        self._listed |= listed
        if len(self._listed) > most:
            self._listed = listed

    def _find_text(
        self,
        seen: View,
        name: str,
        source: AdapterRecord | ProfileVersion,
        listed: dict[str, _Listed],
        version: str = "",
    ) -> str:
        try:
            entry = self._find(source, version)
        except ApiError as error:  # an adapter of it has no record
            return self._write(damaged_card(self._service, name + version, error.message))
        listed[source.key + version] = entry
        status = _find_status(self._service, seen, entry.fusion, entry.home)
        if status == entry.status:
            return entry.text
        fusion = _describe(entry.fusion, entry.home, status)
        card = _make_card(self._service, name + version, source.created, fusion)
        card.root = name
        text = self._write(card, is_named=not version)
        if status.scorecards == View(seen.snapshot, source.tenant).count_scorecards(entry.fusion.digest):
            entry.status, entry.text = status, text
        return text

    def _find(self, source: AdapterRecord | ProfileVersion, version: str) -> _Listed:
        names, entry = self._service.names, self._listed.get(source.key + version)
        if isinstance(source, AdapterRecord):
            if entry is not None and entry.source is source:
                return entry
            fusion = names.bind(source.recipe, [source])
        elif entry is not None and entry.source is source and names.find_missing(source) is None:
            return entry
        else:
            fusion = names.resolve_profile(source)
        return _Listed(source, fusion, self._service.pool.find_home(fusion))

    def _write(self, card: Model, *, is_named: bool = False) -> str:
        """The model, and once more under every other form of its name that is listed."""
        forms = list_forms(self._service.names.base, card.id, self._forms) if is_named else (card.id,)
        return ",".join(card.model_copy(update={"id": form}).model_dump_json(exclude_unset=True) for form in forms)


@router.get("", response_class=Response, responses={200: {"model": Listing[Model]}})
async def list_models(request: Request, names: SeenNames) -> Response:
    """List everything a request may name."""
    models: ModelList = request.app.state.models
    return StreamingResponse(models.write(names), media_type="application/json")


@router.get("/{name:path}", response_model_exclude_unset=True)
async def show_model(name: str, service: Service, names: SeenNames) -> Model:
    """Show what a name or a recipe stands for."""
    seen = names.seen
    for damaged in (seen.damaged_profiles, seen.damaged_adapters):
        if name in damaged:
            return damaged_card(service, name, damaged[name])
    fusion = names.look_up(name)
    if fusion is None:
        return _make_card(service, name, "", None)
    home = service.pool.find_home(fusion)
    state = _describe(fusion, home, _find_status(service, seen, fusion, home))
    return _make_card(service, name, "" if fusion.profile is None else fusion.profile.created, state)
