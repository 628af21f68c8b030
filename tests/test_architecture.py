"""Checks the architecture rules on the source; each rule is also shown to fail on a small bad example."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "carray").rglob("*.py"))
JOBS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jobs").rglob("*.py"))

LAYERS = (
    *({"core"}, {"images"}, {"manifest"}, {"tensors"}, {"search"}, {"bundle"}, {"classify"}, {"evaluation"}),
    *({"queries"}, {"pages", "testing"}, {"preflight", "demo"}, {"cli"}, {"__main__", "__init__"}),
)

HEAVY = (
    "torch torchvision timm ray onnxruntime openvino onnx onnxscript cv2 scipy sklearn matplotlib duckdb optuna "
    "simplejpeg PIL safetensors botocore rich jinja2 tensorboardX mlflow"
).split()
"""Imported inside the function that needs them, so that a command pays only for what it uses."""

FORBIDDEN_STEMS = {"utils", "helpers", "common", "misc", "manager", "handler", "processor"}
MODULE_LINES, FUNCTION_LINES = 500, 60
DISTRIBUTIONS = {
    "pi_heif": "pi-heif",
    **{"PIL": "Pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn", "yaml": "PyYAML"},
    **{"jinja2": "Jinja2", "mlflow": "mlflow-skinny"},
}
"""Where a package is imported under another name than it is installed by."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A module: its path from the root, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def place(self) -> tuple[str, ...]:
        """Give the module's name below carray, in parts: ('manifest', 'prepare')."""
        return Path(self.path).with_suffix("").parts[1:]

    @property
    def functions(self) -> Iterator[Function]:
        """Give every function and method, nested ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


@cache
def read_source(path: str) -> Source:
    text = (ROOT / path).read_text()
    return Source(path, text, ast.parse(text))


def imported_modules(source: Source, *, deferred: bool = True) -> list[tuple[int, str]]:
    """Give (line, dotted module) of every import; with `deferred`, of those inside functions too.

    `from a import b` counts as a.b where that is a module of ours.
    """
    found = []
    for node in walk(source.tree, into_functions=deferred):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                place = ROOT / f"{base}.{alias.name}".replace(".", "/")
                is_module = place.with_suffix(".py").exists() or place.is_dir()
                found.append((node.lineno, f"{base}.{alias.name}" if is_module else base))
    return found


def walk(root: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    """Give the nodes below one; without `into_functions`, only what runs with it, and nothing for type checkers."""
    waiting = list(ast.iter_child_nodes(root))
    while waiting:
        node = waiting.pop()
        yield node
        if into_functions or not (isinstance(node, Function | ast.Lambda) or is_for_type_checkers(node)):
            waiting += ast.iter_child_nodes(node)


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def layer_of(name: str) -> int:
    return next((rank for rank, names in enumerate(LAYERS) if name in names), -1)


def own_imports(source: Source) -> Iterator[tuple[int, list[str]]]:
    """Give (line, parts below carray) of the imports of our own modules."""
    for line, name in imported_modules(source):
        parts = name.split(".")
        if parts[0] == "carray" and len(parts) > 1:
            yield line, parts[1:]


def imports_point_down(source: Source) -> list[str]:
    mine = source.place[0]
    if layer_of(mine) < 0:
        return [f"{mine} stands in no layer"]
    return [
        f"line {line}: {mine} imports {'.'.join(parts)}"
        for line, parts in own_imports(source)
        if parts[0] != mine and not 0 <= layer_of(parts[0]) < layer_of(mine)
    ]


def imports_are_absolute(source: Source) -> list[str]:
    return [f"line {line}: relative import" for line, name in imported_modules(source) if name.startswith(".")]


def may_import_ray(source: Source) -> bool:
    return source.place[-1].endswith("on_ray") or source.place[:2] == ("core", "ray")


def ray_stays_in_on_ray(source: Source) -> list[str]:
    if may_import_ray(source):
        return []
    return [f"line {line}: {name}" for line, name in imported_modules(source) if name.split(".")[0] == "ray"]


def heavy_imports_wait(source: Source) -> list[str]:
    allowed = {"torch"} if source.place[0] == "search" else set()
    allowed |= {"ray"} if may_import_ray(source) else set()
    names = [(line, name.split(".")[0]) for line, name in imported_modules(source, deferred=False)]
    return [f"line {line}: {name} at import" for line, name in names if name in set(HEAVY) - allowed]


def modules_are_short(source: Source) -> list[str]:
    lines = len(source.text.splitlines())
    return [f"{lines} lines, at most {MODULE_LINES}"] if lines > MODULE_LINES else []


def functions_are_short(source: Source) -> list[str]:
    """Counts from the first line of the body: the options of a command are a declaration."""
    lengths = [(f.name, (f.end_lineno or f.lineno) - f.body[0].lineno + 1) for f in source.functions]
    return [f"{name} has {lines} lines, at most {FUNCTION_LINES}" for name, lines in lengths if lines > FUNCTION_LINES]


def modules_say_what_they_make(source: Source) -> list[str]:
    return [] if ast.get_docstring(source.tree) else ["no module docstring"]


def public_names_are_documented(source: Source) -> list[str]:
    return [f"line {node.lineno}: {name}" for name, node, _ in public_nodes(source) if not ast.get_docstring(node)]


def public_nodes(source: Source) -> Iterator[tuple[str, Function | ast.ClassDef, str]]:
    """Give (name, node, docstring of the class around it) of each public class, function and method."""
    for node in source.tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, ""
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, Function) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner, ast.get_docstring(node) or ""


def errors_are_announced(source: Source) -> list[str]:
    complaints = []
    for name, node, around in public_nodes(source):
        if isinstance(node, Function):
            text = (ast.get_docstring(node) or "") + around
            raised = sorted(set(raised_names(node)) & carray_errors())
            complaints += [
                f"{name} raises {error} unsaid" for error in raised if "Raises:" not in text or error not in text
            ]
    return complaints


def raised_names(function: Function) -> Iterator[str]:
    """Give the class names raised in a function's own body, not in functions inside it."""
    for node in walk(function, into_functions=False):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            yield node.exc.func.id


