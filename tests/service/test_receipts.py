"""Receipts: what they state, who can check them and how, and that nothing in one can be changed."""

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import jwt
import pytest

from adapters import fusion_digest, parse
from lora_fusion.cli import main
from service.receipt_keys import Key, ReceiptError, make_key, read_key, read_receipt, read_receipt_key
from service.receipts import MAX_RECEIPT, Receipt, Receipts, digest_json
from service.settings import SettingsError
from tests.service.intakes import BASE, Setup, make_setup
from tests.service.policies import make_policy
from tests.service.test_decisions import decisions

SECRET = b"s" * 32


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return make_key(tmp_path / "receipts.pem")


@pytest.fixture
def setup(tmp_path: Path, files: tuple[Path, Path]) -> Setup:
    setup = make_setup(tmp_path)
    registry = setup.names.registry
    policy = make_policy(registry, range=[{"adapter": "a", "at_most": 2}], base={"role": "user"}, name="p")
    setup.intake._policy = policy  # noqa: SLF001 - in the place of another
    key, identity = read_key(files[0]), registry.identity
    setup.intake._receipts = Receipts(key, base=BASE, registry=identity, policy=policy)  # noqa: SLF001 - as above
    return setup


def test_a_receipt_says_what_answered_and_by_which_rules(setup: Setup, files: tuple[Path, Path]) -> None:
    body = json.dumps({"model": "0.5*a + 1*b", "receipt": True, "messages": []}).encode()
    answer = setup.post(body, **{"x-request-id": "my-id"})
    assert json.loads(setup.vllm.bodies[0]).keys() == {"model", "messages"}
    content = read_key(files[1]).verify(answer.headers["x-fusion-receipt"])
    digest = fusion_digest(parse("0.5*a + 1*b"), base=BASE, parents={"a": "a" * 64, "b": "b" * 64})
    assert len(content.pop("id")) == 16
    assert content.pop("time").endswith("+00:00")
    assert content == {
        "version": 1,
        "base": BASE,
        "registry": setup.names.registry.identity,
        "path": "/v1/chat/completions",
        "request": hashlib.sha256(body).hexdigest(),
        "request_id": "my-id",
        "key": "",
        "recipe": "0.5*a + 1*b",
        "digest": digest,
        "parents": {"a": "a" * 64, "b": "b" * 64},
        "profile": None,
        "scorecards": [],
        "policy": {"id": setup.intake._policy.id, "rules": ["range-1"], "exempt": False},  # noqa: SLF001
        "mode": "mixed",
        "rank": 5,
        "error": 0.0,
    }
    assert answer.headers["x-fusion-digest"] == digest


