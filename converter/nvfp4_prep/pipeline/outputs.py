"""The skeleton of every command that fills a target: names, room, progress, jobs, and the jobs that come last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nvfp4_prep._util.progress import Progress, default_progress
from nvfp4_prep.output.outline import Outline
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.engine import Hooks, run_jobs
from nvfp4_prep.pipeline.jobs import FileJob
from nvfp4_prep.pipeline.working import working
from nvfp4_prep.planning.disk_space import Room

__all__ = ["OutputJob", "Running", "write_outputs"]

_NO_HOOKS = Hooks()


@dataclass(frozen=True)
class Running:
    """Resources of a run: workers, memory, progress. None of them changes a byte.

    Attributes:
        threads: workers; by default as the engine chooses.
        memory_nbytes: budget of the buffers; by default as the engine chooses.
        progress: receives the counts of bytes.
    """

    threads: int | None = None
    memory_nbytes: int | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class OutputJob:
    """A file that a command makes.

    Attributes:
        name: in the target.
        nbytes: its size.
        job: makes the job, when its turn comes.
        last: whether the job needs the results of all others.
    """

    name: str
    nbytes: int
    job: Callable[[], FileJob]
    last: bool = False


def write_outputs(
    title: str,
    target: Target,
    outputs: Sequence[OutputJob],
    outlines: Mapping[str, Outline],
    running: Running,
    *,
    needed_nbytes: int | None = None,
    files: int | None = None,
    hooks: Hooks = _NO_HOOKS,
    begin: Callable[[], None] = lambda: None,
    end: Callable[[], None] = lambda: None,
) -> int:
    """Write the files that the target's journal does not have.

    Args:
        title: of the progress.
        target: where they go.
        outputs: all files that jobs make, in the order of their start.
        outlines: of those files and of all that come after them, by name.
        running: how.
        needed_nbytes: room in the target; by default what the missing files take.
        files, hooks: see :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
        begin, end: called before the first job and after the last one, while the progress is shown.

    Returns:
        Bytes of the files that were missing.

    Raises:
        TargetError, NoSpaceError: if the target holds something else, or has no room.
        NvfpPrepError: as :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
    """
    target.check_names(outlines, outlines)
    pending = [output for output in outputs if output.name not in target.done]
    missing_nbytes = sum(output.nbytes for output in pending)
    target.check_space(Room(missing_nbytes).needed_nbytes if needed_nbytes is None else needed_nbytes)
    progress = running.progress or default_progress()
    total_nbytes = sum(output.nbytes for output in outputs)
    with working(progress, title, total_nbytes, total_nbytes - missing_nbytes):
        begin()
        for last, threads in ((False, running.threads), (True, 1)):
            run_jobs(
                [output.job() for output in pending if output.last == last],
                target,
                threads=threads,
                memory_nbytes=running.memory_nbytes,
                files=files,
                progress=progress,
                hooks=hooks,
            )
        end()
    return missing_nbytes
