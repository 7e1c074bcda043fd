"""Imported by the process from which ranks are forked: SGLang on a CPU, before anything of it is used."""

from __future__ import annotations

import importlib

from sglang_on_cpu import bring_up

bring_up()
importlib.import_module("sglang.srt.models.registry")  # all model classes
