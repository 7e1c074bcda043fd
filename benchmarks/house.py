"""Compare the house of two revisions: structure from the syntax trees, traced paths, and what the commands write.

    python benchmarks/house.py                       # c64e05e, before the rebuilding, against HEAD
    python benchmarks/house.py OLD NEW --no-outputs  # the structure alone, seconds

Each revision is unpacked by ``git archive`` into a temporary folder and run by this Python, so an editable install of
the working tree is not used. Prints Markdown.

Definitions:

- *Import levels*: modules on the longest chain of imports at module level; those for type checkers and those inside
  functions are left out. *Package levels*: the same over packages and top modules, ``errors`` and ``_util`` being one
  ground; in a flat folder each module is its own package. An *arrow* is a pair of which one imports the other, imports
  inside functions included; two packages that reach each other *run back up*, and so does an import of the root.
- *Modules entered*: those of the converter of which a function was called with the object (a ``LocalSource`` in
  ``convert``, a ``PreparedCheckpoint`` in ``verify``) as an argument or ``self``, by a profile of a real small run.
- *Places that know the dtype*: conditionals and mappings of two that yield both dtypes of an expert tensor, U8 and
  F8_E4M3, by safetensors' or torch's names.
- *Lines of code*: neither blank, comment nor docstring.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "tests" / "data" / "checkpoints"
PACKAGE = "nvfp4_prep"
GROUND = {"errors": "ground", "_util": "ground"}
FIRST_BYTES = {"U8", "uint8"}
SCALE_BYTES = {"F8_E4M3", "float8_e4m3fn"}


def unpack(revision: str, folder: Path) -> Path:
    """Unpack the sources of a revision; ``WORK`` is the working tree."""
    if revision == "WORK":
        for root in ("converter", "kernels", "tests"):
            shutil.copytree(ROOT / root, folder / root, ignore=shutil.ignore_patterns("__pycache__"))
        return folder
    folder.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "converter", "kernels", "tests"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def modules(tree: Path) -> dict[str, ast.Module]:
    found = {}
    for path in sorted((tree / "converter" / PACKAGE).rglob("*.py")):
        parts = list(path.relative_to(tree / "converter").with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, trees: Mapping[str, ast.Module], *, top_only: bool) -> set[str]:
    tree = trees[name]
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in trees else node.module)
    return {other for other in found if other in trees} - {name}


def levels(graph: Mapping[str, set[str]]) -> int:
    known: dict[str, int] = {}

    def level(name: str, above: frozenset[str]) -> int:
        if name in above:
            return 0  # a cycle, which another row counts
        if name not in known:
            known[name] = 1 + max((level(other, above | {name}) for other in graph[name]), default=0)
        return known[name]

    return max(level(name, frozenset()) for name in graph)


def grouped(graph: Mapping[str, set[str]], group: Callable[[str], str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        found.setdefault(group(name), set()).update(group(other) for other in others)
    return {name: others - {name} for name, others in found.items()}


def place_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def ground_of(module: str) -> str:
    return GROUND.get(place_of(module), place_of(module))


def runs_back_up(graph: Mapping[str, set[str]]) -> int:
    """Count the pairs of packages that reach each other."""
    reached: dict[str, set[str]] = {}
    for name in graph:
        todo, seen = [name], set[str]()
        while todo:
            for other in graph.get(todo.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        reached[name] = seen
    return sum(other in reached and name in reached[other] for name, others in graph.items() for other in others) // 2


def code_lines(tree: Path) -> int:
    count = 0
    for path in [*(tree / "converter").rglob("*.py"), *(tree / "kernels").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        silent: set[int] = set()
        for node in ast.walk(ast.parse(text)):
            text_of = node.value if isinstance(node, ast.Expr) else None
            if isinstance(text_of, ast.Constant) and isinstance(text_of.value, str):
                silent |= set(range(text_of.lineno, (text_of.end_lineno or text_of.lineno) + 1))
        count += sum(
            bool(line.strip()) and not line.strip().startswith("#") and number not in silent
            for number, line in enumerate(text.splitlines(), 1)
        )
    return count


def knows_dtype(tree: Path) -> list[str]:
    found = []
    for path in [*(tree / "converter").rglob("*.py"), *(tree / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            small = isinstance(node, ast.Dict) and len(node.keys) == 2
            if not isinstance(node, ast.IfExp) and not small:
                continue
            parts = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
            words = {
                word
                for part in parts
                for inner in ast.walk(part)
                for word in (getattr(inner, "value", None), getattr(inner, "attr", None))
                if isinstance(word, str)
            }
            if words & FIRST_BYTES and words & SCALE_BYTES:
                found.append(f"{path.relative_to(tree)}:{node.lineno}")
    return found


TRACE = """
import json, sys, threading
from pathlib import Path
root, wanted, command = sys.argv[1], sys.argv[2], sys.argv[3:]
entered = set()
def profile(frame, event, argument):
    if event != "call" or not frame.f_code.co_filename.startswith(root):
        return
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    for name in code.co_varnames[:count]:
        if any(kind.__name__ == wanted for kind in type(frame.f_locals.get(name)).__mro__):
            entered.add(code.co_filename[len(root) + 1:])
