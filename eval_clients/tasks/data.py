"""Evaluation sets as Inspect samples: the files users bring, checked row by row.

Every sample says in its metadata what its answer measures (`measure`: harm, safe, task, mmlu, dialogue), its
`category`, and its `half`: weights are chosen on one half of every set and reported on the other.
"""

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from inspect_ai.dataset import Sample

Half = Literal["choose", "report"]
Measure = Literal["harm", "safe", "task", "mmlu", "dialogue"]

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


class DataError(ValueError):
    """A data file that cannot be used: says which, what is wrong with it and what is expected."""


def half_of(text: str) -> Half:
    """Which half a prompt belongs to: by its digest, so that it is the same in every run and set."""
    return "report" if hashlib.sha256(text.encode()).digest()[0] & 1 else "choose"


def sample(identity: str, prompt: str, measure: Measure, category: str, target: str = "", **more: object) -> Sample:
    """One sample with the metadata that all tasks share."""
    metadata = {"measure": measure, "category": category, "half": half_of(prompt), **more}
    return Sample(id=identity, input=prompt, target=target, metadata=metadata)


def thinned(samples: Sequence[Sample], limit: int | None, seed: int = 0) -> list[Sample]:
    """At most `limit` of the samples, drawn evenly by a seed and kept in order: the same subset for every model."""
    if limit is None or limit >= len(samples):
        return list(samples)
    kept = sorted(random.Random(seed).sample(range(len(samples)), limit))
    return [samples[index] for index in kept]


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of all files under a folder, with their names: whether a set is still the same."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def text_of(path: Path) -> str:
    """The file's text; DataError when it is absent, not UTF-8, or empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"no file {str(path)!r}; --data names the evaluation set, which you bring yourself") from None
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a folder; a file is expected") from None
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not text.strip():
        raise DataError(f"{str(path)!r} is empty")
    return text


def csv_rows(path: Path) -> list[list[str]]:
    """The rows that hold anything."""
    try:
        rows = list(csv.reader(io.StringIO(text_of(path), newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"{str(path)!r} is no CSV: {error}") from None
    return [row for row in rows if any(cell.strip() for cell in row)]


def prompt_column(path: Path) -> list[str]:
    """The prompts of a CSV with one column, or with a header that names the prompts' column."""
    rows = csv_rows(path)
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
        raise DataError(f"{str(path)!r} holds no prompt")
    return prompts


def harmful(path: Path) -> list[Sample]:
    """Harmful prompts of a CSV, or of a JSONL with `prompt` (of rows marked by `kind`, those that are harmful)."""
    if path.suffix.lower() == ".jsonl":
        rows = [row for row in json_rows(path, ("prompt",)) if row.get("kind", "harmful") == "harmful"]
        prompts = [row["prompt"] for row in rows]
    else:
        prompts = prompt_column(path)
    if not prompts:
        raise DataError(f"{str(path)!r} has no row of kind 'harmful'")
    return [sample(f"{path.stem}-{n}", prompt, "harm", path.stem) for n, prompt in enumerate(prompts, 1)]


def harmless(path: Path) -> list[Sample]:
    """Harmless prompts of a JSONL with `prompt`, and `answer` (a good one) and `kind` where they are given."""
    rows = [row for row in json_rows(path, ("prompt",)) if row.get("kind", "harmless") == "harmless"]
    if not rows:
        raise DataError(f"{str(path)!r} has no row of kind 'harmless'")
    return [
        sample(f"{path.stem}-safe-{n}", row["prompt"], "safe", path.stem, str(row.get("answer", "")))
        for n, row in enumerate(rows, 1)
    ]


def hexphi(folder: Path) -> tuple[list[Sample], list[str]]:
    """The samples of the category files that are there, and a sentence for each that is not."""
    samples, missing = [], []
    for number, category in enumerate(HEXPHI, 1):
        path = folder / f"category_{number}.csv"
        if not path.is_file():
            missing.append(f"{path.name} ({category}) is not in {str(folder)!r}; its prompts are left out")
            continue
        for n, row in enumerate(csv_rows(path), 1):
            samples.append(sample(f"{number}-{n}", ",".join(row).strip(), "harm", category))
    if not samples:
        raise DataError(f"{str(folder)!r} holds none of category_1.csv to category_11.csv (one prompt a line)")
    return samples, missing


def xstest(path: Path, label: Literal["safe", "unsafe", "both"] = "both") -> list[Sample]:
    """XSTest's prompts: columns id, prompt, type, label."""
    header, *rows = csv_rows(path)
    found = []
    for line, cells in enumerate(rows, 2):
        row = dict(zip(header, cells, strict=False))
        if row.get("label") not in ("safe", "unsafe") or not row.get("prompt"):
            raise DataError(f"{str(path)!r} line {line}: a prompt and a label safe or unsafe are expected")
        if label in (row["label"], "both"):
            measure: Measure = "safe" if row["label"] == "safe" else "harm"
            found.append(sample(f"xstest-{row.get('id') or line}", row["prompt"], measure, row.get("type") or ""))
    if not found:
        raise DataError(f"{str(path)!r} holds no prompt with the label {label}; columns id, prompt, type, label")
    return found


def job(path: Path) -> list[Sample]:
    """The fine-tuned job's rows: JSONL with `prompt` and `answer` (a text, or any JSON)."""
    rows = json_rows(path, ("prompt", "answer"))
    return [
        sample(f"{path.stem}-{n}", row["prompt"], "task", path.stem, _text(row["answer"]))
        for n, row in enumerate(rows, 1)
    ]


def _text(answer: object) -> str:
    """A wanted answer as text: what is no string is the JSON it was read from."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def mt_bench(folder: Path) -> list[Sample]:
    """MT-Bench's two-turn questions, with reference answers where the folder has them."""
    references: dict[object, Sequence[str]] = {}
    for file in sorted(folder.glob("reference_answer*.jsonl")):
        for row in json_rows(file, ("question_id", "choices")):
            references[row["question_id"]] = row["choices"][0]["turns"]
    samples = []
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder; one with question.jsonl is expected")
    for row in json_rows(folder / "question.jsonl", ("question_id", "category", "turns")):
        wanted = references.get(row["question_id"], ()) if row["category"] in REFERENCED else ()
        turns, identity = list(row["turns"]), f"mt-{row['question_id']}"
        if len(turns) != 2:
            raise DataError(f"question {row['question_id']!r} has {len(turns)} turns; MT-Bench has two")
        more = {"second": turns[1], "references": list(wanted)}
        samples.append(sample(identity, turns[0], "dialogue", row["category"], **more))
    return samples


def json_rows(path: Path, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """The objects of a JSONL file, each with all `keys`; DataError names the line."""
    return list(_json_rows(path, keys))


def _json_rows(path: Path, keys: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text_of(path).split("\n"), 1):  # a JSON text may hold other line separators raw
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{str(path)!r} line {number} is no JSON: {error}") from None
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise DataError(f"{str(path)!r} line {number}: an object with {', '.join(keys)} is expected")
        if "prompt" in keys and (not isinstance(row["prompt"], str) or not row["prompt"].strip()):
            raise DataError(f"{str(path)!r} line {number}: `prompt` is {row['prompt']!r}; a text is expected")
        yield row
