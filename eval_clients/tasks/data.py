"""Evaluation sets as Inspect samples: the files users bring, checked row by row.

Every sample says in its metadata what its answer measures (`measure`: harm, safe, task, mmlu, dialogue), its
`category`, and its `half`.
"""

import csv
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from inspect_ai.dataset import Sample

from eval_clients.errors import DataError

Half = Literal["choose", "report"]
"""Weights are chosen on one half of every set and reported on the other."""
Measure = Literal["harm", "safe", "task", "mmlu", "dialogue"]
"""What an answer is evidence of."""

HEXPHI = (
    "illegal activity",
    "child abuse content",
    "hate, harassment, violence",
    "malware",
    "physical harm",
    "economic harm",
    "fraud and deception",
    "adult content",
    "political campaigning",
    "privacy violation",
    "tailored financial advice",
)
"""What `category_1.csv` to `category_11.csv` hold."""
PROMPT_COLUMNS = ("prompt", "goal", "instruction", "question", "text", "behavior")
REFERENCED = ("math", "reasoning", "coding")
"""MT-Bench categories that are judged against a reference answer."""


def assign_half(text: str) -> Half:
    """The half a prompt belongs to: by its digest, so that it is the same in every run and set."""
    return "report" if hashlib.sha256(text.encode()).digest()[0] & 1 else "choose"


def make_sample(
    identity: str, prompt: str, measure: Measure, category: str, target: str = "", **metadata: object
) -> Sample:
    """One sample with the metadata that all tasks share, and more of its own."""
    common = {"measure": measure, "category": category, "half": assign_half(prompt)}
    return Sample(id=identity, input=prompt, target=target, metadata={**common, **metadata})


def draw_subset(samples: Sequence[Sample], limit: int | None, seed: int = 0) -> list[Sample]:
    """At most `limit` of the samples, drawn uniformly by `seed`, in their order: the same subset for every model."""
    if limit is None or limit >= len(samples):
        return list(samples)
    return [samples[index] for index in sorted(random.Random(seed).sample(range(len(samples)), limit))]


