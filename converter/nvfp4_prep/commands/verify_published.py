"""Verification of what is published, from the Hub's own listing and a few ranges instead of a download."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from nvfp4_prep._util.arguments import checked
from nvfp4_prep.commands.verify_report import STRUCTURE, VerifyReport, edited_config_lines
from nvfp4_prep.hub.address import HubAddress
from nvfp4_prep.hub.argument_kinds import CLIENT, HUB_ADDRESS, PATIENCE
from nvfp4_prep.hub.errors import Patience
from nvfp4_prep.hub.range_source import RangeSource
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.problems import Problems
from nvfp4_prep.prepared.structure import check_structure

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["verify_published"]


@checked(address=HUB_ADDRESS, api=CLIENT, patience=PATIENCE)
def verify_published(
    address: HubAddress | str, *, api: HfApi | None = None, patience: Patience | None = None
) -> VerifyReport:
    """Check a published checkpoint against its manifest without downloading its weights.

    Every file's size and sha256 as the Hub lists them (it computes the hash of what it stores), the small files' bytes,
    the stamp, and headers and index by range. What it cannot see is whether the manifest's hashes describe a right
    conversion: that takes the bytes (``nvfp4-prep verify`` on a download).

    Args:
        address: of the repository; a text, ``ORG/NAME@REVISION``, is taken for one.
        api: the official client; by default with the user's endpoint and token.
        patience: how long network failures are endured.

    Raises:
        UsageError: if an argument is not what it must be.
        CheckpointError: if the repository holds no stamped checkpoint.
        HubError: if it cannot be reached or read.
    """
    files = RangeSource(HUB_ADDRESS.take(address), patience=patience, api=api)
    with PreparedCheckpoint.of(str(address), files) as opened:
        problems = Problems()
        compared = _compare(files, opened.manifest, problems.of("published"))
        check_structure(opened, problems.of("structure"))
        checks = (
            f"published: sizes and hashes of {compared} files against the manifest, as the Hub lists them"
            f" at commit {files.snapshot.commit}",
            STRUCTURE,
            *edited_config_lines(opened.manifest),
        )
        return VerifyReport(
            opened.path,
            opened.manifest,
            "published",
            problems.found,
            checks,
            files.received_nbytes,
            opened.manifest_sha256,
        )


def _compare(files: RangeSource, manifest: Manifest, problems: Problems) -> int:
    listed = files.snapshot.files
    for name, record in manifest.files.items():
        remote = listed.get(name)
        if remote is None or remote.nbytes != record.nbytes:
            continue  # the structure's check says so
        sha256 = remote.sha256 or hashlib.sha256(files.downloader.read_whole(remote)).hexdigest()
        if sha256 != record.sha256:
            problems.add(name, "holds other bytes than the manifest says", f"sha256 {record.sha256}", sha256)
    return len(manifest.files)
