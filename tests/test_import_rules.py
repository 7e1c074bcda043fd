"""Import rules of the package, read from the syntax trees: data goes one way, and `--help` stays fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from nvfp4_prep.layouts import LAYOUTS
from support.paths import ROOT

CONVERTER = ROOT / "converter"
KERNELS = ROOT / "kernels"
PACKAGE = "nvfp4_prep"

GROUND = ("_version", "errors", "layouts", "options", "_util")
"""Modules and packages that everything may import."""
ORDER = (
    "checkpoint",
    "formats",
    "moe",
    "output",
    "hub",
    "planning",
    "prepared",
    "smoke",
    "pipeline",
    "commands",
    "report",
)
"""A package imports only what stands before it."""
SERVING = ("load", "serving", "vllm", "sglang")
"""Run inside a server: they read prepared checkpoints and never make one. In this order; no plugin imports another."""
CLOSED_TO_SERVING = ("pipeline", "planning", "output", "commands", "hub")
TOP = ("publish", "cli", "__main__", "__init__")
"""On top: nothing below imports them."""
TOP_FOLDER_LIMIT = 6
LEVELS_LIMIT = 10
"""Packages on the longest chain of imports; of modules it is about twice as long, see benchmarks/house.py."""


def module_of(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_of(path, CONVERTER): path for path in sorted((CONVERTER / PACKAGE).rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def place_of(module: str) -> str:
    """Return the package, or the module of the top folder, that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def imports_of(module: str, *, top_level_only: bool = False, for_types: bool = False) -> frozenset[str]:
    """Return the own modules that a module imports; ``for_types`` with those that only a type checker sees."""
    tree = tree_of(module)
    skipped = {
        id(inner)
        for node in tree.body
        if not for_types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE}
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else node.module)
    return frozenset(found)


def arrows() -> list[tuple[str, str]]:
    return [(module, target) for module in modules() for target in imports_of(module)]


def test_every_package_has_a_place() -> None:
    known = {*GROUND, *ORDER, *SERVING, *TOP}
    assert {place_of(module) for module in modules()} <= known


def test_the_top_folder_stays_small() -> None:
    assert len(list((CONVERTER / PACKAGE).glob("*.py"))) <= TOP_FOLDER_LIMIT


def may_import(importer: str, imported: str) -> bool:
    """Return whether a package may import another one."""
    if importer == imported or imported in GROUND:
        return importer not in GROUND or imported in GROUND
    if importer in ("__init__", "cli", "__main__"):
        return True
    if importer == "publish":
        return imported in ORDER
    if importer == "commands" and imported in SERVING:
        return True  # doctor asks the plugins what they would say; they never import commands
    if importer in SERVING:
        lower = imported not in SERVING or SERVING.index(imported) < SERVING.index(importer)
        return lower and imported not in (*CLOSED_TO_SERVING, *TOP) and (importer, imported) != ("sglang", "vllm")
    if importer == "output":
        return imported == "checkpoint"  # it knows nothing of MoE
    if importer in ORDER:
        return imported in ORDER and ORDER.index(imported) < ORDER.index(importer)
    return False


def test_imports_go_one_way() -> None:
    wrong = [
        f"{importer} imports {imported}"
        for importer, imported in arrows()
        if not may_import(place_of(importer), place_of(imported))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("checkpoint", "moe"),
        ("output", "planning"),
        ("output", "moe"),
        ("load", "pipeline"),
        ("vllm", "hub"),
        ("serving", "vllm"),
        ("serving", "sglang"),
        ("load", "serving"),
        ("sglang", "vllm"),
        ("_util", "checkpoint"),
        ("hub", "commands"),
    ],
)
def test_the_rule_can_fail(importer: str, imported: str) -> None:
    assert not may_import(importer, imported)


def test_the_names_of_layouts_and_kernels_stand_in_one_module() -> None:
    names = {name for facts in LAYOUTS.values() for name in (facts.kernel, facts.vllm_backend, facts.flag)}
    found = {
        module
        for module in modules()
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == {"nvfp4_prep.layouts"}


@pytest.mark.parametrize("kinds", [{"top_level_only": True}, {"for_types": True}], ids=["at run time", "at all"])
def test_no_import_cycle(kinds: dict[str, bool]) -> None:
    """Nor one through a function or for a type checker; but the root names all that is public."""
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != 1, " -> ".join((*path, module))
        if module in state:
            return
        state[module] = 1
        for target in sorted(imports_of(module, **kinds)):
            if target in modules() and target != PACKAGE:
                visit(target, (*path, module))
        state[module] = 2

    for module in modules().keys() - {PACKAGE}:
        visit(module, ())


def test_packages_stand_on_few_levels() -> None:
    below: dict[str, set[str]] = {}
    for module in modules():
        place = "ground" if place_of(module) in GROUND else place_of(module)
        targets = {place_of(target) for target in imports_of(module, top_level_only=True)}
        below.setdefault(place, set()).update("ground" if target in GROUND else target for target in targets)

    @cache
    def level(place: str) -> int:
        return 1 + max((level(other) for other in below[place] - {place}), default=0)

    assert max(map(level, below)) <= LEVELS_LIMIT


def test_kernels_do_not_import_the_converter() -> None:
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] != PACKAGE, path


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = ("torch", "safetensors", "huggingface_hub", "triton", "flashinfer", "jinja2")
    code = (
        "import sys, contextlib\n"
        f"sys.argv = ['nvfp4-prep', *{arguments!r}]\n"
        "from nvfp4_prep.cli import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        f"print('HEAVY', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    code = code.replace("with contextlib.suppress(SystemExit): main()", "try: main()\nexcept SystemExit: pass")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "HEAVY []" in done.stdout, done.stdout[-300:] + done.stderr[-300:]


def test_design_has_one_row_a_package() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    packages = {path.parent.name for path in (CONVERTER / PACKAGE).glob("*/__init__.py")}
    for package in sorted(packages):
        assert f"| `{package}/` |" in text, f"docs/design.md has no row for {package}/"
