"""Rules that no linter knows: sizes, one importer per heavy library, a reader for every key.

The rules read the source as a syntax tree, so that a comment or a text never counts as code.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pipeline.config.fields import leaves
from pipeline.objectives import objective_kinds
from pipeline.run import RunConfig

ROOT = Path(__file__).parents[1]
PRODUCT = ("pipeline", "launch", "data_prep")

# Who may import what (a file, or a folder with a slash at its end). Libraries of other files come
# through them, so that replacing one, or running without it, touches one place.
IMPORTERS = {
    "deepspeed": ("pipeline/engine/deepspeed_import.py",),
    "mlflow": (
        *("pipeline/track/mlflow_upload.py", "pipeline/track/mlflow_nested.py"),
        "pipeline/track/mlflow_points.py",
    ),
    "ray": ("pipeline/cluster.py", "launch/ray.py", "pipeline/conduct/", "data_prep/"),
    "torchvision": ("pipeline/data/augment.py",),
    "PIL": ("pipeline/probe/stills.py", "data_prep/"),
    "webdataset": ("pipeline/data/stream.py", "pipeline/data/worker_imports.py", "data_prep/"),
    "av": ("pipeline/data/media.py", "data_prep/"),
    "scenedetect": ("data_prep/shots.py",),
    "sklearn": ("pipeline/conduct/clusters.py",),
    "cv2": ("data_prep/",),
    "transformers": ("pipeline/exchange/difference.py",),
    "flash_attn": ("pipeline/models/attention",),
    "flash_attn_interface": ("pipeline/models/attention",),
}
# Who may import a module whose name is computed, where the rule above could not read it. The table
# of attention kernels names its libraries as `module="…"`, which the rule does read.
COMPUTED_IMPORTERS = ("pipeline/objectives/__init__.py", "pipeline/models/attention_kernels.py")
# Who may touch environment variables: the one reader, and those that set them for the processes
# they start (Ray and the fork server can be told in no other way, and are put back afterwards);
# and the one that knows what must not be written down.
ENVIRONMENT_USERS = (
    *("pipeline/environment.py", "pipeline/cluster.py", "pipeline/data/worker.py"),
    "pipeline/redact.py",
)
# Keys whose whole effect is that a validator lets something pass.
PERMISSIONS = {"track.mlflow.allow_plain_http"}
BLIND = {"Exception", "BaseException"}
COLLECTIVES = {
    f"dist.{name}"
    for name in (
        *("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "gather"),
        *("reduce_scatter", "reduce_scatter_tensor", "all_to_all", "isend", "irecv", "P2POp"),
    )
}
FACTORIES = {f"torch.{name}" for name in ("tensor", "zeros", "ones", "empty", "full", "arange")}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def sources(*folders: str) -> tuple[tuple[str, ast.Module], ...]:
    """Path from the root and syntax tree of every Python file below some folders."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return tuple((path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) for path in paths)


def nodes(*folders: str, kind: type | tuple[type, ...]) -> Iterator[tuple[str, ast.AST]]:
    for path, tree in sources(*folders):
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield path, node


