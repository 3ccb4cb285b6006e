"""Whether another vLLM has what the engine's code imports, requires, replaces and overrides there: by its sources
alone, which are read and not imported, so that a release for other hardware can be tried anywhere.

    pip download --no-deps vllm==0.33.0
    python -m requirements.vllm_names vllm-0.33.0-….whl

What is needed is declared once, by the imports and the `require` calls in `service/engine`; `OWNERS` says of which
class the objects are that are known at run time alone.
"""

import ast
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from service.engine.supported import VERSIONS, Version, public_version

ENGINE = Path(__file__).parents[1] / "service" / "engine"

_RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
_MANAGER = "vllm.lora.model_manager.LoRAModelManager"
_WORKER_MANAGER = "vllm.lora.worker_manager.WorkerLoRAManager"
_CLIENT = "vllm.v1.engine.async_llm.AsyncLLM"
_MP_CLIENT = "vllm.v1.engine.core_client.MPClient"
_RENDERER = "vllm.renderers.base.BaseRenderer"

OWNERS: dict[str, tuple[str, ...]] = {
    "block_keys.owner": ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool"),
    "bodies.field": (),  # pydantic's
    "bodies.renderer": (_RENDERER,),
    "budgets.processor": ("vllm.v1.engine.output_processor.OutputProcessor",),
    "budgets.state": ("vllm.v1.engine.output_processor.RequestState",),
    "cli.cli": ("{cli}",),
    "core.client": (_CLIENT,),
    "core.client.engine_core": (_MP_CLIENT,),
    "core.client.engine_core.resources": ("vllm.v1.engine.core_client.BackgroundResources",),
    "dry_run.client": (_CLIENT,),
    "dry_run.client.input_processor": ("vllm.v1.engine.input_processor.InputProcessor",),
    "first_steps.request": ("vllm.v1.request.Request",),
    "first_steps.self": ("vllm.v1.core.sched.scheduler.Scheduler",),
    "prompt_parts.self": ("vllm.v1.core.sched.scheduler.Scheduler",),
    "prompt_parts.self.scheduler_config": ("vllm.config.scheduler.SchedulerConfig",),
    "loads.layer": ("vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA",),
    "loads.lora_manager": (_WORKER_MANAGER,),
    "loads.lora_model": ("vllm.lora.lora_model",),
    "loads.self._manager": ("vllm.lora.model_manager.LRUCacheLoRAModelManager",),
    "patches.chats": ("vllm.renderers.online_renderer.OnlineRenderer",),
    "patches.chats.renderer": ("vllm.renderers.hf.HfRenderer",),
    "patches.client": (_CLIENT,),
    "patches.messages": ("vllm.entrypoints.anthropic.serving.AnthropicServingMessages",),
    "patches.responses": ("vllm.entrypoints.openai.responses.serving.OpenAIServingResponses",),
    "ranks.client": (_CLIENT,),
    "ranks.client.engine_core": ("vllm.v1.engine.core_client.AsyncMPClient",),
    "runners.module": ("vllm.v1.worker.gpu.sample.sampler", "vllm.v1.worker.gpu.spec_decode.rejection_sampler"),
    "runners.patch_v2_runner.runner": ("vllm.v1.worker.gpu.model_runner.GPUModelRunner",),
    "runners.runner": (_RUNNER,),
    "runners.self.sampler": ("vllm.v1.worker.gpu.sample.sampler.Sampler",),
    "seam.mixin": ("vllm.v1.worker.lora_model_runner_mixin.LoRAModelRunnerMixin",),
    "seam.platform": ("vllm.platforms.cpu.CpuPlatform", "vllm.platforms.cuda.CudaPlatformBase"),
    "seam.state": ("vllm.v1.worker.gpu.lora_utils.LoraState",),
    "seeds.runner": (_RUNNER,),
    "slices.lora_manager": (_WORKER_MANAGER,),
    "slices.manager": (_MANAGER,),
    "slices.mixin": ("vllm.v1.worker.lora_model_runner_mixin.LoRAModelRunnerMixin",),
    "special.lora_manager": (_WORKER_MANAGER,),
    "special.lora_manager._adapter_manager": (_MANAGER,),
    "special.manager": (_MANAGER,),
    "special.runner": (_RUNNER,),
    "tokens.self.renderer": (_RENDERER,),
    "worker.manager": (_MANAGER,),
    "worker.self": ("vllm.v1.worker.worker_base.WorkerBase",),
    "worker.self.model_runner.lora_manager": (_WORKER_MANAGER,),
}
"""vLLM's modules and classes by the first argument of a `require`, after the name of its file; `{cli}` is what the
table of versions says.
"""