@cache
def carray_errors() -> frozenset[str]:
    tree = read_source("carray/core/errors.py").tree
    return frozenset(node.name for node in tree.body if isinstance(node, ast.ClassDef))


def results_are_annotated(source: Source) -> list[str]:
    return [f"line {f.lineno}: {f.name}" for f in source.functions if f.returns is None]


def exports_are_listed(source: Source) -> list[str]:
    """A module with public names has an `__all__`, of names that it defines."""
    listed = [n for n in source.tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    defined = {node.name for node in source.tree.body if isinstance(node, Function | ast.ClassDef)}
    if not listed:
        return ["no __all__"] if any(not name.startswith("_") for name in defined) else []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
    if source.path == "carray/__init__.py":  # its names arrive through __getattr__; test_public_names imports them
        return []
    return [f"__all__ lists {name!r}" for name in ast.literal_eval(listed[0].value) if name not in defined]


def names_say_something(source: Source) -> list[str]:
    return [part for part in source.place if part.strip("_") in FORBIDDEN_STEMS]


def nothing_read_can_run(source: Source) -> list[str]:
    complaints = [
        f"line {line}: {name}" for line, name in imported_modules(source) if name in {"pickle", "dill", "joblib"}
    ]
    for call in (node for node in ast.walk(source.tree) if isinstance(node, ast.Call)):
        name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        unsafe = (
            name in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"}
            or (name.endswith("torch.load") and keywords.get("weights_only") != "True")
            or keywords.get("shell") == "True"
            or keywords.get("allow_pickle") == "True"
        )
        complaints += [f"line {call.lineno}: {name}"] if unsafe else []
    return complaints


def imports_are_declared(source: Source) -> list[str]:
    known = {name.lower().replace("-", "_") for name in declared_dependencies()}
    complaints = []
    for line, module in imported_modules(source):
        name = module.split(".")[0]
        wanted = DISTRIBUTIONS.get(name, name).lower().replace("-", "_")
        if name not in sys.stdlib_module_names and name not in {"carray", ""} and wanted not in known:
            complaints.append(f"line {line}: {name} is not in pyproject.toml")
    return complaints


@cache
def declared_dependencies() -> dict[str, str]:
    """Give each distribution that carray needs, and the comment behind its line."""
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    found = {}
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["weights"], *extras["openvino"], *extras["loggers"]]:
        comment = re.search(re.escape(f'"{line}",') + r"[ \t]*#(.*)", text)
        found[re.split(r"[\[<>=~! ]", line)[0]] = comment.group(1).strip() if comment else ""
    return found