def name_of(node: ast.AST | None) -> str:
    """The last word of a name: `environ` of `os.environ`; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return name_of(node)


def test_the_rules_see_the_whole_product():
    seen = {path for path, _ in sources(*PRODUCT, "tests")}
    assert {"pipeline/run.py", "pipeline/config/load.py", "tests/test_project_rules.py"} <= seen


def test_no_function_is_longer_than_60_lines_and_no_test_than_40():
    too_long = []
    for path, node in nodes(*PRODUCT, "benchmarks", "tests", kind=Function):
        length = node.end_lineno - node.lineno + 1
        limit = 40 if node.name.startswith("test_") else 60
        if length > limit:
            too_long.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    assert too_long == []


def test_no_file_outside_tests_is_longer_than_300_lines():
    lengths = {
        path: len((ROOT / path).read_text().splitlines())
        for path, _ in sources(*PRODUCT, "benchmarks")
    }
    assert {path: length for path, length in lengths.items() if length > 300} == {}


def test_no_handler_of_every_exception_swallows_it():
    swallowed = []
    for path, node in nodes(*PRODUCT, "benchmarks", kind=ast.ExceptHandler):
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        is_blind = node.type is None or any(name_of(one) in BLIND for one in caught)
        raises = any(isinstance(below, ast.Raise) for below in ast.walk(node))
        if is_blind and not raises:
            swallowed.append(f"{path}:{node.lineno}")
    assert swallowed == []


@pytest.mark.parametrize("library", IMPORTERS)
def test_a_heavy_library_has_one_importer(library):
    importers = set()
    for path, node in nodes(*PRODUCT, kind=(ast.Import, ast.ImportFrom, ast.Call)):
        if library in imported_by(node):
            importers.add(path)
    allowed = IMPORTERS[library]
    assert {path for path in importers if not path.startswith(allowed)} == set()


def imported_by(node: ast.AST) -> set[str]:
    """Top-level names of the libraries that a statement, or a call of import_module, imports.

    A `module="…"` handed to any call counts: it is a name kept for a later import.
    """
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        found = [node.module or ""] if node.level == 0 else []
    elif isinstance(node, ast.Call):
        named = [one.value for one in node.keywords if one.arg == "module"]
        named += node.args[:1] if is_late_import(node) else []
        found = [one.value for one in named if isinstance(one, ast.Constant)]
    else:
        found = []
    return {str(name).partition(".")[0] for name in found}


def is_late_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__")


def test_a_module_whose_name_is_computed_is_imported_in_known_places():
    computed = {
        path
        for path, node in nodes(*PRODUCT, kind=ast.Call)
        if is_late_import(node) and not isinstance(node.args[0], ast.Constant)
    }
    assert computed == set(COMPUTED_IMPORTERS)


def test_environment_variables_have_one_reader():
    """The launcher may hand the environment on to the processes it starts, and set it for them."""
    readers = [
        f"{path}:{node.lineno}"
        for path, node in nodes(*PRODUCT, kind=(ast.Attribute, ast.Subscript, ast.ImportFrom))
        if path not in ENVIRONMENT_USERS
        if reads_variable(node) or (touches_environment(node) and not path.startswith("launch/"))
    ]
    assert readers == []


def touches_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        return node.module == "os" and bool(names & {"environ", "getenv"})
    return dotted(node) in ("os.environ", "os.getenv")


def reads_variable(node: ast.AST) -> bool:
    """`os.environ["X"]` as a value, or `os.environ.get`."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.ctx, ast.Load) and dotted(node.value) == "os.environ"
    return dotted(node) in ("os.environ.get", "os.getenv")


def factories_beside_collectives(tree: ast.AST) -> Iterator[str]:
    """Tensors made without a device in functions that hand tensors to all ranks."""
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        if not any(dotted(call.func) in COLLECTIVES for call in calls):
            continue
        for call in calls:
            keys = {keyword.arg for keyword in call.keywords}
            if dotted(call.func) in FACTORIES and "device" not in keys:
                yield f"{function.name}:{call.lineno}"


def test_what_ranks_send_each_other_is_made_on_a_device():
    # gloo takes a tensor of the host, NCCL does not: on a CPU nothing would tell.
    found = [
        f"{path}:{where}"
        for path, tree in sources(*PRODUCT)
        for where in factories_beside_collectives(tree)
    ]
    assert found == []


def test_a_tensor_of_the_host_beside_a_collective_is_seen():
    code = "def f(n):\n    held = torch.tensor([n])\n    dist.all_reduce(held)"
    assert list(factories_beside_collectives(ast.parse(code))) == ["f:2"]
    there = code.replace("[n]", "[n], device=d")
    assert list(factories_beside_collectives(ast.parse(there))) == []