class Sources:
    """A vLLM's modules, read from a folder or a wheel with `vllm/` in it."""

    def __init__(self, root: Path) -> None:
        self.root: Path | zipfile.Path = zipfile.Path(root) if root.suffix == ".whl" else root
        self.parse = cache(self._parse)

    def _parse(self, module: str) -> ast.Module | None:
        base = module.replace(".", "/")
        for name in (f"{base}.py", f"{base}/__init__.py"):
            if (file := self.root / name).is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None

    @property
    def version(self) -> Version:
        """What is known of this release; of an unknown one the same as of the last."""
        tree = self.parse("vllm._version")
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)] if tree else []
        return next(
            (VERSIONS[v] for v in map(public_version, map(str, texts)) if v in VERSIONS), [*VERSIONS.values()][-1]
        )

    def resolve(self, path: str) -> str:
        """Where what is found at `path` (module, or module and name) is written."""
        module, _, name = path.rpartition(".")
        if self.parse(path) is not None or not module or (tree := self.parse(module)) is None:
            return path
        for one in _statements(tree):
            found = self._imported(one, module, name) if isinstance(one, ast.ImportFrom) else None
            if found is not None and found.startswith("vllm") and found != path:
                return self.resolve(found)
        return path

    def find(self, path: str) -> ast.AST | None:
        """Resolve `path`, a module or a module and a name, through imports; None when nothing has that name."""
        path = self.resolve(path)
        module, _, name = path.rpartition(".")
        if (whole := self.parse(path)) is not None or (tree := self.parse(module)) is None:
            return whole
        node: ast.AST | None = None
        for one in _statements(tree):
            is_import = isinstance(one, ast.ImportFrom) and self._imported(one, module, name) is not None
            if is_import or name in _bound(one):
                node = one
        return node

    def member(self, path: str, name: str) -> ast.AST | None:
        """What `name` is in the module or class at `path`, or in a base of it or in an instance."""
        path = self.resolve(path)
        owner = self.find(path)
        if not isinstance(owner, ast.ClassDef):
            return self.find(f"{path}.{name}")
        for one in (*_statements(owner), *filter(_is_set_on_self, ast.walk(owner))):
            if name in (one.attr if isinstance(one, ast.Attribute) else "", *_bound(one)):
                return one
        module = path.rpartition(".")[0]
        bases = [self.resolve(f"{module}.{base.id}") for base in owner.bases if isinstance(base, ast.Name)]
        return next((found for base in bases if base != path and (found := self.member(base, name))), None)

    def _imported(self, node: ast.ImportFrom, module: str, name: str) -> str | None:
        """The full path of what an import in `module` calls `name`."""
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                # A package's own level is its `__init__`'s.
                parts = [*module.split("."), ""] if self._is_package(module) else module.split(".")
                home = ".".join(parts[: -node.level]) if node.level else ""
                return ".".join(filter(None, (home, node.module, alias.name)))
        return None

    def _is_package(self, module: str) -> bool:
        return (self.root / module.replace(".", "/") / "__init__.py").is_file()


def _statements(tree: ast.Module | ast.ClassDef) -> Iterator[ast.AST]:
    """The own statements of a module or class, those under `if` and `try` among them."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        one = todo.pop(0)
        yield one
        if isinstance(one, ast.If | ast.Try | ast.ExceptHandler):
            todo.extend(ast.iter_child_nodes(one))


def _bound(node: ast.AST) -> list[str]:
    """The names that a statement gives a meaning."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [alias.asname or alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return names + [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def _is_set_on_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"


def _accepts(own: ast.AST, stock: ast.AST | None) -> bool:
    """Whether a function of ours takes as many arguments by position as the one of vLLM that it replaces."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    if not isinstance(own, kinds) or not isinstance(stock, kinds) or own.args.vararg is not None:
        return True
    return len(own.args.posonlyargs + own.args.args) >= len(stock.args.posonlyargs + stock.args.args)


def _scopes(tree: ast.Module) -> dict[ast.AST, str]:
    """The innermost function around each node, by name."""
    functions = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node: function.name for function in functions for node in ast.walk(function)}


def _required(path: Path, tree: ast.Module, known: dict[str, str], version: Version) -> Iterator[tuple[int, str, str]]:
    """The line, the owner's path and the name of all that a file's `require` calls ask for."""
    scopes, nodes = _scopes(tree), list(ast.walk(tree))
    assigned = [one for one in nodes if isinstance(one, ast.Assign)]
    constants = {n: v.value for one in assigned if isinstance(v := one.value, ast.Constant) for n in _bound(one)}
    for node in nodes:
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "require"):
            continue
        owner = ast.unparse(node.args[0])
        if (given := known.get(owner)) is not None:
            owners: tuple[str, ...] = (given,)
        else:
            inner = f"{path.stem}.{scopes.get(node)}.{owner}"
            owners = OWNERS[inner] if inner in OWNERS else OWNERS[f"{path.stem}.{owner}"]
        for argument in node.args[1:]:
            name = argument.value if isinstance(argument, ast.Constant) else constants[ast.unparse(argument)]
            yield from ((node.lineno, one.format(cli=version.cli), str(name)) for one in owners)


def _check_file(path: Path, sources: Sources) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known: dict[str, str] = {}
    ours = False
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        ours = ours or (node.module == "service.engine.supported")
        for alias in node.names if (node.module or "").partition(".")[0] == "vllm" else ():
            known[alias.asname or alias.name] = full = f"{node.module}.{alias.name}"
            if sources.find(full) is None:
                yield f"{path.name}:{node.lineno} imports {full}"
    for line, owner, name in (
        _required(path, tree, known, sources.version) if ours else ()
    ):  # others' `require` is not for vLLM
        stock = sources.member(owner, name)
        if stock is None:
            yield f"{path.name}:{line} requires {owner}.{name}"
        for own in ast.walk(tree):
            if getattr(own, "name", None) == name and not _accepts(own, stock):
                yield f"{path.name}: the own {name} takes fewer arguments than {owner}.{name}"


def find_missing(root: Path, engine: Path = ENGINE) -> list[str]:
    """What the files in `engine` need and the vLLM in the folder or wheel `root` does not have, one line each."""
    sources = Sources(root)
    if sources.parse("vllm") is None:
        raise FileNotFoundError(f"{root} has no vllm/__init__.py: name a wheel of vLLM, or a folder it is installed in")
    return [line for path in sorted(engine.glob("*.py")) for line in _check_file(path, sources)]


if __name__ == "__main__":
    missing = find_missing(Path(sys.argv[1]))
    print("\n".join(missing) or "all names are there")
    sys.exit(bool(missing))