RULES: list[Callable[[Source], list[str]]] = [
    imports_point_down,
    imports_are_absolute,
    ray_stays_in_on_ray,
    heavy_imports_wait,
    modules_are_short,
    functions_are_short,
    modules_say_what_they_make,
    public_names_are_documented,
    errors_are_announced,
    results_are_annotated,
    exports_are_listed,
    names_say_something,
    nothing_read_can_run,
    imports_are_declared,
]

BROKEN = [
    (imports_point_down, "carray/manifest/prepare.py", "import carray.search.run_folder"),
    (imports_point_down, "carray/core/tables.py", "def f():\n    from carray.images import pixels"),
    (imports_point_down, "carray/images/vehicles.py", "import carray.manifest.labels"),
    (imports_point_down, "carray/elsewhere.py", ""),
    (imports_are_absolute, "carray/core/tables.py", "from .errors import SchemaError"),
    (ray_stays_in_on_ray, "carray/search/train/fit.py", "def f():\n    from ray import tune"),
    (heavy_imports_wait, "carray/images/pixels.py", "import cv2"),
    (heavy_imports_wait, "carray/bundle/pack.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
    (heavy_imports_wait, "carray/bundle/pack.py", "class A:\n    import torch"),
    (modules_are_short, "carray/images/pixels.py", "x = 1\n" * (MODULE_LINES + 1)),
    (functions_are_short, "carray/images/pixels.py", "def f():\n" + "    x = 1\n" * (FUNCTION_LINES + 1)),
    (modules_say_what_they_make, "carray/images/pixels.py", "x = 1"),
    (public_names_are_documented, "carray/images/pixels.py", "def f(): ..."),
    (public_names_are_documented, "carray/images/pixels.py", 'class A:\n    "Is A."\n    def f(self): ...'),
    (errors_are_announced, "carray/images/pixels.py", 'def f():\n    "Do."\n    raise SchemaError("x")'),
    (
        errors_are_announced,
        "carray/images/pixels.py",
        'def f():\n    "Do.\\n\\nRaises:\\n a DataError"\n    raise SchemaError()',
    ),
    (results_are_annotated, "carray/images/pixels.py", "def _f(x: int): ..."),
    (exports_are_listed, "carray/images/pixels.py", "def f() -> None: ..."),
    (exports_are_listed, "carray/images/pixels.py", '__all__ = ["g"]\ndef f() -> None: ...'),
    (names_say_something, "carray/core/utils.py", ""),
    (nothing_read_can_run, "carray/images/pixels.py", "import pickle"),
    (nothing_read_can_run, "carray/images/pixels.py", "torch.load(path)"),
    (nothing_read_can_run, "carray/images/pixels.py", "subprocess.run(line, shell=True)"),
    (nothing_read_can_run, "carray/images/pixels.py", "yaml.load(text)"),
    (imports_are_declared, "carray/images/pixels.py", "import tensorflow"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule: Callable[[Source], list[str]]) -> None:
    """Hold a rule over every module, after showing that it complains of each bad example."""
    examples = [(path, text) for broken, path, text in BROKEN if broken is rule]
    assert examples and all(rule(Source(path, text, ast.parse(text))) for path, text in examples)
    assert [f"{path}: {complaint}" for path in MODULES for complaint in rule(read_source(path))] == []


def test_no_import_cycle() -> None:
    assert find_cycle({path: read_source(path) for path in MODULES}) == []


def test_a_cycle_is_found() -> None:
    texts = {
        "carray/images/pixels.py": "import carray.images.vehicles",
        "carray/images/vehicles.py": "def f():\n    import carray.images.pixels",
    }
    assert len(find_cycle({path: Source(path, text, ast.parse(text)) for path, text in texts.items()})) == 3


def find_cycle(sources: dict[str, Source]) -> list[str]:
    names = {".".join(source.place).removesuffix(".__init__"): source for source in sources.values()}
    graph = {
        name: {".".join(parts) for _, parts in own_imports(source)} & set(names) - {name}
        for name, source in names.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        return list(err.args[1])
    return []


def test_public_names() -> None:
    import carray

    assert sorted(carray.__all__) == ["Classifier", "__version__", "read_predictions"]
    assert all(getattr(carray, name) for name in carray.__all__)
    assert carray.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = carray.no_such_name


def test_jobs_keep_the_rules_of_modules_and_import_nothing_from_tests() -> None:
    rules = (imports_are_absolute, modules_say_what_they_make, results_are_annotated, nothing_read_can_run)
    sizes = (modules_are_short, functions_are_short)
    sources = [read_source(path) for path in JOBS]
    assert [f"{source.path}: {said}" for source in sources for rule in rules + sizes for said in rule(source)] == []
    of_tests = {"tests", *(path.stem for path in (ROOT / "tests").rglob("*.py")), *os.listdir(ROOT / "tests")} - {
        "search"
    }
    imported = [(source.path, name.split(".")[0]) for source in sources for _, name in imported_modules(source)]
    assert [pair for pair in imported if pair[1] in of_tests] == []


def test_no_command_but_the_demo_loads_what_tests_share() -> None:
    users = {path for path in MODULES for _, parts in own_imports(read_source(path)) if parts[0] == "testing"}
    assert {path for path in users if not path.startswith("carray/testing/")} == {"carray/demo.py"}


def test_dependencies_are_needed_where_they_say() -> None:
    """The comment behind a dependency names modules that exist, and each of them mentions it."""
    for name, comment in declared_dependencies().items():
        paths = re.findall(r"[\w/]+\.py", comment)
        assert paths, f"{name}: a comment that names the module is missing"
        if name not in {"torchvision", "onnxscript"}:  # imported by timm and by torch's exporter, not by us
            wanted = {module for module, distribution in DISTRIBUTIONS.items() if distribution == name} | {name}
            texts = {path: (ROOT / "carray" / path).read_text() for path in paths}
            assert [f"{name}: {path}" for path, text in texts.items() if not any(word in text for word in wanted)] == []


def test_the_lock_file_holds_what_pyproject_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    wanted = [Requirement(line) for line in (*project["dependencies"], *extras)]
    lines = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1] not in "#"]
    locked = {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in lines}
    wrong = [str(one) for one in wanted if not one.specifier.contains(locked.get(canonicalize_name(one.name), "0"))]
    assert wrong == [], "run `make lock`"


def loaded_modules(program: str) -> set[str]:
    """Run a program in a new Python and give the top-level packages that it loaded."""
    ending = "import sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{ending}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


HELP = """
import runpy, sys
sys.argv = ["carray", "--help"]
try:
    runpy.run_module("carray", run_name="__main__")
except SystemExit as err:
    assert not err.code, err.code
"""


@pytest.mark.parametrize(
    ("program", "forbidden"),
    [
        (HELP, [*(set(HEAVY) - {"rich"}), "pandas", "pyarrow", "numpy"]),
        ("import carray", [*(set(HEAVY) - {"rich"}), "pandas", "pyarrow", "numpy"]),
        (
            "import carray.classify.score_shard, carray.bundle.scorer",
            ["torch", "torchvision", "timm", "ray", "onnxruntime", "openvino"],
        ),
        ("import carray.queries, carray.evaluation.evaluate", HEAVY),
    ],
    ids=["help", "carray", "classify-worker", "queries"],
)
def test_import_weight(program: str, forbidden: list[str]) -> None:
    assert loaded_modules(program) & set(forbidden) == set()


def test_import_weight_can_fail() -> None:
    assert "duckdb" in loaded_modules("import duckdb")
