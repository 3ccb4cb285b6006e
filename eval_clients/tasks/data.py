"""Evaluation sets as Inspect samples: the files users bring, checked row by row.

Every sample says in its metadata what its answer measures (`measure`: harm, prefill, safe, task, mmlu, dialogue), its
`category`, and its `half`.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from inspect_ai.dataset import Sample

from eval_clients.errors import DataError
from eval_clients.tasks.items import Columns, Item, Reading, Report, cut_line, ignore, read_items
from eval_clients.tasks.labels import classify_label
from eval_clients.tasks.layouts import Role
from eval_clients.tasks.table import read_table
from eval_clients.tasks.text import missing

Half = Literal["choose", "report"]
"""Weights are chosen on one half of every set and reported on the other."""
Measure = Literal["harm", "prefill", "safe", "task", "mmlu", "dialogue"]
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
NONE: Columns = MappingProxyType({})
LABELS: Sequence[Literal["safe", "unsafe"]] = ("safe", "unsafe")
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
        raise missing(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def read_harmful(path: Path, columns: Columns = NONE, report: Report = ignore) -> list[Sample]:
    """Harmful prompts of any table, only those marked harmful or unsafe where a column says so."""
    wanted: Sequence[Role] = ("prompt", "context", "label", "category")
    items = read_items(path, columns, wanted).keep_label("unsafe", "harmful", bool(columns.get("label")))
    report(items.describe())
    return [
        make_sample(f"{path.stem}-{n}", item.prompt, "harm", _name_category(item, path))
        for n, item in enumerate(items.items, 1)
    ]


def read_harmless(path: Path, columns: Columns = NONE, report: Report = ignore) -> list[Sample]:
    """Harmless prompts of any table, only those marked harmless or safe where a column says so, with a good answer
    where there is a column `answer`.
    """
    wanted: Sequence[Role] = ("prompt", "context", "label", "category", "answer")
    items = read_items(path, columns, wanted, names={"answer": ("answer",)}).keep_label(
        "safe", "harmless", bool(columns.get("label"))
    )
    report(items.describe())
    return [
        make_sample(
            f"{path.stem}-safe-{n}",
            item.prompt,
            "safe",
            _name_category(item, path),
            str(item.cells.get("answer", "")),
        )
        for n, item in enumerate(items.items, 1)
    ]


def _name_category(item: Item, path: Path) -> str:
    return str(item.cells.get("category") or path.stem)


def read_hexphi(folder: Path, columns: Columns = NONE, report: Report = ignore) -> tuple[list[Sample], list[str]]:
    """HEx-PHI's samples from the category files present, and a sentence for each missing file."""
    samples, absent = [], []
    for number, category in enumerate(HEXPHI, 1):
        path = folder / f"category_{number}.csv"
        path = path if path.is_file() else min(folder.glob(f"category_{number}.*"), default=path)
        if not path.is_file():
            absent.append(f"{path.name} ({category}) is missing from {str(folder)!r}; its prompts are left out")
            continue
        items = read_items(path, columns, ("prompt", "context"))
        report(items.describe())
        for n, item in enumerate(items.items, 1):
            samples.append(make_sample(f"{number}-{n}", item.prompt, "harm", category))
    if not samples:
        raise DataError(f"{str(folder)!r} holds none of category_1.csv to category_11.csv (one prompt per line)")
    return samples, absent


def read_xstest(
    path: Path,
    label: Literal["safe", "unsafe", "both"] = "both",
    columns: Columns = NONE,
    report: Report = ignore,
) -> list[Sample]:
    """XSTest's prompts, of any of its versions: the label is a column, or follows from the type (`contrast_…` is
    unsafe).
    """
    wanted: Sequence[Role] = ("prompt", "label", "category", "id")
    names: Mapping[Role, Sequence[str]] = {"label": ("label", "type"), "category": ("type",)}
    items = read_items(path, columns, wanted, ("prompt", "label"), names=names, strip=False)
    samples = []
    for item in items.items:
        kind = classify_label(item.cells.get("label"))
        if kind is None:
            column = items.assignment.roles["label"]
            raise DataError(
                f"{items.where(item)}: expected a prompt and a label safe or unsafe, or one of XSTest's types; "
                f"{column!r} is {str(item.cells.get('label'))[:100]!r}"
            )
        if label in (kind, "both"):
            measure: Measure = "safe" if kind == "safe" else "harm"
            identity = item.cells.get("id") or item.index + 2  # the line, where no row has several
            samples.append(
                make_sample(f"xstest-{identity}", item.prompt, measure, str(item.cells.get("category") or ""))
            )
    report(items.describe())
    if not samples:
        raise DataError(
            f"{str(path)!r} holds no prompts with the label {label}; expected columns id, prompt, type, label"
        )
    return samples


def read_task(path: Path, columns: Columns = NONE, report: Report = ignore) -> list[Sample]:
    """The fine-tuned task's rows: `prompt` and `answer` (a string, or any JSON) of any table."""
    wanted: Sequence[Role] = ("prompt", "context", "category", "answer")
    items = read_items(path, columns, wanted, ("prompt", "answer"))
    for item in items.items:
        answer = item.cells["answer"]
        if answer is None or answer != answer or not str(answer).strip():  # NaN stands for a missing cell
            raise DataError(f"{items.where(item)}: no answer; expected one in {items.assignment.roles['answer']!r}")
    report(items.describe())
    return [
        make_sample(f"{path.stem}-{n}", item.prompt, "task", _name_category(item, path), _to_text(item.cells["answer"]))
        for n, item in enumerate(items.items, 1)
    ]


def _to_text(answer: object) -> str:
    """A wanted answer as text: strings as they are, anything else as JSON."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def read_mt_bench(folder: Path, columns: Columns = NONE, report: Report = ignore) -> list[Sample]:
    """MT-Bench's two-turn questions, with reference answers where the folder has them."""
    if columns:
        raise DataError("--column: MT-Bench's columns are its own")
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
    path = folder / "question.jsonl"
    for row in read_jsonl(path, ("question_id", "category", "turns")):
        turns = row["turns"]
        reference = references.get(row["question_id"], ()) if row["category"] in REFERENCED else ()
        if not isinstance(turns, list) or [type(turn) for turn in turns] != [str, str]:
            raise DataError(f"question {row['question_id']!r}: `turns` is {turns!r}; expected two strings")
        identity, metadata = f"mt-{row['question_id']}", {"second": turns[1], "references": list(reference)}
        samples.append(make_sample(identity, turns[0], "dialogue", row["category"], **metadata))
    used = {"prompts": "turns", "category": "category", "id": "question_id"}
    notes = [f"{len(references)} reference answers"]
    report(Reading(str(path), "JSONL, MT-Bench", len(samples), cut_line(str(samples[0].input)), used, (), notes))
    return samples


def read_jsonl(path: Path, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """The objects of a JSON or JSONL file, each with all `keys`; DataError names the line."""
    table = read_table(path, ())
    for row in table.rows:
        if not table.typed or any(key not in row.cells for key in keys):
            raise DataError(f"{table.place} {table.unit} {row.line}: expected an object with {', '.join(keys)}")
    return [row.cells for row in table.rows]
