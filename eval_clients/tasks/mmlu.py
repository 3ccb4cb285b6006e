"""MMLU through an endpoint: five shots, and the letter with the highest log-probability after `Answer:`.

The format and the grouping of subjects are those of Hendrycks et al. (ICLR 2021). One request per question: the
four letters' log-probabilities come from the next token's list; a letter missing there is asked for by `echo`.
"""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from inspect_ai.dataset import Sample
from inspect_ai.model import Model, ModelOutput, get_model
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import concurrency
from openai import AsyncOpenAI, BadRequestError

from eval_clients.errors import DataError
from eval_clients.scoring.scorers import high, low
from eval_clients.tasks.data import NONE, make_sample
from eval_clients.tasks.delimited import SEPARATORS, Line, split_lines
from eval_clients.tasks.items import Columns, Reading, Report, cut_line, ignore
from eval_clients.tasks.logprobs import LetterTokens, find_letter_tokens, letter_logprobs
from eval_clients.tasks.text import read_text

LETTERS = "ABCD"
SHOTS = 5
TIMEOUT_S = 600
MAX_IN_FLIGHT = 32
"""Questions in flight; each is a long prompt."""
RETRIES = 4
"""Further attempts of one request after a timeout, 429 or 5xx."""

SUBJECTS: Mapping[str, str] = {
    "physics": "astronomy college_physics conceptual_physics high_school_physics",
    "chemistry": "college_chemistry high_school_chemistry",
    "biology": "college_biology high_school_biology",
    "computer science": "college_computer_science computer_security high_school_computer_science machine_learning",
    "math": "abstract_algebra college_mathematics elementary_mathematics high_school_mathematics"
    " high_school_statistics",
    "engineering": "electrical_engineering",
    "history": "high_school_european_history high_school_us_history high_school_world_history prehistory",
    "philosophy": "formal_logic logical_fallacies moral_disputes moral_scenarios philosophy world_religions",
    "law": "international_law jurisprudence professional_law",
    "politics": "high_school_government_and_politics public_relations security_studies us_foreign_policy",
    "culture": "human_sexuality sociology",
    "economics": "econometrics high_school_macroeconomics high_school_microeconomics",
    "geography": "high_school_geography",
    "psychology": "high_school_psychology professional_psychology",
    "other": "global_facts miscellaneous professional_accounting",
    "business": "business_ethics management marketing",
    "health": "anatomy clinical_knowledge college_medicine human_aging medical_genetics nutrition"
    " professional_medicine virology",
}
"""The subjects of each of the 17 sub-categories."""
CATEGORIES: Mapping[str, Sequence[str]] = {
    "STEM": ("physics", "chemistry", "biology", "computer science", "math", "engineering"),
    "humanities": ("history", "philosophy", "law"),
    "social sciences": ("politics", "culture", "economics", "geography", "psychology"),
    "other (business, health, misc.)": ("other", "business", "health"),
}
SUBCATEGORY = {subject: name for name, subjects in SUBJECTS.items() for subject in subjects.split()}
CATEGORY = {name: category for category, names in CATEGORIES.items() for name in names}


def format_question(row: Sequence[str]) -> str:
    """A question with its options, up to `Answer:`."""
    options = "".join(f"\n{letter}. {option.strip()}" for letter, option in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0].strip()}{options}\nAnswer:"


def prompt_parts(subject: str, shots: Sequence[Sequence[str]], row: Sequence[str]) -> list[str]:
    """The header, each shot with its answer, and the question; joined by blank lines they are the prompt."""
    header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
    return [header, *(f"{format_question(shot)} {shot[5].strip()}" for shot in shots), format_question(row)]


def read_rows(path: Path) -> list[list[str]]:
    """Rows of question, four options and letter, split by the first separator that makes them so; DataError names the
    first invalid row.
    """
    text = read_text(path)
    for sign in ",", *SEPARATORS:
        rows = split_lines(text, sign)
        if all(map(_is_question, rows)):
            return [list(row.cells) for row in rows]
    line = next(row for row in split_lines(text, ",") if not _is_question(row))
    raise DataError(f"{str(path)!r} line {line.number}: expected a question, four options and a letter A to D")


def _is_question(row: Line) -> bool:
    return len(row.cells) == 6 and row.cells[5].strip() in tuple(LETTERS)