def hash_files(path: Path) -> str:
    """SHA-256 (hex) over a file, or over all files under a folder with their names. DataError when absent."""
    if not path.exists():
        raise _missing(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _missing(path: Path) -> DataError:
    return DataError(f"{str(path)!r} does not exist; --data expects the evaluation set, which you provide")


def read_text(path: Path) -> str:
    """The file's text; DataError when it is absent, not UTF-8, or empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise _missing(path) from None
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a folder; expected a file") from None
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not valid UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not text.strip():
        raise DataError(f"{str(path)!r} is empty; expected at least one row")
    return text


def read_csv(path: Path) -> list[list[str]]:
    """The rows of a CSV file that are not blank, at least one."""
    try:
        rows = list(csv.reader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"{str(path)!r} is not valid CSV: {error}") from None
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        raise DataError(f"{str(path)!r} has only blank rows; expected at least one prompt")
    return rows


def read_prompts(path: Path) -> list[str]:
    """The prompts of a CSV with one column, or with a header that names the prompts' column."""
    rows = read_csv(path)
    header = [cell.strip().lower() for cell in rows[0]]
    named = [header.index(name) for name in PROMPT_COLUMNS if name in header]
    if named:
        column, rows = named[0], rows[1:]
    elif all(len(row) == 1 for row in rows):
        column = 0
    else:
        raise DataError(
            f"{str(path)!r} has {len(header)} columns and no header with one of {', '.join(PROMPT_COLUMNS)}"
        )
    prompts = [row[column].strip() for row in rows if len(row) > column and row[column].strip()]
    if not prompts:
        raise DataError(f"{str(path)!r} has no prompts; expected at least one in column {column + 1}")
    return prompts


def read_harmful(path: Path) -> list[Sample]:
    """Harmful prompts of a CSV, or of a JSONL with `prompt` (only rows of kind `harmful` where `kind` is given)."""
    if path.suffix.lower() == ".jsonl":
        rows = [row for row in read_jsonl(path, ("prompt",)) if row.get("kind", "harmful") == "harmful"]
        prompts = [row["prompt"] for row in rows]
    else:
        prompts = read_prompts(path)
    if not prompts:
        raise DataError(f"{str(path)!r} has no rows of kind 'harmful'; expected at least one, or rows without `kind`")
    return [make_sample(f"{path.stem}-{n}", prompt, "harm", path.stem) for n, prompt in enumerate(prompts, 1)]


def read_harmless(path: Path) -> list[Sample]:
    """Harmless prompts of a JSONL with `prompt`, and `answer` (a good one) and `kind` where they are given."""
    rows = [row for row in read_jsonl(path, ("prompt",)) if row.get("kind", "harmless") == "harmless"]
    if not rows:
        raise DataError(f"{str(path)!r} has no rows of kind 'harmless'; expected at least one, or rows without `kind`")
    return [
        make_sample(f"{path.stem}-safe-{n}", row["prompt"], "safe", path.stem, str(row.get("answer", "")))
        for n, row in enumerate(rows, 1)
    ]


def read_hexphi(folder: Path) -> tuple[list[Sample], list[str]]:
    """HEx-PHI's samples from the category files present, and a sentence for each missing file."""
    samples, missing = [], []
    for number, category in enumerate(HEXPHI, 1):
        path = folder / f"category_{number}.csv"
        if not path.is_file():
            missing.append(f"{path.name} ({category}) is missing from {str(folder)!r}; its prompts are left out")
            continue
        for n, row in enumerate(read_csv(path), 1):
            samples.append(make_sample(f"{number}-{n}", ",".join(row).strip(), "harm", category))
    if not samples:
        raise DataError(f"{str(folder)!r} holds none of category_1.csv to category_11.csv (one prompt per line)")
    return samples, missing


def read_xstest(path: Path, label: Literal["safe", "unsafe", "both"] = "both") -> list[Sample]:
    """XSTest's prompts: columns id, prompt, type, label."""
    header, *rows = read_csv(path)
    samples = []
    for line, cells in enumerate(rows, 2):
        row = dict(zip(header, cells, strict=False))
        if row.get("label") not in ("safe", "unsafe") or not row.get("prompt"):
            raise DataError(f"{str(path)!r} line {line}: expected a prompt and a label safe or unsafe")
        if label in (row["label"], "both"):
            measure: Measure = "safe" if row["label"] == "safe" else "harm"
            samples.append(
                make_sample(f"xstest-{row.get('id') or line}", row["prompt"], measure, row.get("type") or "")
            )
    if not samples:
        wanted = "safe or unsafe" if label == "both" else label
        raise DataError(
            f"{str(path)!r} holds no prompts with the label {wanted}; expected columns id, prompt, type, label"
        )
    return samples


def read_task(path: Path) -> list[Sample]:
    """The fine-tuned task's rows: JSONL with `prompt` and `answer` (a string, or any JSON)."""
    rows = read_jsonl(path, ("prompt", "answer"))
    return [
        make_sample(f"{path.stem}-{n}", row["prompt"], "task", path.stem, _to_text(row["answer"]))
        for n, row in enumerate(rows, 1)
    ]


def _to_text(answer: object) -> str:
    """A wanted answer as text: strings as they are, anything else as JSON."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def read_mt_bench(folder: Path) -> list[Sample]:
    """MT-Bench's two-turn questions, with reference answers where the folder has them."""
    references: dict[object, Sequence[str]] = {}
    for file in sorted(folder.glob("reference_answer*.jsonl")):
        for row in read_jsonl(file, ("question_id", "choices")):
            try:
                references[row["question_id"]] = row["choices"][0]["turns"]
            except (KeyError, IndexError, TypeError):
                raise DataError(f"{str(file)!r}: expected choices[0].turns in {row['question_id']!r}") from None
    samples = []
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is not a folder; expected one with question.jsonl")
    for row in read_jsonl(folder / "question.jsonl", ("question_id", "category", "turns")):
        turns = row["turns"]
        reference = references.get(row["question_id"], ()) if row["category"] in REFERENCED else ()
        if not isinstance(turns, list) or [type(turn) for turn in turns] != [str, str]:
            raise DataError(f"question {row['question_id']!r}: `turns` is {turns!r}; expected two strings")
        identity, metadata = f"mt-{row['question_id']}", {"second": turns[1], "references": list(reference)}
        samples.append(make_sample(identity, turns[0], "dialogue", row["category"], **metadata))
    return samples


def read_jsonl(path: Path, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """The objects of a JSONL file, each with all `keys`; DataError names the line."""
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # a JSON text may hold other line separators raw
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{str(path)!r} line {number} is not valid JSON: {error}") from None
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise DataError(f"{str(path)!r} line {number}: expected an object with {', '.join(keys)}")
        if "prompt" in keys and (not isinstance(row["prompt"], str) or not row["prompt"].strip()):
            raise DataError(f"{str(path)!r} line {number}: `prompt` is {row['prompt']!r}; expected a non-empty string")
        rows.append(row)
    return rows
