"""Who may import whom, and what importing costs."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import recray

ROOT = Path(recray.__file__).parent

# lower rooms first; a room may import its own level only where the architecture orders it
LEVEL = {
    "version": -1, "errors": 0, "plugins": 0.05, "config": 0.1, "storage": 0.2, "dataset": 1.0, "model": 1.0,
    "bundle": 1.1, "inference": 1.2, "release": 1.2, "privacy": 1.2, "evaluation": 1.3,
    "cluster": 2.0, "prepare": 2.1, "training": 2.1, "snapshot": 2.1, "tracking": 2.1, "events": 2.1,
    "report": 2.2,
    "serving": 3, "client": 3.1, "stages": 3.5, "search": 3.6, "pipeline": 4, "api": 4.05, "testing": 4.05,
    "benchmark": 4.1, "cli": 4.2, "__init__": 9,
}  # fmt: skip


def files():
    return sorted(ROOT.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {
                f"{node.module}.{alias.name}" if node.module == "recray" else node.module
                for alias in node.names
            }
    return imported


def own(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_room_has_a_level():
    assert {own(path) for path in files()} == set(LEVEL)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    me = own(path)
    for module in imports(path):
        top = module.split(".")[0]
        if top == "recray" and room(module) in LEVEL and room(module) != me:
            assert LEVEL[room(module)] < LEVEL[me], f"{me} imports {module}"
        if top == "mlflow":
            assert me == "tracking"
        if top == "opacus":
            assert me == "privacy" or path.name == "vanilla_peer.py"
        if top == "ray":
            assert LEVEL[me] >= 2, f"{me} imports ray"
        if top == "policies":
            assert me in ("stages", "benchmark")


def test_no_modules_import_each_other():
    """Neither in functions nor for types alone."""
    modules = {
        ".".join(["recray", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in files()
    }
    graph = {}
    for name, path in modules.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= (submodules & set(modules)) | (
                    {node.module} if submodules - set(modules) else set()
                )
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & set(modules)
    assert graph["recray.serving.service"] >= {"recray.serving.query", "recray.errors"}, (
        "else this sees nothing"
    )
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_policies_are_learned_beside_the_endpoint_not_in_it():
    for path in sorted((ROOT.parent / "policies").rglob("*.py")):
        for module in imports(path):
            top = module.split(".")[0]
            if top == "recray":
                assert LEVEL[room(module)] < LEVEL["serving"], f"{path.name} imports {module}"
            if top in ("ray", "gymnasium"):
                assert path.name in ("learner.py", "environment.py", "adapt.py"), (
                    f"{path.name} imports {module}"
                )
            assert top not in ("mlflow", "pickle", "cloudpickle"), f"{path.name} imports {module}"


def test_the_network_and_its_loop_need_torch_and_numpy_alone():
    allowed = {"torch", "numpy", "recray"} | set(sys.stdlib_module_names)
    for name in ("model", "training/loop.py", "evaluation/metrics.py"):
        for path in sorted((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / name]:
            assert {module.split(".")[0] for module in imports(path)} <= allowed, path


@pytest.mark.parametrize(
    "imports_in_turn",
    [
        {
            "recray": "ray torch mlflow pyarrow pandas",
            "recray.evaluation.metrics": "ray mlflow torch pyarrow",
            "recray.model.network": "ray mlflow pyarrow pandas pydantic",
            "recray.training.loop": "ray mlflow pyarrow pandas pydantic",
            "recray.inference.predictor": "ray mlflow pydantic",
        },
        {"recray.cli": "ray torch mlflow"},
    ],
    ids=["library", "command"],
)
def test_importing_costs_no_more_than_it_should(imports_in_turn):
    """One module after the other in one process: none brings in what it must not."""
    code = "import sys, importlib\n"
    for module, forbidden in imports_in_turn.items():
        code += f"importlib.import_module({module!r})\n"
        code += f"print({module!r}, [m for m in {forbidden.split()!r} if m in sys.modules])\n"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [f"{module} []" for module in imports_in_turn]


def test_no_pickle_is_written_or_read():
    names = {"pickle", "cloudpickle", "joblib", "dill", "shelve"}
    for path in files():
        assert not {module.split(".")[0] for module in imports(path)} & names, path
        text = path.read_text()
        assert "torch.save(" not in text and "torch.load(" not in text and "allow_pickle=True" not in text, (
            path
        )