def test_who_does_not_ask_gets_none_and_errors_have_none(setup: Setup) -> None:
    assert "x-fusion-receipt" not in setup.post({"model": "a"}).headers
    assert "x-fusion-receipt" not in setup.post({"model": "a", "receipt": False}).headers
    refused = setup.post({"model": "3*a", "receipt": True})
    assert (refused.status_code, "x-fusion-receipt" in refused.headers) == (403, False)
    wrong = setup.post({"model": "a", "receipt": "yes"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "receipt")


@pytest.mark.parametrize("body", [{"model": BASE}, {}, {"model": BASE, "receipt": True}, {"receipt": True}])
def test_the_base_has_receipts_too(setup: Setup, files: tuple[Path, Path], body: dict[str, Any]) -> None:
    answer = setup.post(body, **{"x-fusion-receipt": "true"})
    content = read_key(files[1]).verify(answer.headers["x-fusion-receipt"])
    assert (content["base"], "digest" in content, content["policy"]["rules"]) == (BASE, False, [])
    assert b"receipt" not in setup.vllm.bodies[0]


def test_a_profile_is_named_with_its_version(setup: Setup, files: tuple[Path, Path]) -> None:
    answer = setup.post({"model": "short", "receipt": True})
    assert read_key(files[1]).verify(answer.headers["x-fusion-receipt"])["profile"] == "short@1"


def test_without_a_key_the_server_says_that_it_signs_none(tmp_path: Path) -> None:
    setup = make_setup(tmp_path)
    answer = setup.post({"model": "a", "receipt": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "receipt")
    assert (setup.vllm.bodies, setup.pool.leased) == ([], 0)


@pytest.mark.anyio
async def test_what_a_gate_chose_is_in_the_receipt(setup: Setup, files: tuple[Path, Path]) -> None:
    made = decisions(parse("gate(0.5*a, by=g, a in 0..1)"))
    await made.begin()(-100, "")
    await made.begin()(None, "it took more than 1 s")
    receipt = Receipt(read_key(files[0]), {"digest": "f"}).sign(made.outcomes())
    assert read_key(files[1]).verify(receipt)["weights"] == [
        {"weights": {"a": 0.0}, "default": ""},
        {"weights": {"a": 0.5}, "default": "it took more than 1 s"},
    ]


def test_what_is_too_long_for_a_header_is_stated_by_its_digest(files: tuple[Path, Path]) -> None:
    content = {"recipe": "x" * 5000, "parents": {"a": "1"}, "digest": "d"}
    receipt = Receipt(read_key(files[0]), dict(content)).sign([])
    assert len(receipt) < MAX_RECEIPT
    read = read_key(files[1]).verify(receipt)
    assert read == {**content, "recipe": {"sha256": digest_json("x" * 5000)}}
    many = [{"weights": {f"adapter-{i}": 0.5 for i in range(60)}, "default": ""}] * 60
    long = {"recipe": "x" * 5000, "parents": {f"adapter-{i}": "1" * 64 for i in range(64)}, "digest": "d"}
    assert len(Receipt(read_key(files[0]), long).sign(many)) < MAX_RECEIPT


@pytest.mark.parametrize("kind", ["EdDSA", "HS256"])
def test_no_character_of_a_receipt_can_be_another(files: tuple[Path, Path], kind: str) -> None:
    key = read_key(files[0]) if kind == "EdDSA" else Key(secret=SECRET)
    receipt = key.sign({"digest": "d" * 64, "recipe": "1*a"})
    assert key.verify(receipt) == {"digest": "d" * 64, "recipe": "1*a"}
    for place in range(len(receipt)):
        other = "A" if receipt[place] != "A" else "B"
        for changed in (receipt[:place] + other + receipt[place + 1 :], receipt[:place] + receipt[place + 1 :]):
            with pytest.raises(ReceiptError):
                key.verify(changed)
    for text in ("", "..", "a.b", f"{receipt}.", f"{receipt}\n", receipt.partition(".")[2]):
        with pytest.raises(ReceiptError):
            key.verify(text)


def test_no_key_verifies_what_another_has_signed(files: tuple[Path, Path], tmp_path: Path) -> None:
    own, other = read_key(files[0]), read_key(make_key(tmp_path / "other.pem")[0])
    public = read_key(files[1])
    with pytest.raises(ReceiptError, match="not by this key"):
        public.verify(other.sign({}))
    forged = Key(secret=files[1].read_bytes().strip()).sign({"digest": "d"})  # the public key as a secret
    with pytest.raises(ReceiptError, match="signed with 'HS256', and this key is for EdDSA"):
        public.verify(forged)
    with pytest.raises(ReceiptError, match="this key is for HS256"):
        Key(secret=SECRET).verify(own.sign({}))
    with pytest.raises(ReceiptError, match="public half"):
        public.sign({})


def test_other_tools_verify_receipts(files: tuple[Path, Path]) -> None:
    receipt = read_key(files[0]).sign({"digest": "d"})
    assert jwt.decode(receipt, files[1].read_text(), algorithms=["EdDSA"]) == {"digest": "d"}
    assert jwt.decode(Key(secret=SECRET).sign({"x": 1}), SECRET, algorithms=["HS256"]) == {"x": 1}
    assert read_receipt(receipt)[0]["kid"] == read_key(files[1]).id


def test_keys_are_made_once_and_for_their_owner_alone(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    assert main(["verify", "--make-key", str(tmp_path / "new.pem")]) == 0
    assert read_key(tmp_path / "new.pem.pub").private is None
    before = files[0].read_bytes()
    assert main(["verify", "--make-key", str(files[0])]) == 2
    assert files[0].read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"short", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"])
def test_a_key_that_cannot_sign_ends_the_start(tmp_path: Path, content: bytes, files: tuple[Path, Path]) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    for file in (path, files[1], tmp_path / "missing"):
        with pytest.raises(SettingsError, match="FUSION_RECEIPT_KEY: "):
            read_receipt_key(str(file))
    path.write_bytes(SECRET + b"\n")
    assert read_receipt_key(str(path)) == Key(secret=SECRET)
    assert read_receipt_key("") is None


def test_the_command_says_what_holds_and_what_does_not(
    setup: Setup, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = b'{"model": "0.5*a + 1*b", "receipt": true}'
    answer = setup.post(body)
    headers, request, policy = tmp_path / "headers", tmp_path / "body", tmp_path / "policy.toml"
    headers.write_text(f"HTTP/1.1 200 OK\r\nX-Fusion-Receipt: {answer.headers['x-fusion-receipt']}\r\n\r\n")
    request.write_bytes(body)
    policy.write_text('name = "p"\nrange = [{adapter = "a", at_most = 2}]\nbase = {role = "user"}\n')

    def verify(*arguments: str) -> tuple[int, str]:
        code = main(["verify", *arguments, "--key", str(files[1])])
        return code, capsys.readouterr().out

    code, out = verify(str(headers), "--request", str(request), "--policy", str(policy))
    assert code == 0, out
    assert [line.split(":")[0].split(None, 1) for line in out.splitlines()] == [
        [what, "holds"] for what in ("signature", "answer", "digest", "weights", "request", "policy")
    ]
    request.write_bytes(body + b" ")
    policy.write_text(policy.read_text().replace("2", "3"))
    code, out = verify(answer.headers["x-fusion-receipt"], "--request", str(request), "--policy", str(policy))
    assert code == 1
    assert "request      does not hold" in out
    assert "policy       does not hold" in out
    code, out = verify(answer.headers["x-fusion-receipt"][:-4] + "AAAA")
    assert (code, out.startswith("signature    does not hold")) == (1, True)
    assert verify(str(tmp_path / "nothing"))[0] == 2


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"recipe": "0.5*a + 2*b"}, "digest       does not hold"),
        ({"parents": {"a": "9" * 64, "b": "b" * 64}}, "digest       does not hold"),
        ({"recipe": "0.5*a + "}, "what it states cannot be read"),
        ({"recipe": "gate(0.5*a, by=b, a in 0..1)", "weights": [{"weights": {"a": 3}}]}, "weights      does not hold"),
    ],
)
def test_what_a_key_signed_must_still_be_consistent(
    files: tuple[Path, Path], change: dict[str, Any], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parents = {"a": "a" * 64, "b": "b" * 64}
    digest = fusion_digest(parse("0.5*a + 1*b"), base=BASE, parents=parents)
    content = {"base": BASE, "recipe": "0.5*a + 1*b", "parents": parents, "digest": digest, **change}
    assert main(["verify", read_key(files[0]).sign(content), "--key", str(files[1])]) == 1
    assert fault in capsys.readouterr().out
