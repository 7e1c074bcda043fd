"""Kinds of the arguments of what reads from the Hub and publishes there."""

from __future__ import annotations

from nvfp4_prep._util.arguments import (
    FLAG,
    PATH,
    PROGRESS,
    TEXT,
    THREADS,
    Kind,
    either,
    instance,
    offering,
    optional,
)
from nvfp4_prep.hub.address import HubAddress, parse_address
from nvfp4_prep.hub.errors import Patience
from nvfp4_prep.hub.publish_options import PublishOptions

__all__ = ["CLIENT", "HUB_ADDRESS", "PATIENCE", "PUBLISH_OPTIONS", "PUSHING"]


def _address(value: object) -> HubAddress:
    text = TEXT.take(value)
    address = parse_address(text if text.startswith("hf://") else f"hf://{text}")
    if address is None:
        raise ValueError
    return address


HUB_ADDRESS = either(instance(HubAddress), Kind("'ORG/NAME' or 'ORG/NAME@REVISION'", _address))
CLIENT = optional(offering("a client of the Hub (huggingface_hub.HfApi)", "model_info", "create_commit"))
PATIENCE = optional(instance(Patience))
PUBLISH_OPTIONS = optional(instance(PublishOptions))
PUSHING = {
    "checkpoint": PATH,
    "repo_id": TEXT,
    "options": PUBLISH_OPTIONS,
    "full": FLAG,
    "api": CLIENT,
    "patience": PATIENCE,
    "progress": optional(PROGRESS),
    "threads": optional(THREADS),
}
"""Kinds of the arguments of a push and of its preview."""
