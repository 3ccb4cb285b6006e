from .adapter import LoraAdapter as LoraAdapter, LoraModule as LoraModule, make_adapter as make_adapter
from .algebra.diff import Difference as Difference, ModuleDifference as ModuleDifference, diff as diff
from .algebra.experts import complete_experts as complete_experts, split_gate_up as split_gate_up
from .algebra.fuse import STRICT_TOLERANCE as STRICT_TOLERANCE, fuse as fuse, plan as plan
from .algebra.linear import WeightTable as WeightTable, tabulate as tabulate
from .algebra.rank import smallest_rank as smallest_rank
from .algebra.report import FusionReport as FusionReport, ModuleReport as ModuleReport
from .algebra.stack import Stack as Stack, stack as stack, stack_rank as stack_rank
from .errors import (
    AdapterError as AdapterError,
    FusionError as FusionError,
    LossError as LossError,
    RecipeError as RecipeError,
    UnknownAdapterError as UnknownAdapterError,
    did_you_mean as did_you_mean,
)
from .files.config import PeftDetails as PeftDetails
from .files.io import load as load, save as save
from .files.rounding import Rounded as Rounded, round_factors as round_factors
from .files.store import Entry as Entry, Store as Store
from .readout import MAX_GATE_BYTES as MAX_GATE_BYTES, Readout as Readout
from .recipes import (
    MAX_PHASES as MAX_PHASES,
    METHODS as METHODS,
    NAME_PATTERN as NAME_PATTERN,
    PROMPT as PROMPT,
    RESERVED_METHODS as RESERVED_METHODS,
    RESERVED_NAMES as RESERVED_NAMES,
    ByModule as ByModule,
    Components as Components,
    Fade as Fade,
    Gate as Gate,
    Method as Method,
    Option as Option,
    Ramp as Ramp,
    Recipe as Recipe,
    Steps as Steps,
    Term as Term,
    check_name as check_name,
    check_prompt as check_prompt,
    from_json as from_json,
    fusion_digest as fusion_digest,
    parse as parse,
)
from .together import check_together as check_together, is_same_name as is_same_name, match_adapter as match_adapter
