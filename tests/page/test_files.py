"""The page's files: what is sent with them, what they weigh, and where the libraries are from."""

import gzip
import hashlib
import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from service.front import Front
from service.routes.page import FOLDER, ROUTES, read_files

MAX_BYTES = 300 * 2**10
MAX_LINES = 300
VENDOR = FOLDER / "vendor"
OWN = sorted(path for path in FOLDER.rglob("*") if path.suffix in (".js", ".css", ".html"))


@pytest.fixture
def client() -> TestClient:
    return TestClient(Starlette(routes=ROUTES))


def test_every_file_is_sent_with_rules_that_keep_the_page_to_its_origin(client: TestClient) -> None:
    for path in ("/", *(f"/page/{name}" for name in read_files())):
        answer = client.get(path)
        assert answer.status_code == 200
        policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert policy.pop("script-src").startswith("'self' 'sha256-")
        assert policy.pop("img-src") == "'self' data:"
        assert (policy.pop("style-src"), policy.pop("connect-src")) == ("'self'", "'self'")
        assert set(policy.values()) == {"'none'"}
        assert policy.keys() == {"default-src", "base-uri", "frame-ancestors", "form-action"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_a_file_is_sent_once_to_who_keeps_it(client: TestClient) -> None:
    first = client.get("/page/app.js", headers={"accept-encoding": "gzip"})
    assert first.headers["content-encoding"] == "gzip"
    plain = client.get("/page/app.js", headers={"accept-encoding": "identity"})
    assert first.content == plain.content == (FOLDER / "app.js").read_bytes()
    again = client.get("/page/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.head("/").status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "..%2ffront.py", "tabs/..%2f..%2ffront.py", "tabs", "", "app.js/"])
def test_other_files_are_not_there(client: TestClient, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 404
    assert "error" in answer.json()


def test_the_page_is_there_before_the_engine_is() -> None:
    client = TestClient(Front())
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/page/app.js").status_code == 200
    assert client.get("/v1/models").status_code == 503


def test_the_page_is_small() -> None:
    files = read_files()
    assert sum(len(file.plain) for file in files.values()) <= MAX_BYTES
    assert all(gzip.decompress(file.gzipped) == file.plain for file in files.values())
    large = {path.name: n for path in OWN if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not large


def test_the_libraries_are_what_their_authors_published() -> None:
    rows = re.findall(r"^\| `(\S+)` \| (.+?) \| .*`(\S+\.LICENSE)` \| `([0-9a-f]{64})` \|$", readme(), re.MULTILINE)
    assert {name for name, *_ in rows} == {path.name for path in VENDOR.glob("*.mjs")}
    for name, package, licence, digest in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
        assert re.search(r" \d+\.\d+\.\d+", package)
        assert "Permission is hereby granted" in (text := (VENDOR / licence).read_text()) or "Apache License" in text


def readme() -> str:
    return (VENDOR / "README.md").read_text()


def test_the_page_s_own_code_asks_no_other_site_and_makes_no_code_of_text() -> None:
    for path in OWN:
        text = path.read_text()
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), path.name
        assert not re.findall(r"\beval\(|new Function|innerHTML|dangerouslySetInnerHTML", text), path.name
        assert "localStorage" not in text or path.name == "votes.js", path.name
