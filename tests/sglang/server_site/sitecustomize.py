"""Python's start-up file of a server's processes: its folder leads their PYTHONPATH.

SGLang starts scheduler and detokenizer as processes of their own, so what a machine without a GPU needs cannot be done
by the process that a test starts. The helper processes of `multiprocessing` import nothing of SGLang.
"""

from __future__ import annotations

import os
import sys

if not any("resource_tracker" in argument for argument in sys.orig_argv):
    from sglang_on_cpu import bring_up

    bring_up()
    if os.environ.get("NVFP4_PREP_TEST_KERNEL"):
        from sglang_torch_kernel import replace_kernel

        replace_kernel()
    if os.environ.get("NVFP4_PREP_TEST_BROKEN"):
        import nvfp4_prep.sglang.versions

        del nvfp4_prep.sglang.versions.version_problem  # the plugin fails when SGLang calls it
