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
from service.resolve import Fusion
from service.routes import Service, make_router
from service.routes.schemas import DamagedState, FusionState, Listing, Model

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


def _find_status(service: "FusionService", fusion: Fusion, home: Home) -> _Status:
    state, reason = service.pool.home_state(home)
    damage = service.materializer.damage
    if state != "warm" and damage and (damaged := next((digest for digest in fusion.ranks if digest in damage), None)):
        state, reason = "damaged", f"the stored files of an adapter: {damage[damaged]}"
    return _Status(state, reason, service.registry.snapshot.scorecard_counts.get(fusion.digest, 0))


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
    """What stands for an adapter or a version of a profile, and its JSON text in the state that it had last."""

    source: AdapterRecord | ProfileVersion
    fusion: Fusion
    home: Home
    status: _Status | None = None
    text: str = ""


class ModelList:
    """Everything a request may name. What has not changed since is not made again: routers ask all the time."""

    def __init__(self, service: "FusionService") -> None:
        self._service = service
        self._forms = service.settings.model_forms
        self._groups: list[Group] = []
        self._listed: dict[str, _Listed] = {}

    async def write(self) -> AsyncIterator[str]:
        """The answer of `GET /v1/models`, in parts."""
        part, comma = '{"object":"list","data":[', ""
        for text in self._texts():
            part += comma + text
            comma = ","
            if len(part) > PART_BYTES:
                yield part
                await asyncio.sleep(0)
                part = ""
        yield part + "]}"

    def _texts(self) -> Iterator[str]:
        """All names, when the first one is asked for and still when its turn comes."""
        service, snapshot = self._service, self._service.registry.snapshot
        if self._groups != (groups := service.pool.groups):
            self._groups, self._listed = groups, {}
        listed: dict[str, _Listed] = {}
        yield self._write(_make_card(service, service.names.base, "", None), is_named=True)
        for name in sorted({*snapshot.adapters, *snapshot.damaged_adapters}):
            if name in snapshot.damaged_adapters:
                yield self._write(damaged_card(service, name, snapshot.damaged_adapters[name]))
            elif (record := snapshot.adapters.get(name)) is not None and not record.gate:
                yield self._find_text(name, name, record, listed)
        for name in sorted({*snapshot.profiles, *snapshot.damaged_profiles}):
            if name in snapshot.damaged_profiles:
                yield self._write(damaged_card(service, name, snapshot.damaged_profiles[name]))
            elif (profile := snapshot.profiles.get(name)) is not None:
                yield self._find_text(name, name, profile, listed)
                if "versions" in self._forms:
                    for number, version in sorted(snapshot.versions[name].items()):
                        yield self._find_text(f"{name}@{number}", name, version, listed)
        self._listed = listed

    def _find_text(
        self, name: str, root: str, source: AdapterRecord | ProfileVersion, listed: dict[str, _Listed]
    ) -> str:
        try:
            entry = self._find(name, source)
        except ApiError as error:  # an adapter of it has no record
            return self._write(damaged_card(self._service, name, error.message))
        listed[name] = entry
        status = _find_status(self._service, entry.fusion, entry.home)
        if status != entry.status:
            card = _make_card(self._service, name, source.created, _describe(entry.fusion, entry.home, status))
            card.root = root
            entry.status, entry.text = status, self._write(card, is_named=name == root)
        return entry.text

    def _find(self, name: str, source: AdapterRecord | ProfileVersion) -> _Listed:
        names, entry = self._service.names, self._listed.get(name)
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
async def list_models(request: Request) -> Response:
    """List everything a request may name."""
    models: ModelList = request.app.state.models
    return StreamingResponse(models.write(), media_type="application/json")


@router.get("/{name:path}", response_model_exclude_unset=True)
async def show_model(name: str, service: Service) -> Model:
    """Show what a name or a recipe stands for."""
    snapshot = service.registry.snapshot
    for damaged in (snapshot.damaged_profiles, snapshot.damaged_adapters):
        if name in damaged:
            return damaged_card(service, name, damaged[name])
    fusion = service.names.look_up(name)
    if fusion is None:
        return _make_card(service, name, "", None)
    home = service.pool.find_home(fusion)
    state = _describe(fusion, home, _find_status(service, fusion, home))
    return _make_card(service, name, "" if fusion.profile is None else fusion.profile.created, state)