def test_no_code_outside_the_objectives_asks_which_objective_it_has():
    asking = []
    for path, node in nodes(*PRODUCT, kind=(ast.Compare, ast.Match, ast.Call)):
        if not path.startswith("pipeline/objectives/") and asks_for_objective(node):
            asking.append(f"{path}:{node.lineno}")
    assert asking == []


def asks_for_objective(node: ast.AST) -> bool:
    """`objective… == x`, `x == "jepa"`, `match objective…`, `isinstance(objective…, X)`."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        is_none_check = any(isinstance(one, ast.Constant) and one.value is None for one in sides)
        kinds = {one.value for side in sides for one in ast.walk(side) if is_kind(one)}
        return bool(kinds) or (not is_none_check and any(map(is_objective, sides)))
    if isinstance(node, ast.Match):
        return is_objective(node.subject)
    is_check = isinstance(node, ast.Call) and name_of(node.func) == "isinstance"
    return is_check and is_objective(node.args[0])


def is_objective(node: ast.AST) -> bool:
    """The configuration's objective, its kind or its type, and not a number that it has."""
    name = name_of(node)
    if isinstance(node, ast.Attribute) and name == "kind":
        return name_of(node.value).endswith("objective")
    if isinstance(node, ast.Call) and name_of(node.func) == "type":
        return is_objective(node.args[0])
    return name.endswith(("objective", "objective_kind"))


def is_kind(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in objective_kinds()


def test_every_configuration_key_is_read_by_some_code():
    read = {name for _, tree in sources(*PRODUCT) for name in attributes_read(tree)}
    unread = [doc.key for doc in leaves(RunConfig) if doc.key.rpartition(".")[2] not in read]
    assert [key for key in unread if key not in PERMISSIONS] == []


def attributes_read(node: ast.AST) -> Iterator[str]:
    """Names after a dot. A validator only checks a key: it does not make it do anything."""
    if isinstance(node, Function) and any(map(is_validator, node.decorator_list)):
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.attr
    for child in ast.iter_child_nodes(node):
        yield from attributes_read(child)


def is_validator(decorator: ast.AST) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return name_of(called).endswith("_validator")


@pytest.mark.parametrize(
    "code",
    [
        "if config.objective.kind == name: pass",
        "if kind == 'jepa': pass",
        "if kind in ('jepa', 'other'): pass",
        "if type(objective) is Jepa: pass",
        "if isinstance(run.objective, Jepa): pass",
        "match config.objective.kind:\n  case 'x': pass",
    ],
)
def test_asking_for_the_objective_is_seen_in_every_form(code):
    assert any(asks_for_objective(node) for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["objective is None", "objective.width == 3", "array.dtype.kind == 'f'", "name == 'j'"]
)
def test_other_comparisons_are_not_mistaken_for_it(code):
    assert not any(asks_for_objective(node) for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize(
    ("code", "reads"),
    [
        ("os.environ['A']", True),
        ("os.environ.get('A')", True),
        ("os.getenv('A')", True),
        ("os.environ['A'] = 'b'", False),
        ("run(env={**os.environ, 'A': 'b'})", False),
    ],
)
def test_reading_a_variable_is_told_from_handing_the_environment_on(code, reads):
    assert any(reads_variable(node) for node in ast.walk(ast.parse(code))) is reads


def test_a_key_that_only_its_validator_knows_counts_as_unread():
    code = """
class Part(Section):
    used: int
    checked: int

    @model_validator(mode="after")
    def _fits(self):
        return self.checked

    def double(self):
        return 2 * self.used
"""
    assert set(attributes_read(ast.parse(code))) == {"used"}


def test_a_late_import_is_an_import():
    code = "importlib.import_module('ray.data')\nimport av.error as e\nTable(module='flash_attn.x')"
    found = set().union(*(imported_by(node) for node in ast.walk(ast.parse(code))))
    assert found == {"ray", "av", "flash_attn"}
