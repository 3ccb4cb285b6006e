"""`/v1/keys`: API keys, for admins."""

from typing import Annotated

from fastapi import Path

from service.key_cards import Key, KeyBody, NewKey, RotateBody, list_all, make, rotate
from service.routes import Service, make_router
from service.routes.paging import MAX_LIMIT, After, Limit, page_names
from service.routes.schemas import Page

KeyPath = Annotated[str, Path(pattern="^[0-9a-f]{12}$", description="public id of a key")]

router = make_router("Keys", "/v1/keys")


@router.get("")
async def list_keys(service: Service, limit: Limit = MAX_LIMIT, after: After = "") -> Page[Key]:
    """List keys by id, those included that are not taken any more."""
    cards = {card.id: card for card in await list_all(service.keys)}
    ids, has_more = page_names(cards, limit, after)
    data = [cards[id_] for id_ in ids]
    return Page[Key](object="list", data=data, last_id=ids[-1] if ids else None, has_more=has_more)


@router.post("", status_code=201)
async def create_key(body: KeyBody, service: Service) -> NewKey:
    """Make a key; its secret is shown in this answer alone. The first one must be an admin's."""
    return await make(service.keys, body)


@router.post("/{key_id}/rotate")
async def rotate_key(key_id: KeyPath, service: Service, body: RotateBody | None = None) -> NewKey:
    """Give a key a new secret, shown in this answer alone; the old one is taken for `grace` more."""
    return await rotate(service.keys, key_id, body or RotateBody())


@router.delete("/{key_id}", status_code=204)
async def revoke_key(key_id: KeyPath, service: Service) -> None:
    """End a key at once, for the requests that are still to come; it stays in the list."""
    await service.keys.revoke(key_id)
