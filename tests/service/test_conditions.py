"""`If-Match` and `If-None-Match`: of writers at the same time one wins, and the others are told."""

import asyncio

import pytest

from tests.service.tenancy import ACME, GLOBEX, Tenancy, add, put, stocked as stocked

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


async def test_of_two_writers_with_one_tag_one_wins(stocked: Tenancy) -> None:
    path = "/v1/fusions/both"
    tag = (await stocked.client(ACME).get(path)).headers["etag"]
    goes_on = stocked.shop.engine.hold()
    writing = [
        asyncio.create_task(put(stocked, ACME, "both", f"{weight}*own", headers={"if-match": tag}))
        for weight in (0.1, 0.2, 0.3, 0.4)
    ]
    await asyncio.sleep(0.2)
    goes_on.set()
    answers = await asyncio.gather(*writing)
    assert sorted(answer.status_code for answer in answers) == [200, 412, 412, 412]
    (winner,) = [answer for answer in answers if answer.status_code == 200]
    late = next(answer for answer in answers if answer.status_code == 412)
    error = late.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("PreconditionFailedError", 412, "If-Match")
    now_tag = (await stocked.client(ACME).get(path)).headers["etag"]
    assert winner.headers["etag"] == now_tag != tag
    assert now_tag in error["message"], "it says what to read again"
    assert (await stocked.client(ACME).get(path)).json()["versions"] == [1, 2]


async def test_of_two_creators_one_wins(stocked: Tenancy) -> None:
    only_new = {"if-none-match": "*"}
    goes_on = stocked.shop.engine.hold()
    profiles = [put(stocked, ACME, "fresh", f"{weight}*own + 1*wide", headers=only_new) for weight in (0.1, 0.2, 0.3)]
    adapters = [add(stocked, ACME, "added", folder, headers=only_new) for folder in ("third", "fourth")]
    tasks = [asyncio.create_task(change) for change in (*profiles, *adapters)]
    await asyncio.sleep(0.2)
    goes_on.set()
    statuses = [answer.status_code for answer in await asyncio.gather(*tasks)]
    assert (sorted(statuses[:3]), sorted(statuses[3:])) == ([201, 412, 412], [201, 412])
    again = await add(stocked, ACME, "added", "third", headers=only_new)
    assert (again.status_code, again.json()["error"]["param"]) == (412, "If-None-Match")
    assert (await put(stocked, GLOBEX, "fresh", "1*own", headers=only_new)).status_code == 201, "another's name is free"


async def test_a_stale_tag_changes_nothing(stocked: Tenancy) -> None:
    client, other = stocked.client(ACME), {"if-match": '"0000"'}
    adapter, profile = "/v1/adapters/own", "/v1/fusions/both"
    refused = [
        await client.delete(profile, headers=other),
        await client.delete(adapter, headers=other),
        await client.post(f"{profile}/rollback", json={"version": 1}, headers=other),
        await put(stocked, ACME, "both", "1*own", headers=other),
        await put(stocked, ACME, "missing", "1*own", headers={"if-match": "*"}),
        await add(stocked, ACME, "own", "fourth", body={"replace": True}, headers=other),
    ]
    assert [answer.status_code for answer in refused] == [412] * 6
    for wrong in ("0000", '"a', "W/0", '*, "a"'):
        answer = await client.delete(profile, headers={"if-match": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "If-Match")
    tag = (await client.get(adapter)).headers["etag"]
    assert (await client.delete(adapter, headers={"if-match": f"W/{tag}"})).status_code == 412, "no weak tag is strong"
    known = {"if-none-match": f'"x", W/{tag}'}
    assert (await client.delete(adapter, headers=known)).status_code == 412, "but this is compared weakly"
    replaced = await add(stocked, ACME, "own", "fourth", body={"replace": True}, headers={"if-match": f'"x", {tag}'})
    assert (replaced.status_code, replaced.headers["etag"] != tag) == (200, True)
    for path in (profile, adapter):
        tag = (await client.get(path)).headers["etag"]
        assert (await client.delete(path, headers={"if-match": tag})).status_code == 204


async def test_a_tag_is_of_one_state(stocked: Tenancy) -> None:
    client, path = stocked.client(ACME, "deployer"), "/v1/fusions/both"
    tags = [(await client.get(path)).headers["etag"], (await client.get(f"{path}@1")).headers["etag"]]
    assert tags[0] == tags[1]
    await put(stocked, ACME, "both", "1*own")
    await client.post(f"{path}/rollback", json={"version": 1})
    tags.append((await client.get(path)).headers["etag"])
    await client.delete(path)
    await put(stocked, ACME, "both", "0.25*own + 0.5*wide", {"system": "another", "temperature": 0.5})
    tags.append((await client.get(path)).headers["etag"])
    assert len(set(tags)) == 3, "version 1 has another tag when there is a second, and when it is made anew"