def read_questions(
    folder: Path,
    limit: int | None = None,
    seed: int = 0,
    shots: int = SHOTS,
    columns: Columns = NONE,
    report: Report = ignore,
) -> list[Sample]:
    """Samples from `test/*_test.csv`, with the subject's first `shots` rows of `dev/*_dev.csv`.

    With `limit`, so many questions are drawn uniformly over all by `seed`; metadata holds the prompt's `parts`.
    """
    if columns:
        raise DataError("--column: MMLU's columns are a question, four options and a letter")
    files = sorted((folder / "test").glob("*_test.csv"))
    if not files:
        raise DataError(f"{str(folder)!r} holds no test/*_test.csv; expected MMLU in Hendrycks' layout")
    questions = []
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        if subject not in SUBCATEGORY:
            raise DataError(f"{str(file)!r}: {subject!r} is not an MMLU subject; expected Hendrycks' file names")
        examples = read_rows(folder / "dev" / f"{subject}_dev.csv")[:shots]
        for number, row in enumerate(read_rows(file)):
            questions.append((subject, number, row, examples))
    if limit is not None and limit < len(questions):
        questions = [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), limit))]
    samples = []
    for subject, number, row, examples in questions:
        metadata = {
            "parts": prompt_parts(subject, examples, row),
            "subcategory": SUBCATEGORY[subject],
            "group": CATEGORY[SUBCATEGORY[subject]],
        }
        identity, text, target = f"{subject}-{number}", format_question(row), row[5].strip()
        samples.append(make_sample(identity, text, "mmlu", subject, target, **metadata))
    used = {"question": "1", "options": "2 to 5", "answer": "6"}
    kind = f"MMLU, {len(files)} subjects"
    report(Reading(str(folder), kind, len(samples), cut_line(questions[0][2][0]), used))
    return samples


@solver
def choose() -> Solver:
    """Answers with the likeliest letter. Where the context is too short, shots are dropped, the last one first."""
    tokens: dict[str, LetterTokens] = {}
    clients: dict[str, AsyncOpenAI] = {}

    def open_client(model: Model) -> AsyncOpenAI:
        url = str(model.api.base_url)
        if url not in clients:
            timeout = model.config.attempt_timeout
            clients[url] = AsyncOpenAI(
                base_url=url, api_key=model.api.api_key, max_retries=RETRIES, timeout=timeout or TIMEOUT_S
            )
        return clients[url]

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        model = get_model()
        name, client = model.api.model_name.split("/", 1)[1], open_client(model)
        header, *shots, question = state.metadata["parts"]
        async with concurrency("mmlu", MAX_IN_FLIGHT):
            if name not in tokens:
                tokens[name] = await find_letter_tokens(client, name, LETTERS)
            while True:
                try:
                    prompt = "\n\n".join([header, *shots, question])
                    logprobs = await letter_logprobs(client, name, prompt, tokens[name])
                    break
                except BadRequestError as error:
                    if not shots or "context" not in str(error):
                        raise
                    shots.pop()
        state.output = ModelOutput.from_content(name, max(logprobs, key=lambda letter: logprobs[letter]))
        state.metadata.update(logprobs=logprobs, shots=len(shots))
        return state

    return solve


@scorer(metrics={"*": [mean(), low(), high()]})
def letter() -> Scorer:
    """1 for the right letter, else 0; `margin` in the metadata is the distance of the two likeliest (nats)."""

    async def score(state: TaskState, target: Target) -> Score:
        best, second = sorted(state.metadata["logprobs"].values(), reverse=True)[:2]
        answer = state.output.completion
        metadata = {"margin": best - second if math.isfinite(second) else None, "shots": state.metadata["shots"]}
        return Score(value={"exact": float(answer == target.text)}, answer=answer, metadata=metadata)

    return score


def average_groups(exact: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Accuracy by subject, sub-category and category from each subject's scores, and over all.

    `all` holds `micro` (mean over questions) and `macro` (mean over subjects).
    """
    groups: dict[str, dict[str, list[float]]] = {"subjects": {}, "subcategories": {}, "categories": {}}
    for subject, scores in exact.items():
        name = SUBCATEGORY[subject]
        for level, key in (("subjects", subject), ("subcategories", name), ("categories", CATEGORY[name])):
            groups[level].setdefault(key, []).extend(scores)
    means = {level: {key: fmean(scores) for key, scores in parts.items()} for level, parts in groups.items()}
    everything = [score for scores in exact.values() for score in scores]
    return {"all": {"micro": fmean(everything), "macro": fmean(means["subjects"].values())}, **means}
