"""Folders of runs, and how requests are sent."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from eval_clients.answers import read_answers
from eval_clients.endpoint import Endpoint
from eval_clients.errors import EndpointError, FolderError, RunError
from eval_clients.running import RunOptions, _require, check_fusions, prepare_folder, resolve_judge, run_tasks
from eval_clients.tasks.benchmarks import build_task
from tests.eval_clients.faulty import Faulty, endpoint


def finish(folder: Path) -> None:
    (folder / "logs/one.eval").write_text("x")


def test_a_folder_without_results_may_be_prepared_anew_for_another_run(tmp_path: Path) -> None:
    prepare_folder(tmp_path, False, {"tasks": "a"})
    prepare_folder(tmp_path, False, {"tasks": "b"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"tasks": "b"}


def test_results_are_resumed_by_the_same_run_only(tmp_path: Path) -> None:
    run = {"tasks": "a", "content": {"a": "1"}, "path": Path("x")}
    prepare_folder(tmp_path, False, run)
    finish(tmp_path)
    with pytest.raises(FolderError, match="--resume"):
        prepare_folder(tmp_path, False, run)
    prepare_folder(tmp_path, True, run)
    with pytest.raises(FolderError, match=r"\(content, tasks differ\)"):
        prepare_folder(tmp_path, True, {"tasks": "b", "content": {"a": "2"}, "path": "x"})
    assert json.loads((tmp_path / "run.json").read_text())["tasks"] == "a"


def test_options_added_since_do_not_stop_a_resumed_run_but_new_questions_do(tmp_path: Path) -> None:
    prepare_folder(tmp_path, False, {"tasks": "a", "dropped": 1})
    finish(tmp_path)
    prepare_folder(tmp_path, True, {"tasks": "a", "added": None})
    with pytest.raises(FolderError, match=r"\(added differ\)"):
        prepare_folder(tmp_path, True, {"tasks": "a", "added": 2})


def test_a_name_keeps_the_fusion_it_was_first_measured_with(tmp_path: Path) -> None:
    check_fusions(tmp_path / "new", {"a": "1"})
    check_fusions(tmp_path / "new", {"a": "1", "b": "2"})
    with pytest.raises(FolderError, match=r"other adapters under the same names \(b\)"):
        check_fusions(tmp_path / "new", {"b": "3", "c": "4"})
    assert json.loads((tmp_path / "new/fusions.json").read_text()) == {"a": "1", "b": "2"}


def test_an_unknown_judge_is_named_with_the_next_step() -> None:
    with pytest.raises(EndpointError, match=r"judge 'nobody/knows'.*--judge-url"):
        resolve_judge("nobody/knows", None)


def test_a_private_name_that_inspect_drops_is_reported_with_its_version() -> None:
    with pytest.raises(ImportError, match=r"inspect-ai \d+\.\d+.* has no inspect_ai\._util\.error\.Nothing"):
        _require("inspect_ai._util.error", "Nothing")


def prompts(folder: Path, count: int) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Sharpen blade {n}"}) + "\n" for n in range(count)))
    return str(path)


def test_all_models_share_the_limit_of_requests_in_flight(tmp_path: Path) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def say(body: dict[str, Any]) -> str:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return "Sharpen the blade."

    prepare_folder(tmp_path, False)
    options = RunOptions(in_flight=3, display="none")
    with endpoint(Faulty(say)) as served:
        task = build_task("harmless", prompts(tmp_path, 8))
        assert run_tasks([task], Endpoint(served.url), ["base", "1*a"], tmp_path, options)
    assert 2 <= most[0] <= 3
    assert len(read_answers(tmp_path).items) == 16


def test_seeds_differ_in_the_seed_that_is_sent_and_a_rerun_sends_the_same(tmp_path: Path) -> None:
    sent = []
    for name in ("first", "second"):
        folder = tmp_path / name
        prepare_folder(folder, False)
        options = RunOptions(seeds=3, display="none")
        with endpoint(Faulty(lambda body: "Sharpen the blade.")) as served:
            task = build_task("harmless", prompts(tmp_path, 2), temperature=0.7)
            assert run_tasks([task], Endpoint(served.url), ["base"], folder, options)
            sent.append(sorted((body["messages"][-1]["content"], body["seed"]) for body in served.bodies))
        assert {answer.seed for answer in read_answers(folder).items} == {1, 2, 3}
    assert sent[0] == sent[1]
    assert [seed for _, seed in sent[0]] == [1, 2, 3] * 2


def test_a_run_that_inspect_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    prepare_folder(tmp_path, False)
    task = build_task("harmless", prompts(tmp_path, 1))
    with pytest.raises(RunError, match="Inspect cannot start the run"):
        run_tasks([task, task], Endpoint("http://127.0.0.1:9/v1"), ["base"], tmp_path, RunOptions(display="none"))
