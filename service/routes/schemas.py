"""Bodies and answers of the service's own routes. Answers leave out the keys that they do not set."""

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from service.defaults import Defaults
from service.routes.recipe_schema import FusionValue
from service.settings import BaseMatch
from service.sources.fetches import State
from service.validation import StrictModel

T = TypeVar("T")
PUBLIC = "as tenants see it: of what the operator owns, which they use and do not change"
Name = Annotated[str, Field(min_length=1, examples=["balanced"])]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="sha256 of a fusion, 64 hexadecimal digits")]
Created = Annotated[str, Field(examples=["2026-01-31T12:00:00+00:00"], description="UTC, ISO 8601")]


class Listing(BaseModel, Generic[T]):
    """OpenAI's list object."""

    object: Literal["list"]
    data: list[T]


class Page(Listing[T]):
    """A part of a list, in the order of names or of time; `last_id` as `after` asks for the next part."""

    last_id: str | None = Field(description="null when there is nothing in this part")
    has_more: bool


class FusionKeys(BaseModel):
    """What a request may say on top of vLLM's keys, beside the base model in `model`."""

    fusion: FusionValue | None = None
    strict: bool | None = Field(default=None, description="refuse a fusion that would lose any of its update")
    receipt: bool | None = Field(default=None, description="state what answers, signed, in `x-fusion-receipt`")


BaseMatchKey = Annotated[
    BaseMatch | None,
    Field(
        description="whether an adapter's shapes alone, or also its base's name, must fit; FUSION_BASE_MATCH if null"
    ),
]


AnswerOnlyKey = Annotated[
    bool | None,
    Field(
        description="whether recipes may let it act on the answer alone (true) or on prompts, too (false); what its "
        "adapter_config.json says if null"
    ),
]


class AdapterBody(StrictModel):
    """An adapter to register: a folder inside one of the server's FUSION_ADAPTER_ROOTS, or a URL in FUSION_SOURCES."""

    name: Name
    source: str = Field(
        default="",
        examples=["examples/adapters/task", "hf://owner/name@main", "s3://bucket/folder"],
        description="a folder, or a URL, which is fetched in the background",
    )
    path: str = Field(default="", examples=["examples/adapters/task"], description="as `source`, of a folder alone")
    replace: bool = Field(default=False, description="let the name of an adapter stand for this one from now on")
    base_match: BaseMatchKey = None
    answer_only: AnswerOnlyKey = None


class LoadLoraBody(BaseModel):
    """The body of vLLM's `/v1/load_lora_adapter`; its further keys are ignored."""

    model_config = ConfigDict(strict=True)

    lora_name: Name
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False
    base_match: BaseMatchKey = None
    answer_only: AnswerOnlyKey = None


class UnloadLoraBody(BaseModel):
    """The body of vLLM's `/v1/unload_lora_adapter`; its further keys are ignored."""

    model_config = ConfigDict(strict=True)

    lora_name: Name


class PlanBody(StrictModel):
    """A fusion to look at."""

    fusion: FusionValue


class ProfileBody(StrictModel):
    """What a profile stands for."""

    fusion: FusionValue
    defaults: Defaults | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None


class RollbackBody(StrictModel):
    """The version to make the current one."""

    version: int


class Damaged(BaseModel):
    """An entry whose record cannot be read. It can be deleted, and made again."""

    name: str
    object: Literal["adapter", "fusion"]
    state: Literal["damaged"]
    reason: str


class Adapter(BaseModel):
    """A registered adapter."""

    name: str
    object: Literal["adapter"]
    digest: str = Field(description="of the adapter's content")
    created: Created
    rank: int = Field(description="its largest rank in any module")
    modules: int
    bytes: int
    dtype: str
    fusion_digest: Digest
    effect: float | None = Field(default=None, description="largest change of a log-probability on the probe prompt")
    norm: float | None = Field(
        default=None, description="bound of the update's norm: the largest ‖A‖ ‖scaling·B‖ of a module"
    )
    built: str = Field(default="", description="its layers for which recipes with it are built, not mixed")
    gate: dict[str, int | float] | None = Field(
        default=None, description="of a gate: the tokens `yes` and `no` whose odds are its value, and its readout"
    )
    answer_only: bool = Field(default=False, description="whether no recipe may let it act on the prompt")
    weight_range: tuple[float, float] | None = Field(
        default=None, description="the lowest and the highest weight that its adapter_config.json recommends"
    )
    base_mismatch: str | None = Field(
        default=None, description="the base that the adapter names, when it is not this one and every shape fits"
    )
    notes: list[str] = Field(default=[], description="what of its files was not used, or read otherwise than it says")
    profiles: list[str] = Field(default=[], description="profiles that use it")
    public: bool = Field(default=False, description=PUBLIC)
    fetch: "Fetching | None" = Field(default=None, description="of an adapter that is to take its name, or failed to")
    state: Literal["", "damaged"] = Field(default="", description="only of adapters whose stored files have changed")
    reason: str = Field(default="", description="of the damage")


