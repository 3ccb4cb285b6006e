"""The benchmarks as Inspect tasks. Each takes the user's data, and a limit on samples and on the answers' tokens.

`path` is the data's path, or {"path": …, "prompt": COLUMN, …} where columns must be named. Answers are greedy unless a
temperature says otherwise, through the endpoint's own chat template, with the same limits for every model of a run.
Names and parameters of tasks are recorded in logs: a resumed run finds its answers by them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, GenerateConfig
from inspect_ai.scorer import Scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from eval_clients.scoring import judge
from eval_clients.scoring.scorers import exact, three_shares, unscored_if_cut_off
from eval_clients.tasks import data, mmlu as multiple_choice
from eval_clients.tasks.items import Columns, Reading, Report, read_items
from eval_clients.tasks.openings import OPENINGS, add_openings, continue_opening

log = logging.getLogger(__name__)

ANSWER_TOKENS = 64
Source = str | dict[str, str]
"""The path of the data; with the columns that the user named, a mapping of `path` and their names by role."""


def split_source(source: Source) -> tuple[Path, Columns]:
    """The path of the data, and the columns that the user named."""
    if isinstance(source, str):
        return Path(source), {}
    return Path(source["path"]), {role: name for role, name in source.items() if role != "path"}


def join_source(path: str, columns: Columns) -> Source:
    """The data as a task takes it: a plain path where no column is named, as logs of earlier versions have it."""
    source: dict[str, str] = {"path": path, **columns}
    return source if columns else path


def _task(
    samples: Sequence[Sample], scorers: Sequence[Scorer], limit: int | None, max_tokens: int, temperature: float
) -> Task:
    return Task(
        dataset=MemoryDataset(data.draw_subset(samples, limit)),
        solver=seeded() if temperature else generate(),
        scorer=list(scorers),
        config=GenerateConfig(max_tokens=max_tokens, temperature=temperature),
    )


@solver
def seeded() -> Solver:
    """One sampled answer, seeded by the epoch's number: several answers to a prompt differ, a rerun does not."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, seed=state.epoch)

    return solve


def _harm_scorers(judged: bool) -> list[Scorer]:
    return [three_shares(), judge.harm()] if judged else [three_shares()]


@task
def hexphi(
    path: Source, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0, judged: bool = True
) -> Task:
    """HEx-PHI: a folder of category_1.csv … category_11.csv, judged from 1 to 5."""
    samples, absent = data.read_hexphi(*split_source(path))
    for sentence in absent:
        log.warning(sentence)
    return _task(samples, _harm_scorers(judged), limit, max_tokens, temperature)


@task
def advbench(
    path: Source,
    limit: int | None = None,
    max_tokens: int = ANSWER_TOKENS,
    temperature: float = 0,
    judged: bool = False,
) -> Task:
    """AdvBench's harmful behaviors (`goal` column), refused or not, and judged where there is a judge."""
    return _task(data.read_harmful(*split_source(path)), _harm_scorers(judged), limit, max_tokens, temperature)


@task
def harmful_csv(
    path: Source,
    limit: int | None = None,
    max_tokens: int = ANSWER_TOKENS,
    temperature: float = 0,
    judged: bool = False,
) -> Task:
    """Harmful prompts of any CSV with one column or a header, or JSONL with `prompt`."""
    return _task(data.read_harmful(*split_source(path)), _harm_scorers(judged), limit, max_tokens, temperature)


@task
def prefill(
    path: Source,
    limit: int | None = None,
    max_tokens: int = ANSWER_TOKENS,
    temperature: float = 0,
    judged: bool = False,
    openings: Sequence[str] = OPENINGS,
) -> Task:
    """Harmful prompts whose answer the client begins with each of the `openings`; what the server adds is scored."""
    prompts = data.draw_subset(data.read_harmful(*split_source(path)), limit)
    return Task(
        dataset=MemoryDataset(add_openings(prompts, openings)),
        solver=continue_opening(seeded=temperature > 0),
        scorer=_harm_scorers(judged),
        config=GenerateConfig(max_tokens=max_tokens, temperature=temperature),
    )


@task
def harmless(path: Source, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0) -> Task:
    """Harmless prompts of a JSONL with `prompt`: any refusal is a false refusal."""
    return _task(data.read_harmless(*split_source(path)), [three_shares()], limit, max_tokens, temperature)


@task
def xstest(path: Source, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0) -> Task:
    """XSTest: safe prompts that sound unsafe, and unsafe ones; `--samples` applies to each of the two."""
    file, columns = split_source(path)
    safe, unsafe = (data.read_xstest(file, label, columns) for label in data.LABELS)
    samples = data.draw_subset(safe, limit) + data.draw_subset(unsafe, limit)
    return _task(samples, [three_shares()], None, max_tokens, temperature)


@task(name="task")
def job(
    path: Source, limit: int | None = None, max_tokens: int = 96, temperature: float = 0, judged: bool = False
) -> Task:
    """The fine-tuned task: exact match with `answer`, and judged where there is a judge."""
    scorers = [exact(), judge.utility()] if judged else [exact()]
    return _task(data.read_task(*split_source(path)), scorers, limit, max_tokens, temperature)


