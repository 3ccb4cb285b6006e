"""The digest of a fusion."""

import dataclasses

import pytest

from adapters import METHODS, UnknownAdapterError, fusion_digest, parse

PARENTS = {"a": "11" * 32, "b": "22" * 32}


def test_the_digest_is_the_same_for_all_spellings_and_names() -> None:
    digest = fusion_digest(parse("0.6*a + 0.4*b"), base="m", parents=PARENTS)
    assert len(digest) == 64
    assert int(digest, 16) >= 0
    assert digest == fusion_digest(parse("sum(4e-1*b+.6*a)"), base="m", parents=PARENTS)
    renamed = {"z": PARENTS["a"], "k": PARENTS["b"]}
    assert digest == fusion_digest(parse("0.6*z + 0.4*k"), base="m", parents=renamed)


def test_the_digest_tells_different_fusions_apart() -> None:
    cases = [
        (text, base, parents)
        for text in ("0.6*a + 0.4*b", "0.4*a + 0.6*b", "0.6*a", "0.6*a + 0*b", "svd(0.6*a + 0.4*b, rank=2)")
        for base in ("m", "n")
        for parents in (PARENTS, {"a": "33" * 32, "b": "22" * 32})
    ]
    cases.append(("svd(0.6*a + 0.4*b, rank=3)", "m", PARENTS))
    twins = {"a": "33" * 32, "b": "33" * 32}  # one content under two names: from which one it goes still matters
    cases += [(f"slerp(1*a + 2*b, t=0.3, from={name})", "m", twins) for name in "ab"]
    digests = {fusion_digest(parse(text), base=base, parents=parents) for text, base, parents in cases}
    assert len(digests) == len(cases)


def test_a_new_version_of_a_method_is_a_new_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fusion_digest(parse("a"), base="m", parents=PARENTS)
    newer = {**METHODS, "sum": dataclasses.replace(METHODS["sum"], version=METHODS["sum"].version + 1)}
    monkeypatch.setattr("adapters.recipes.digest.METHODS", newer)
    assert fusion_digest(parse("a"), base="m", parents=PARENTS) != before


def test_the_digest_needs_every_parent() -> None:
    with pytest.raises(UnknownAdapterError) as caught:
        fusion_digest(parse("taks"), base="m", parents={"task": "11" * 32})
    assert (caught.value.name, caught.value.nearest) == ("taks", "task")
