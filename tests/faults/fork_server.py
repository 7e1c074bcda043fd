"""Server that runs one command per forked child: everything is imported once, and a run costs milliseconds.

Started as ``python -m faults.fork_server SCRATCH`` by :mod:`faults.fork_client`, with the fault library in LD_PRELOAD
where faults are wanted. One JSON request on a line of stdin, one JSON answer on a line of stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import pkgutil
import resource
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.guard import watch_writes

Program = Callable[[list[str]], None]
_COUNTERS = struct.Struct("@ll")


def _command_line(arguments: list[str]) -> None:
    from nvfp4_prep.cli import main

    sys.argv = ["nvfp4-prep", *arguments]
    main()


def _load(arguments: list[str]) -> None:
    """Load whole layers with the Python API, every byte checked: the directory, then the numbers of the layers."""
    import nvfp4_prep
    from nvfp4_prep.errors import NvfpPrepError
    from nvfp4_prep.load import LoadOptions

    path, *layers = arguments
    try:
        for layer in layers:
            nvfp4_prep.load_layer(path, int(layer), options=LoadOptions(threads=1, verify=True))
    except NvfpPrepError as error:
        print(f"error: {error}".encode("ascii", "backslashreplace").decode(), file=sys.stderr)
        raise SystemExit(error.exit_code) from error


def _careless(arguments: list[str]) -> None:
    """Copy a checkpoint as nobody should: config first, files under their final names, errors passed over."""
    made, target = map(Path, arguments)
    target.mkdir(exist_ok=True)
    for path in sorted(made.iterdir(), key=lambda path: path.suffix != ".json"):
        with contextlib.suppress(OSError):
            (target / path.name).write_bytes(path.read_bytes())


PROGRAMS: dict[str, Program] = {"cli": _command_line, "load": _load, "careless": _careless}


def import_everything() -> None:
    """Import all modules of the converter but those of the servers, which are not installed here."""
    import torch

    torch.set_num_threads(1)
    import nvfp4_prep

    for module in pkgutil.walk_packages(nvfp4_prep.__path__, "nvfp4_prep."):
        if not module.name.startswith(("nvfp4_prep.vllm", "nvfp4_prep.sglang")) and "__main__" not in module.name:
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)


def warm_up(folder: Path) -> None:
    """Run what is slow only once: first calls of torch's operators, compiled expressions, late imports."""
    import nvfp4_prep

    nvfp4_prep.write_sample(folder / "source", nvfp4_prep.SampleModel(layers=2, experts=1, intermediate=16, hidden=64))
    nvfp4_prep.convert(folder / "source", folder / "prepared")
    nvfp4_prep.run_smoke(folder / "prepared")
    nvfp4_prep.relayout(folder / "prepared", folder / "other", gate_up_block=16)
    nvfp4_prep.restore(folder / "prepared", folder / "restored")
    nvfp4_prep.verify(folder / "prepared", source=folder / "source")


def arm(fault: dict[str, Any], counters: mmap.mmap) -> None:
    """Arm the preloaded library in this process."""
    library = ctypes.CDLL(None)
    trace = os.open(fault["trace"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if fault["trace"] else -1
    address = ctypes.addressof(ctypes.c_char.from_buffer(counters))
    library.nvfp4_fault_arm(
        os.fsencode(fault["prefix"]),
        ctypes.c_long(fault["at"]),
        fault["error"],
        int(fault["for_good"]),
        trace,
        ctypes.c_void_p(address),
    )


def limit_memory() -> None:
    """Take no more than 3 GiB above what this process has, whatever a hostile file asks for."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_nbytes = pages * mmap.PAGESIZE + 3 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit_nbytes, limit_nbytes))


def run_child(request: dict[str, Any], scratch: Path, counters: mmap.mmap) -> None:
    """Run the program in this forked child, and end the process with its exit code."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(request["seconds"])
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if request.get("guard"):
            watch_writes(request["guard"], scratch / "guard")
            limit_memory()
        if request.get("fault"):
            arm(request["fault"], counters)
        PROGRAMS[request["program"]](request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def answer(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run one request in a child of its own and describe how it ended."""
    counters = mmap.mmap(-1, mmap.PAGESIZE)
    (scratch / "guard").unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        run_child(request, scratch, counters)
    _, status, usage = os.wait4(child, 0)
    points, broken = _COUNTERS.unpack_from(counters)
    guard = scratch / "guard"
    return {
        "code": os.waitstatus_to_exitcode(status),
        "points": points,
        "broken": broken,
        "max_rss_nbytes": usage.ru_maxrss * 1024,
        "outside": guard.read_text("ascii").splitlines() if guard.exists() else [],
    }


def serve(scratch: Path) -> None:
    """Answer requests until stdin ends."""
    import_everything()
    warm_up(scratch / "warm")
    assert threading.active_count() == 1, "a child of a process with threads may hang"
    gc.collect()
    gc.freeze()  # or every child's first collection would copy the memory of all modules
    before_nbytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"ready": True, "rss_nbytes": before_nbytes}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), scratch)), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
