from .endpoint import Endpoint as Endpoint
from .errors import EvaluationError as EvaluationError
from .running import RunOptions as RunOptions, prepare_folder as prepare_folder
from .sweeps.choice import Limit as Limit
from .sweeps.points import Point as Point, expand as expand
from .sweeps.study import Report as Report, Study as Study, run_study as run_study
from .tasks.benchmarks import BENCHMARKS as BENCHMARKS, build_task as build_task