class Fetching(BaseModel):
    """An adapter that is on its way, or could not be fetched."""

    name: str
    object: Literal["adapter"]
    source: str = Field(examples=["s3://bucket/folder"])
    state: State
    reason: str = Field(default="", description="why it failed")
    bytes: int = Field(default=0, description="that have arrived")
    total_bytes: int | None = Field(default=None, description="of what is fetched now and before, when it is known")
    bytes_per_s: int = Field(default=0, description="since this attempt began")
    eta_s: float | None = Field(default=None, description="seconds until the end at that speed, when it is known")


class Profile(BaseModel):
    """One version of a profile."""

    name: str
    object: Literal["fusion"]
    version: int
    recipe: str = Field(description="canonical text", examples=["0.4*safety + 0.6*task"])
    parents: dict[str, str] = Field(description="digest of each adapter when the version was made")
    digest: Digest
    defaults: dict[str, Any]
    hidden: list[str] = Field(
        default=[], description="defaults that it has, too, shown only to those who may change the profile"
    )
    description: str
    created: Created
    versions: list[int] = Field(default=[], description="all versions there are")
    public: bool = Field(default=False, description=PUBLIC)
    state: Literal["", "damaged"] = Field(default="", description="only of profiles that cannot be served")
    reason: str = Field(default="", description="of the damage")


class PolicyVerdict(BaseModel):
    """Whether the policy allows a fusion to answer whoever asks for this."""

    id: Digest = Field(description="of the policy")
    allowed: bool
    rule: str = Field(description="id of the rule that refuses it; empty when it is allowed")
    reason: str = Field(description="what was found and what is required")


class PolicyState(BaseModel):
    """The policy on combinations."""

    object: Literal["policy"]
    id: Digest = Field(description="sha256 of its content, the same however its file is written")
    name: str
    exempt: str = Field(description="the least role that no rule is about")
    rules: list[dict[str, Any]] = Field(description="each with its `id` and `kind`, and what the file says")
    adapters: dict[str, str | None] = Field(description="digests of the adapters of rules; null: not registered")
    warnings: list[str] = Field(description="a sentence for each adapter of rules that is not registered")


class Plan(BaseModel):
    """How a fusion would be served, and what that costs."""

    model_config = ConfigDict(extra="allow")  # the report's own fields

    recipe: str
    fusion: dict[str, Any] = Field(description="the recipe in JSON form")
    digest: Digest
    mode: Literal["mixed", "built"]
    stack: Digest = Field(description="as the header `x-fusion-stack` of its answers")
    reason: str | None = Field(description="why it cannot be mixed")
    policy: PolicyVerdict
    rank: int | None = Field(default=None, description="of what follows, absent when there are phases")
    error: float | None = Field(default=None, description="relative Frobenius error")
    bytes: int | None = None
    modules: list[dict[str, Any]] | None = Field(default=None, description="rank, energy and error of each module")
    phases: list[dict[str, Any]] | None = Field(
        default=None,
        description="of weights that change with position: `start`, 'prompt' or a token of the answer, and the report",
    )


class FusionState(BaseModel):
    """The fusion behind a model's name."""

    recipe: str
    digest: Digest
    rank: int
    state: str = Field(
        json_schema_extra={"enum": ["warm", "queued", "fusing", "loading", "evicted", "failed", "damaged"]}
    )
    scorecards: int
    stack: Digest = Field(description="what routers keep it together by: the header `x-fusion-stack` of its answers")
    reason: str = Field(default="", description="of a failure or damage")
    version: int = Field(default=0, description="of a profile")


class DamagedState(BaseModel):
    """What is said of a fusion whose record cannot be read."""

    state: Literal["damaged"]
    reason: str


class Model(BaseModel):
    """OpenAI's model object with the fusion it stands for; the base stands for none."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time in seconds; 0 for the base")
    owned_by: str
    parent: str | None
    root: str = Field(description="the name that this is a form of, or this name")
    fusion: FusionState | DamagedState | None
    max_model_len: int = Field(default=0, description="of the base")


class Scorecard(BaseModel):
    """A measured result as it was attached."""

    digest: Digest
    scorecard_id: int
    scorecard: dict[str, Any]


class ScorecardPage(Page[dict[str, Any]]):
    """Results of one fusion, oldest first, each with its `scorecard_id` and the time it was attached."""

    digest: Digest


class ScorecardCount(BaseModel):
    """How many results a fusion has."""

    digest: str
    count: int
    bytes: int