import nvfp4_prep
threading.setprofile(profile); sys.setprofile(profile)
if command[0] == "convert":
    nvfp4_prep.convert(command[1], command[2])
else:
    nvfp4_prep.verify(command[1])
sys.setprofile(None); threading.setprofile(None)
print(json.dumps(sorted(entered)))
"""


def python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{tree / 'converter'}:{tree / 'kernels'}", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=tree.parent, check=False
    )


def entered(tree: Path, wanted: str, *command: str) -> list[str]:
    done = python(tree, "-c", TRACE, str(tree / "converter" / PACKAGE), wanted, *command)
    if done.returncode:
        raise SystemExit(done.stderr)
    return list(json.loads(done.stdout.splitlines()[-1]))


def structure(tree: Path, sample: Path, work: Path) -> dict[str, Any]:
    trees = modules(tree)
    top = {name: imports(name, trees, top_only=True) for name in trees}
    every = {name: imports(name, trees, top_only=False) for name in trees}
    places = grouped(every, place_of)
    apart = {name: others for name, others in grouped(every, ground_of).items() if name != "__init__"}
    target = work / f"traced-{tree.name}"
    source_path = entered(tree, "LocalSource", "convert", str(sample), str(target))
    checkpoint_path = entered(tree, "PreparedCheckpoint", "verify", str(target))
    return {
        "files in the package's top folder": len(list((tree / "converter" / PACKAGE).glob("*.py"))),
        "packages": len(list((tree / "converter" / PACKAGE).glob("*/__init__.py"))),
        "modules": len(trees),
        "lines of a module, mean": round(sum(1 for _ in all_lines(tree)) / len(trees)),
        "import levels of modules": levels(top),
        "import levels of packages": levels(grouped(top, ground_of)),
        "arrows between modules": sum(map(len, top.values())),
        "arrows between packages": sum(map(len, places.values())),
        "pairs of packages that run back up": runs_back_up(apart),
        "imports of the root or the command line from below": sum(
            place_of(other) in ("__init__", "cli", "__main__")
            for name, others in every.items()
            if place_of(name) not in ("__init__", "cli", "__main__")
            for other in others
        ),
        "modules entered by convert's source": len(source_path),
        "packages entered by convert's source": len({name.split("/")[0] for name in source_path}),
        "modules entered by verify's checkpoint": len(checkpoint_path),
        "packages entered by verify's checkpoint": len({name.split("/")[0] for name in checkpoint_path}),
        "places that know the dtype": len(knows_dtype(tree)),
        "lines of code": code_lines(tree),
    }


def all_lines(tree: Path) -> Iterator[str]:
    for path in (tree / "converter" / PACKAGE).rglob("*.py"):
        yield from path.read_text(encoding="utf-8").splitlines()


COMMANDS = (
    ("inspect", ("inspect", "{source}", "--json")),
    ("convert", ("convert", "{source}", "{out}/prepared")),
    ("verify", ("verify", "{out}/prepared", "--source", "{source}")),
    ("restore", ("restore", "{out}/prepared", "{out}/restored")),
    ("relayout", ("relayout", "{out}/prepared", "{out}/relayout", "--gate-up-block", "32")),
    ("convert, tp 2", ("convert", "{source}", "{out}/tp2", "--moe-tp", "2", "--gate-up-scales", "vllm")),
)
SAMPLES = (
    ("sample", ()),
    ("sample-scales", ("--differing", "0.5")),
    ("sample-padded", ("--intermediate", "208", "--hidden", "336", "--experts", "5")),
)


def run_commands(tree: Path, source: Path, out: Path) -> dict[str, tuple[int, str]]:
    found = {}
    for name, arguments in COMMANDS:
        filled = [argument.format(source=source, out=out) for argument in arguments]
        done = python(tree, "-m", PACKAGE, *filled)
        found[name] = (done.returncode, done.stdout if name == "inspect" else "")
    return found


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def json_differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Yield the keys at which two JSON values differ; numbers of lists become ``[]``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in old or key not in new:
                yield f"{at}.{key} ({'new' if key in new else 'gone'})"
            else:
                yield from json_differences(old[key], new[key], f"{at}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for one, other in zip(old, new, strict=True):
            yield from json_differences(one, other, f"{at}[]")
    elif old != new:
        yield at


def difference(old: Path, new: Path) -> list[str]:
    if not old.exists() or not new.exists():
        return ["only in " + ("the new" if new.exists() else "the old")]
    if old.suffix != ".json":
        return ["text" if old.suffix == ".md" else "BYTES"]
    return sorted(set(json_differences(json.loads(old.read_bytes()), json.loads(new.read_bytes()))))


def compare_outputs(trees: tuple[Path, Path], checkpoints: Path, work: Path) -> None:
    sources = [path for path in sorted(checkpoints.iterdir()) if path.is_dir()]
    for name, arguments in SAMPLES:
        made = work / "samples" / name
        python(trees[0], "-m", PACKAGE, "sample", str(made), *arguments)
        if made.is_dir():
            sources.append(made)
    same = files = 0
    why: dict[str, set[str]] = {}
    exits: list[str] = []
    print("\n| checkpoint | exit codes | output files | identical | of these tensor files | all tensor bytes equal |")
    print("|---|---|---:|---:|---:|---|")
    for source in sources:
        outs = tuple(work / f"out-{tree.name}" / source.name for tree in trees)
        runs = []
        for tree, out in zip(trees, outs, strict=True):
            out.mkdir(parents=True)
            runs.append(run_commands(tree, source, out))
        codes = [" ".join(str(code) for code, _ in run.values()) for run in runs]
        if codes[0] != codes[1]:
            exits.append(f"{source.name}: {codes[0]} -> {codes[1]}")
        if runs[0]["inspect"][0] == runs[1]["inspect"][0] == 0:
            values = [json.loads(run["inspect"][1]) for run in runs]
            why.setdefault("inspect --json", set()).update(json_differences(*values))
        old, new = map(digests, outs)
        tensors = [name for name in old.keys() | new.keys() if name.endswith(".safetensors")]
        equal = [name for name in old.keys() & new.keys() if old[name] == new[name]]
        for name in sorted((old.keys() | new.keys()) - set(equal)):
            why.setdefault(f"{name.split('/')[0]}/{Path(name).name}", set()).update(
                difference(outs[0] / name, outs[1] / name)
            )
        bad = sorted(set(tensors) - set(equal))
        same, files = same + len(equal), files + len(old.keys() | new.keys())
        total = len(old.keys() | new.keys())
        answer = f"NO: {bad}" if bad else "yes" if total else "refused by both"
        print(f"| {source.name} | {codes[1]} | {total} | {len(equal)} | {len(tensors)} | {answer} |", flush=True)
    print(
        f"\n{same} of {files} output files are identical by sha256. The commands: {', '.join(n for n, _ in COMMANDS)}."
    )
    print("Exit codes that differ: " + ("none." if not exits else "; ".join(exits)))
    print("\nWhat differs, over all checkpoints:\n")
    for name, keys in sorted(why.items()):
        if keys:
            print(f"- `{name}`: {', '.join(sorted(keys))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default="c64e05e")
    parser.add_argument("new", nargs="?", default="HEAD", help="a revision, or WORK for the working tree")
    parser.add_argument("--no-outputs", action="store_true", help="do not run the commands of both revisions")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="a folder of small ones")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="house-") as folder:
        work = Path(folder)
        trees = unpack(arguments.old, work / "old"), unpack(arguments.new, work / "new")
        sample = work / "traced-sample"
        python(trees[0], "-m", PACKAGE, "sample", str(sample))
        rows = [structure(tree, sample, work) for tree in trees]
        print(f"| | {arguments.old} | {arguments.new} |\n|---|---:|---:|")
        for name in rows[0]:
            print(f"| {name} | {rows[0][name]:,} | {rows[1][name]:,} |")
        print("\nPlaces that know the dtype: " + ", ".join(f"`{place}`" for place in knows_dtype(trees[1])), flush=True)
        if not arguments.no_outputs:
            compare_outputs((trees[0], trees[1]), arguments.checkpoints, work)


if __name__ == "__main__":
    main()
