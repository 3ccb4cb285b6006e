"""`/v1/audit`: who changed what, for admins."""

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel, Field

from service.audit import read_entries
from service.routes import Service, make_router
from service.routes.paging import MAX_LIMIT, Limit
from service.routes.schemas import Page

AfterEntry = Annotated[int, Query(ge=0, le=2**31 - 1, description="`last_id` of the part before")]
Order = Annotated[Literal["asc", "desc"], Query(description="`desc`: newest first")]

router = make_router("Audit", "/v1/audit")


class AuditEntry(BaseModel):
    """A change, as the audit has it."""

    id: int
    hash: str = Field(description="SHA-256 of the entry's canonical JSON text, 64 hexadecimal digits")
    entry: dict[str, Any] = Field(
        description="`id`, `previous` (the hash before), `time`, `by`, `action`, `target`, `before`, `after`"
    )


@router.get("")
async def list_entries(
    service: Service, limit: Limit = MAX_LIMIT, after: AfterEntry = 0, order: Order = "asc"
) -> Page[AuditEntry]:
    """List changes, oldest first; `order=desc`: newest first."""
    read = partial(read_entries, after=after, limit=limit + 1, newest=order == "desc")
    rows = await service.registry.transact(read)
    data = [AuditEntry(**row.to_dict()) for row in rows[:limit]]
    last = str(data[-1].id) if data else None
    return Page[AuditEntry](object="list", data=data, last_id=last, has_more=len(rows) > limit)
