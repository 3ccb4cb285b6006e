"""Weights by module, by rank component and by position on a real engine, against transformers in plain code."""

from typing import Any

import numpy as np
import pytest

from tests.service.functions import WIDTHS, Tiny, draw_ids

TOLERANCE = 1e-4
BLOCK = 32
ONE, OTHER, NONE = [0.7, 0.5], [-0.4, 1.2], [0.0, 0.0]

# Block keys as vLLM makes them, and rows of weights for other modules than they are meant for.
BROKEN = """
import sys, importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "service.engine.scheduler":
            import service.engine.block_keys as keys
            keys.install = lambda: None
        if name == "service.engine.worker":
            import service.engine.slices as slices
            number = slices.number_modules
            slices.number_modules = lambda manager, names: number(manager, names[::-1])
        return None
sys.meta_path.insert(0, Finder())
"""


def ask(seed: int, prompt: int, tokens: int, phases: Any = None, **options: Any) -> dict[str, Any]:
    lora = {} if phases is None else {"widths": WIDTHS, "phases": phases}
    return {"ids": draw_ids(seed, prompt), "tokens": tokens, **lora, **options}


def table(tiny: Tiny, seed: int, columns: int) -> Any:
    return np.random.default_rng(seed).uniform(-0.5, 1.5, (len(tiny.modules), columns)).round(3).tolist()


def all_forms(tiny: Tiny) -> list[Any]:
    """Phases of every kind; None is the base."""
    return [
        None,
        [(-1, ONE)],
        [(-1, table(tiny, 1, 2))],  # by module
        [(-1, table(tiny, 2, 6))],  # by module and rank component
        [(-1, np.linspace(-1, 1, 6).tolist())],  # by rank component
        [(-1, ONE), (0, OTHER)],
        [(-1, NONE), (0, ONE)],  # on the answer alone
        [(-1, table(tiny, 3, 2)), (0, table(tiny, 4, 2)), (1, NONE), (5, table(tiny, 5, 6))],
        [(-1, ONE), *((start, [start / 8, 1 - start / 8]) for start in range(7))],  # eight phases
        [(-1, ONE), (300, OTHER)],  # never reached
    ]


def conversation(first: dict[str, Any], answer: list[int]) -> dict[str, Any]:
    """The next turn: the prompt, the answer and more are its prompt."""
    return first | {"ids": [*first["ids"], *answer, *draw_ids(99, 20)]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


FIRST = 70
"""Tokens of the first turn's prompt: two whole blocks."""
TURN = ask(50, FIRST, 40, [(-1, ONE), (0, OTHER)])


@pytest.fixture(scope="module")
def answer(tiny: Tiny) -> list[int]:
    """The answer of the first turn, by the reference."""
    ids = list(TURN["ids"])
    for _ in range(TURN["tokens"]):
        ids.append(tiny.next_token(ids, FIRST, TURN["phases"]))
    return ids[FIRST:]


def test_every_form_is_exact(tiny: Tiny, answer: list[int]) -> None:
    """In one batch, in chunks across the border of prompt and answer, with `n`, preempted, and in the next turn."""
    forms = all_forms(tiny)
    lengths = [1, 5, 31, 64, 65, 100, 127, 150, 40, 33]
    mixed = [ask(i, lengths[i % 10], 9, form, echo=i % 2 == 0) for i, form in enumerate(forms + forms[::-1])]
    many = [ask(30, 40, 8, form, n=3) for form in (forms[7], forms[6])]
    long = [ask(40 + i, 60, 110, form) for i, form in enumerate(forms)]  # more blocks than there are
    shared = [ask(60, 90, 4, form) for form in (None, [(-1, NONE), (0, OTHER)], [(-1, ONE)], [(-1, ONE), (0, OTHER)])]
    turns = [[TURN], [conversation(TURN, answer)]]
    rounds = [mixed, many, long, *([request] for request in shared), *turns]
    out = tiny.serve(rounds, "--num-gpu-blocks-override", "30")
    proof = out["proof"]
    assert (proof["proven"], proof["tables"], proof["phases"], proof["limits"]) == (True, True, True, "")
    assert out["modules"] == tiny.modules
    assert out["preemptions"] > 0
    for requests, results in zip(rounds, out["rounds"], strict=True):
        for request, result in zip(requests, results, strict=True):
            assert tiny.error(request, result) < TOLERANCE, request
    assert out["rounds"][-2][0]["answers"] == [answer]
    cached = [results[0]["cached"] for results in out["rounds"][3:]]
    assert cached[:4] == [0, 2 * BLOCK, 0, 2 * BLOCK], "the prompt of 90 tokens is the base's, and the plain mix's"
    assert cached[4:] == [0, 2 * BLOCK], "the answer's blocks are not the next prompt's"


LENGTHS = (1, 2, 20, 31, 32, 33, 34, 63, 64, 65, 66, 100)
"""Of prompts: around the borders of blocks."""


def test_an_answer_computes_the_last_position_of_a_gates_prompt_alone(tiny: Tiny) -> None:
    """Its own, in a batch with others, also when the memory is short."""
    gate, answer, other = [(-1, NONE), (0, OTHER)], [(-1, NONE), (0, ONE)], [(-1, NONE), (0, OTHER), (3, ONE)]
    rounds = []
    for i, length in enumerate(LENGTHS):
        after: list[Any] = [(answer, {"n": 2}), (other, {}), (answer, {"echo": True}), (None, {}), ([(-1, ONE)], {})]
        batch = [ask(200 + i, length, 6, form, **options) for form, options in after]
        rounds += [[ask(200 + i, length, 1, gate)], batch]
    rounds.append([ask(220 + i, 60, 1, gate) for i in range(8)])
    rounds.append([ask(220 + i, 60, 110, answer) for i in range(8)])  # more blocks than there are
    out = tiny.serve(rounds, "--num-gpu-blocks-override", "30")
    assert out["preemptions"] > 0
    for requests, results in zip(rounds, out["rounds"], strict=True):
        for request, result in zip(requests, results, strict=True):
            assert tiny.error(request, result) < TOLERANCE, request
    for length, results in zip(LENGTHS, out["rounds"][1::2], strict=False):
        whole = (length - 1) // BLOCK * BLOCK
        assert [result["cached"] for result in results] == [length - 1, length - 1, 0, whole, 0]


def test_the_comparison_can_tell_functions_apart(tiny: Tiny) -> None:
    ids = draw_ids(0, 40)
    values = [tiny.log_probabilities(ids, 20, form)[19:] for form in all_forms(tiny)[:-1]]
    for i, one in enumerate(values):
        for other in values[:i]:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 100 * TOLERANCE


def test_without_the_seams_the_next_turn_is_wrong_and_the_proof_says_so(tiny: Tiny, answer: list[int]) -> None:
    second = conversation(TURN, answer)
    out = tiny.serve([[TURN], [second]], site=BROKEN)
    proof = out["proof"]
    assert (proof["proven"], proof["tables"]) == (True, False)
    assert proof["limits"].startswith("by module: weights do not take effect")
    (first,), (following,) = out["rounds"]
    assert tiny.error(TURN, first) < TOLERANCE
    assert following["cached"] == 3 * BLOCK
    assert tiny.error(second, following) > 10 * TOLERANCE
