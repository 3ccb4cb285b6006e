"""The clients against the real service: what is measured is what is served."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from eval_clients.cli import main
from eval_clients.endpoint import Endpoint
from eval_clients.sweeps import search
from eval_clients.sweeps.controls import build_controls
from eval_clients.sweeps.points import Point, expand
from eval_clients.sweeps.random_adapter import register_random_adapter
from eval_clients.tasks.data import hash_files
from eval_clients.tasks.logprobs import echo_logprobs, find_faults, find_letter_tokens, letter_logprobs
from eval_clients.tasks.openings import OPENINGS
from tests.conftest import BASE, BASE_NAME, ROOT, Server

TASK, SAFETY, GATE = "order-job", "safe", "danger"
SAFETY_ROWS = ROOT / "training/builtin/data/safety_heldout.jsonl"


@pytest.fixture(scope="module")
def endpoint(server: Server) -> Iterator[Endpoint]:
    """The shared server with the shipped adapters under names of these tests."""
    with httpx.Client(base_url=server.url, timeout=300) as http:
        for name, folder in ((TASK, "task"), (SAFETY, "safety"), (GATE, "risk")):
            path = ROOT / "examples/adapters" / folder
            assert http.post("/v1/adapters", json={"name": name, "path": str(path)}).is_success
        yield Endpoint(f"{server.url}/v1")
        for name in (TASK, SAFETY, GATE, f"{SAFETY}-random-0"):
            http.delete(f"/v1/adapters/{name}")


def few(path: Path, rows: Path, kinds: dict[str, int]) -> Path:
    """The first rows of each kind."""
    left = dict(kinds)
    with path.open("w") as out:
        for line in rows.read_text().splitlines():
            kind = json.loads(line)["kind"]
            if left.get(kind, 0) > 0:
                left[kind] -= 1
                out.write(line + "\n")
    return path


def orders(path: Path, count: int) -> Path:
    from training.builtin.orders import draw_orders

    rows = [{"prompt": row.prompt, "answer": row.answer} for row in draw_orders(count, split="heldout")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_self_test_passes_here_and_finds_what_is_broken(endpoint: Endpoint) -> None:
    async def check() -> tuple[list[str], list[str]]:
        async with endpoint.client() as client:
            sound = await find_faults(client, BASE_NAME)
            create = client.completions.create

            async def deaf(**request: Any) -> Any:
                request.pop("echo", None)
                return await create(**request)

            client.completions.create = deaf  # type: ignore[method-assign, assignment]  # a deaf endpoint
            return sound, await find_faults(client, BASE_NAME)

    sound, broken = asyncio.run(check())
    assert sound == []
    assert "ignores `echo`" in broken[0]
    assert main(["check", "--base-url", endpoint.base_url]) == 0


def test_letters_are_those_of_the_next_token_and_of_the_echo(endpoint: Endpoint) -> None:
    async def ask() -> None:
        async with endpoint.client() as client:
            forms = await find_letter_tokens(client, BASE_NAME, "ABCD")
            assert set(forms.values()) == {" A", " B", " C", " D"}
            text = "Which is a fruit?\nA. stone\nB. apple\nC. iron\nD. chair\nAnswer:"
            found = await letter_logprobs(client, BASE_NAME, text, forms)
            for letter, value in found.items():
                _, echo = await echo_logprobs(client, BASE_NAME, f"{text} {letter}")
                assert echo[-1] == pytest.approx(value, abs=1e-3)

    asyncio.run(ask())


def test_a_sweep_is_measured_reported_published_and_resumed(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, job = tmp_path / "sweep", orders(tmp_path / "orders.jsonl", 4)
    rows = few(tmp_path / "rows.jsonl", SAFETY_ROWS, {"harmful": 6, "harmless": 4})
    command = ["sweep", "--base-url", endpoint.base_url, "--out", str(out), "--display", "none", "--max-tokens", "16"]
    command += ["--recipe", f"{{1-l}}*{TASK} + {{l}}*{SAFETY}", "--grid", "l=0.3:0.5:0.2", "--safety", SAFETY]
    command += ["--tasks", "harmful_csv,harmless,task", "--data", f"harmful_csv={rows}", "--data", f"harmless={rows}"]
    command += ["--data", f"task={job}", "--limit", "task>=0.1", "--publish"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "best point" in said.out
    assert "scorecards attached" in said.err
    body = json.loads((out / "report.json").read_text())
    lines = {point["model"]: point["all"] for point in body["points"]}
    assert set(lines) == {
        f"0.7*{TASK} + 0.3*{SAFETY}",
        f"0.5*{TASK} + 0.5*{SAFETY}",
        BASE_NAME,
        f"1*{TASK}",
        f"1*{SAFETY}",
        f"0.7*{TASK}",
        f"0.5*{TASK}",
        f"0.7*{TASK} + 0.3*{SAFETY}-random-0",
        f"0.5*{TASK} + 0.5*{SAFETY}-random-0",
    }
    # The adapters answer, and their weights matter: what one was trained for, the base cannot do.
    assert lines[BASE_NAME]["task"]["hits"] == 0
    assert lines[f"1*{TASK}"]["task"]["hits"] >= 2
    assert lines[f"1*{SAFETY}"]["refused"]["hits"] > lines[BASE_NAME]["refused"]["hits"] + 2
    html = (out / "report.html").read_text()
    assert body["verdict"]["best"] in html
    assert html.count("data:image/png") == 2
    assert (out / "pareto.png").is_file()
    plan = endpoint.plan(f"0.5*{SAFETY} + 0.5*{TASK}")
    assert plan.mixed
    cards = endpoint.request("GET", f"/scorecards/{plan.digest}").json()["data"]
    assert cards[-1]["task"]["total"] == 4
    assert cards[-1]["half_report"]["task"]["total"] < 4
    assert cards[-1]["data"] == {"harmful_csv": hash_files(rows), "harmless": hash_files(rows), "task": hash_files(job)}
    assert " sweep --base-url" in cards[-1]["command"]
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    before = len(list((out / "logs").iterdir()))
    assert main([*command, "--resume"]) == 0
    assert len(list((out / "logs").iterdir())) == before
    assert (
        endpoint.request("GET", f"/scorecards/{plan.digest}").json()["data"] == cards
    )  # the same is not attached twice


def test_a_sweep_of_weights_by_position_and_by_prompt_has_its_controls(endpoint: Endpoint, tmp_path: Path) -> None:
    out, rows = tmp_path / "sweep", few(tmp_path / "rows.jsonl", SAFETY_ROWS, {"harmful": 3, "harmless": 3})
    command = ["sweep", "--base-url", endpoint.base_url, "--out", str(out), "--display", "none", "--max-tokens", "8"]
    command += ["--recipe", f"0.7*{TASK} + steps(prompt: {{l}}, 0: 1)*{SAFETY}", "--grid", "l=0.4", "--safety", SAFETY]
    command += ["--recipe", f"answer(0.7*{TASK} + {{l}}*{SAFETY})"]
    command += ["--recipe", f"gate(0.7*{TASK} + {{l}}*{SAFETY}, by={GATE}, {SAFETY} in 0..1)"]
    command += ["--tasks", "harmful_csv,harmless", "--data", f"harmful_csv={rows}", "--data", f"harmless={rows}"]
    assert main(command) == 0
    report = json.loads((out / "report.json").read_text())
    forms = {point["form"] for point in report["points"] if point["kind"] == "sweep"}
    assert forms == {"position", "answer", "gate"}
    assert {"constant gate", "shuffled gate"} <= {point["series"] for point in report["points"]}


def test_the_search_stays_within_its_budget(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "FORMS", search.FORMS[:3])  # the plans of other forms are builds, of seconds each
    out, rows = tmp_path / "search", few(tmp_path / "rows.jsonl", SAFETY_ROWS, {"harmful": 2, "harmless": 2})
    command = ["sweep", "--base-url", endpoint.base_url, "--out", str(out), "--display", "none", "--max-tokens", "8"]
    command += ["--recipe", f"{{1-l}}*{TASK} + {{l}}*{SAFETY}", "--grid", "l=0.4,0.6", "--safety", SAFETY]
    command += ["--tasks", "harmful_csv,harmless", "--data", f"harmful_csv={rows}", "--data", f"harmless={rows}"]
    assert main([*command, "--no-controls", "--search", "14"]) == 0
    points = json.loads((out / "points.json").read_text())
    assert [point["kind"] for point in points].count("search") == 3


def test_mmlu_is_measured_with_shots_dropped_where_the_context_is_short(endpoint: Endpoint, tmp_path: Path) -> None:
    for part, count in (("dev", 5), ("test", 2)):
        folder = tmp_path / "mmlu" / part
        folder.mkdir(parents=True)
        long = "How much is it altogether? " * 70  # six of these are more than the 2048 tokens served
        rows = "".join(f'"{long}{n}",1,2,3,4,{"ABCD"[n % 4]}\n' for n in range(count))
        (folder / f"astronomy_{part}.csv").write_text(rows)
    out = tmp_path / "out"
    command = ["mmlu", "--base-url", endpoint.base_url, "--data", str(tmp_path / "mmlu"), "--display", "none"]
    assert main([*command, "--model", f"1*{TASK}", "--out", str(out)]) == 0
    body = json.loads((out / "results.json").read_text())
    assert [line["mmlu"]["total"] for line in body["models"]] == [2]
    assert body["missing"] == []
    assert set(json.loads((out / "mmlu.json").read_text())[f"1*{TASK}"]["all"]) == {"micro", "macro"}


def test_the_chat_template_is_applied(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Name a colour."}\n')
    command = ["harmless", "--base-url", endpoint.base_url, "--data", str(tmp_path / "p.jsonl"), "--display", "none"]
    assert main([*command, "--out", str(tmp_path / "out"), "--max-tokens", "12"]) == 0
    answer = json.loads((tmp_path / "out/answers.jsonl").read_text())["answer"]
    asked = {"model": BASE_NAME, "max_tokens": 12, "temperature": 0}
    messages = [{"role": "user", "content": "Name a colour."}]
    chat = endpoint.request("POST", "/chat/completions", json=asked | {"messages": messages})
    raw = endpoint.request("POST", "/completions", json=asked | {"prompt": "Name a colour."})
    assert answer == chat.json()["choices"][0]["message"]["content"] != raw.json()["choices"][0]["text"]


def test_the_server_goes_on_with_an_answer_that_the_client_began(endpoint: Endpoint, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    prompt, model = "Name a colour.", f"0.6*{TASK} + 0.4*{SAFETY}"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    command = ["prefill", "--base-url", endpoint.base_url, "--data", str(tmp_path / "p.jsonl"), "--display", "none"]
    assert main([*command, "--out", str(tmp_path / "out"), "--max-tokens", "8", "--model", model]) == 0
    answers = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for answer in answers:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer["opening"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
        assert text.endswith(answer["opening"])
        asked = {"model": model, "prompt": text, "max_tokens": 8, "temperature": 0, "add_special_tokens": False}
        raw = endpoint.request("POST", "/completions", json=asked).json()
        assert raw["choices"][0]["text"] == answer["answer"]
    assert len(answers) == len(OPENINGS)


def test_the_random_control_is_registered_once_and_anew_for_another_adapter(endpoint: Endpoint) -> None:
    name = f"{SAFETY}-random-0"
    assert register_random_adapter(endpoint, SAFETY) == register_random_adapter(endpoint, SAFETY) == name
    mine = endpoint.request("GET", f"/adapters/{name}").json()["digest"]
    assert endpoint.request("DELETE", f"/adapters/{name}").is_success
    stale = {"name": name, "path": str(ROOT / "examples/adapters/task")}  # as from an adapter of that name before
    assert endpoint.request("POST", "/adapters", json=stale).is_success
    assert register_random_adapter(endpoint, SAFETY) == name
    assert endpoint.request("GET", f"/adapters/{name}").json()["digest"] == mine


@pytest.mark.parametrize(
    ("recipe", "alone", "replaced"),
    [
        (f"0.7*{TASK} + 0.3*{SAFETY}", f"0.7*{TASK}", f"0.7*{TASK} + 0.3*{SAFETY}-random-0"),
        (
            f"svd(0.7*{TASK} + 0.3*{SAFETY}, rank=6)",
            f"svd(0.7*{TASK}, rank=6)",
            f"svd(0.7*{TASK} + 0.3*{SAFETY}-random-0, rank=6)",
        ),
        pytest.param(
            f"ties(0.7*{TASK} + 0.3*{SAFETY}, density=0.6)",
            f"ties(0.7*{TASK}, density=0.6)",
            f"ties(0.7*{TASK} + 0.3*{SAFETY}-random-0, density=0.6)",
            marks=pytest.mark.soak,  # three dense builds
        ),
        (
            f"0.7*{TASK} + steps(prompt: 0.4, 0: 1)*{SAFETY}",
            f"0.7*{TASK}",
            f"0.7*{TASK} + steps(prompt: 0.4, 0: 1)*{SAFETY}-random-0",
        ),
        (f"{TASK} + ramp(0.1..0.5)*{SAFETY}", f"1*{TASK}", f"1*{TASK} + ramp(0.1..0.5)*{SAFETY}-random-0"),
        (
            f"safe_merge(0.9*{TASK}, safety={SAFETY}, threshold=0.3)",
            f"0.9*{TASK}",
            f"safe_merge(0.9*{TASK}, safety={SAFETY}-random-0, threshold=0.3)",
        ),
    ],
)
def test_a_recipe_of_any_form_has_controls_that_the_service_accepts(
    endpoint: Endpoint, recipe: str, alone: str, replaced: str
) -> None:
    found, notes = build_controls(endpoint, [Point(recipe, "sweep", "s")], SAFETY)
    assert notes == []
    assert [(point.series, point.model) for point in found] == [
        ("base", BASE_NAME),
        ("single adapter", f"1*{TASK}"),
        ("single adapter", f"1*{SAFETY}"),
        ("safety adapter left out", alone),
        ("random adapter instead", replaced),
    ]
    for point in found[1:]:
        assert endpoint.plan(point.model).digest


def test_a_recipe_that_needs_the_safety_adapter_says_so(endpoint: Endpoint) -> None:
    point = Point(f"slerp(1*{TASK} + 1*{SAFETY}, t=0.3, from={SAFETY})", "sweep", "s")
    found, notes = build_controls(endpoint, [point], SAFETY)
    assert [point.series for point in found] == ["base", "single adapter", "single adapter", "random adapter instead"]
    assert len(notes) == 1
    assert f"is not valid without '{SAFETY}'" in notes[0]


def test_a_sweep_of_one_adapter_has_only_the_base_and_the_adapter_as_controls(endpoint: Endpoint) -> None:
    found, notes = build_controls(endpoint, expand([f"{{l}}*{TASK}"], ["l=1,2"]), SAFETY)
    assert [point.model for point in found] == [BASE_NAME, f"1*{TASK}"]
    assert notes == [f"no point fuses an adapter with '{SAFETY}': only the base and single adapters are controls"]


def test_answers_are_not_those_of_another_adapter_of_that_name(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Name a colour."}\n')
    command = ["harmless", "--base-url", endpoint.base_url, "--data", str(tmp_path / "p.jsonl"), "--display", "none"]
    command += ["--out", str(tmp_path / "out"), "--max-tokens", "4", "--model", "1*retrained"]
    for folder, status in (("task", 0), ("safety", 2)):
        path = str(ROOT / "examples/adapters" / folder)
        assert endpoint.request("POST", "/adapters", json={"name": "retrained", "path": path}).is_success
        try:
            assert main([*command, "--resume"]) == status
        finally:
            assert endpoint.request("DELETE", "/adapters/retrained").is_success
    assert "answers of other adapters under the same names (1*retrained)" in capsys.readouterr().err
