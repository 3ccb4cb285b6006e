"""Our MMLU against lm-eval's own, through the same endpoint: `python -m benchmarks.mmlu_agreement --data DIR`.

DIR is MMLU in Hendrycks' layout. lm-eval (`local-completions`, a local task file over the same rows, the same first
five dev shots) asks for every option's log-likelihood by `echo`; ours takes the four letters from one next-token list.
Same service, float32. Choices whose two likeliest letters are closer than 1e-4 count as ties, apart.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import BASE, BASE_NAME, RESULTS, machine, stamp
from benchmarks.servers import ours
from eval_clients.answers import read_answers
from eval_clients.endpoint import Endpoint
from eval_clients.running import RunOptions, prepare_folder, run_tasks
from eval_clients.tasks import benchmarks as tasks, mmlu

ENGINE = ["--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "32"]
TIE = 1e-4
AIM = 0.99

TASK = """\
task: mmlu_here
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{{{target}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""


def theirs(url: str, questions: list[dict[str, Any]], scratch: Path) -> list[list[float]]:
    """lm-eval's four log-likelihoods of each question."""
    rows = scratch / "rows.json"
    rows.write_text(json.dumps(questions))
    folder = scratch / "task"
    folder.mkdir()
    (folder / "mmlu_here.yaml").write_text(TASK.format(rows=rows))
    model = f"model={BASE_NAME},base_url={url}/v1/completions,tokenizer={BASE},num_concurrent=16,max_length=4096"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model]
    command += ["--tasks", "mmlu_here", "--include_path", str(folder), "--output_path", str(scratch / "out")]
    subprocess.run([*command, "--log_samples", "--batch_size", "1"], check=True, cwd=scratch)
    (samples,) = (scratch / "out").rglob("samples_*.jsonl")
    lines = samples.read_text().rstrip("\n").split("\n")  # not splitlines: questions hold other line ends too
    records = sorted(map(json.loads, lines), key=lambda row: int(row["doc_id"]))
    return [[float(answer[0]) for answer in row["filtered_resps"]] for row in records]


def mine(url: str, data: Path, limit: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Our four log-probabilities by question."""
    from inspect_ai.log import list_eval_logs, read_eval_log

    folder = scratch / "ours"
    prepare_folder(folder, resume=False)
    options = RunOptions(display="plain")
    run_tasks([tasks.mmlu(str(data), limit)], Endpoint(f"{url}/v1"), [BASE_NAME], folder, options)
    assert not read_answers(folder).missing
    (log,) = list_eval_logs(str(folder / "logs"))
    return {str(sample.id): sample.metadata["logprobs"] for sample in read_eval_log(log.name).samples or []}


def main() -> int:
    """Command line; 0 when the aim is met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mmlu_agreement", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300)
    args = parser.parse_args()
    samples = mmlu.read_questions(args.data, args.limit)
    questions = [
        {"text": "\n\n".join((sample.metadata or {})["parts"]), "target": "ABCD".index(str(sample.target))}
        for sample in samples
    ]
    with tempfile.TemporaryDirectory() as place, ours(ENGINE, Path(place)) as server:
        our_logprobs = mine(server.url, args.data, args.limit, Path(place))
        their_logprobs = theirs(server.url, questions, Path(place))
    same = ties = 0
    largest = 0.0
    for sample, other in zip(samples, their_logprobs, strict=True):
        here = [our_logprobs[str(sample.id)][letter] for letter in "ABCD"]
        largest = max(largest, *(abs(a - b) for a, b in zip(here, other, strict=True)))
        best, second = sorted(here, reverse=True)[:2]
        if best - second < TIE:
            ties += 1
        else:
            same += here.index(best) == other.index(max(other))
    counted = len(samples) - ties
    body = {
        **stamp("python -m benchmarks.mmlu_agreement"),
        "machine": machine(),
        "subjects": dict(Counter(str((sample.metadata or {})["category"]) for sample in samples)),
        "questions": len(samples),
        "ties": ties,
        "same_choice": same / counted,
        "aim": AIM,
        "largest_difference_nats": largest,
    }
    (RESULTS / "mmlu-agreement.json").write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))
    return 0 if same / counted >= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
