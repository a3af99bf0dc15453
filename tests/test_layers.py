"""The package's folders stand on one another: each imports only those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cnnrnn

ROOT = Path(cnnrnn.__file__).parent

# From the ground up. What stands in one line is a folder or a module beside it.
LAYERS = (
    "_build_info", "_build_check", "config", "machine", "labels", "metrics", "reveal", "data",
    "network", "search", "prediction", "model", "training", "export", "evaluation", "api",
    "inspection", "deployment",
    "comparison", "cli", "__main__",
)  # fmt: skip


def layer(module: str) -> str:
    """The folder, or the module at the top, that a dotted name of the package belongs to."""
    return module.split(".")[1]


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, modules: set[str]) -> list[tuple[int, str]]:
    """Lines and modules of the package that are imported, inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name.startswith("cnnrnn.")]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module is not None:
            if node.module.split(".")[0] != "cnnrnn":
                continue
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.append((node.lineno, whole if whole in modules else node.module))
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((node.lineno, "a relative import"))
    return found


FILES = sorted(
    file for file in ROOT.rglob("*.py") if file.parent != ROOT or file.stem != "__init__"
)
MODULES = {module_of(file) for file in FILES} | {"cnnrnn._build_info"}


def test_every_module_has_its_place():
    assert {layer(module) for module in MODULES} == set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nothing_imports_what_stands_above_it(file):
    own = LAYERS.index(layer(module_of(file)))
    for line, module in imported(ast.parse(file.read_text(encoding="utf-8")), MODULES):
        assert module.startswith("cnnrnn"), f"{file}, line {line}: {module}"
        if module in ("cnnrnn", "cnnrnn._C"):  # its version, and the extension
            continue
        assert LAYERS.index(layer(module)) <= own, f"{file}, line {line} imports {module}"


def test_there_is_no_circle():
    """Not inside a folder either, but for imports that a function makes when it is called."""
    graph: dict[str, set[str]] = {}
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        at_import = ast.Module([n for n in tree.body if not _is_for_types(n)], type_ignores=[])
        for node in ast.walk(at_import):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                node.body = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                if isinstance(node, ast.FunctionDef):
                    node.body = []
        graph[module_of(file)] = {m for _, m in imported(at_import, MODULES) if m in MODULES}
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph.get(module, ()):
                follow(other, (*path, module))
            done.add(module)

    for module in graph:
        follow(module, ())


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_an_import_that_runs_up_is_found():
    tree = ast.parse("def f():\n    from cnnrnn.training import run\n")
    ((line, module),) = imported(tree, MODULES)
    assert (line, module) == (2, "cnnrnn.training.run")
    assert LAYERS.index(layer(module)) > LAYERS.index("prediction")


def test_only_what_every_installation_has_is_imported_at_once():
    """The extras are asked for where they are used, so that what needs none works without."""
    extras = ("timm", "torchvision", "sklearn", "scipy", "pycocotools", "onnx", "onnxscript",
              "onnxruntime", "defusedxml", "tensorboard", "torch.utils.tensorboard",
              "matplotlib", "jinja2", "markupsafe")  # fmt: skip
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                found = [e for e in extras if name == e or name.startswith(f"{e}.")]
                assert not found, f"{file}, line {node.lineno} imports {name}"