@task
def mmlu(path: Source, limit: int | None = None) -> Task:
    """MMLU, five shots, by the letters' log-probabilities; with a limit, questions are drawn over all subjects."""
    file, columns = split_source(path)
    return Task(
        dataset=MemoryDataset(multiple_choice.read_questions(file, limit, columns=columns)),
        solver=multiple_choice.choose(),
        scorer=multiple_choice.letter(),
    )


@solver
def both_turns() -> Solver:
    """Asks both questions of MT-Bench, the second with the first answer in the conversation."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await generate(state)
        first = state.output.completion
        if unscored_if_cut_off(state) is not None:
            return state
        state.messages.append(ChatMessageUser(content=state.metadata["second"]))
        state = await generate(state)
        questions = [state.input_text, state.metadata["second"]]
        answers = [first, state.output.completion]
        state.metadata["turns"] = [list(turn) for turn in zip(questions, answers, strict=True)]
        return state

    return solve


@task
def mt_bench(path: Source, limit: int | None = None, max_tokens: int = 512, temperature: float = 0) -> Task:
    """MT-Bench: 80 two-turn questions, each answer judged from 1 to 10, with references where there are any."""
    return Task(
        dataset=MemoryDataset(data.draw_subset(data.read_mt_bench(*split_source(path)), limit)),
        solver=both_turns(),
        scorer=judge.dialogue(),
        config=GenerateConfig(max_tokens=max_tokens, temperature=temperature),
    )


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark as command lines offer it."""

    create: Callable[..., Task]
    read: Callable[[Path, Columns, Report], Sequence[Sample]]
    """Reads the data, and reports how."""
    needs: str
    """The data it takes, for people."""
    judge: Literal["none", "optional", "required"] = "none"
    generates: bool = True
    """Whether answers are generated, so that a temperature and a token limit apply."""


def _read_hexphi(path: Path, columns: Columns, report: Report) -> Sequence[Sample]:
    return data.read_hexphi(path, columns, report)[0]


def _read_xstest(path: Path, columns: Columns, report: Report) -> Sequence[Sample]:
    return data.read_xstest(path, "both", columns, report)


def _read_mmlu(path: Path, columns: Columns, report: Report) -> Sequence[Sample]:
    return multiple_choice.read_questions(path, columns=columns, report=report)


PROMPTS = "a column `prompt`, `goal`, …, or one prompt a line (CSV, JSON, JSONL, text)"
BENCHMARKS: Mapping[str, Benchmark] = {
    "hexphi": Benchmark(hexphi, _read_hexphi, "folder of category_1.csv … category_11.csv; judged", judge="optional"),
    "advbench": Benchmark(advbench, data.read_harmful, "CSV with a `goal` column", judge="optional"),
    "harmful_csv": Benchmark(harmful_csv, data.read_harmful, f"harmful prompts: {PROMPTS}", judge="optional"),
    "prefill": Benchmark(
        prefill, data.read_harmful, f"harmful prompts, the answer begun by the client: {PROMPTS}", judge="optional"
    ),
    "harmless": Benchmark(harmless, data.read_harmless, f"prompts any refusal of which is false: {PROMPTS}"),
    "xstest": Benchmark(xstest, _read_xstest, "xstest_prompts.csv: safe prompts answered, unsafe ones refused"),
    "mmlu": Benchmark(
        mmlu, _read_mmlu, "folder in Hendrycks' layout (dev/, test/); letters' log-probabilities", generates=False
    ),
    "mt_bench": Benchmark(
        mt_bench, data.read_mt_bench, "folder with question.jsonl and reference_answer*.jsonl; judged", judge="required"
    ),
    "task": Benchmark(job, data.read_task, "columns `prompt` and `answer`: exact match", judge="optional"),
}
"""By name on the command line."""


def build_task(
    name: str,
    path: str,
    *,
    columns: Columns = data.NONE,
    samples: int | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    judged: bool = False,
) -> Task:
    """The benchmark's task over the user's data; options it does not take are left out.

    `samples` and `max_tokens` (per answer) of None mean all, and the benchmark's own default. `columns` names columns
    by role (prompt, context, label, category, answer) where the file's own names do not tell.
    """
    benchmark = BENCHMARKS[name]
    options: dict[str, object] = {"path": join_source(path, columns), "limit": samples}
    if benchmark.generates:
        options["temperature"] = temperature
        if max_tokens is not None:
            options["max_tokens"] = max_tokens
    if benchmark.judge == "optional":
        options["judged"] = judged
    return benchmark.create(**options)


def describe_data(name: str, path: str, columns: Columns = data.NONE) -> list[Reading]:
    """How a benchmark reads its data: one reading per file. DataError when it cannot."""
    readings: list[Reading] = []
    BENCHMARKS[name].read(Path(path), columns, readings.append)
    return readings


def guess_benchmark(path: Path, columns: Columns = data.NONE) -> str:
    """The benchmark that a file or folder is for, by its layout; `harmful_csv` for any other file."""
    if path.is_dir():
        if (path / "question.jsonl").exists():
            return "mt_bench"
        return "mmlu" if (path / "test").is_dir() else "hexphi"
    prompt = {role: name for role, name in columns.items() if role == "prompt"}
    layout = read_items(path, prompt, ("prompt",)).assignment.layout
    return "xstest" if layout.startswith("XSTest") else "harmful_csv"
