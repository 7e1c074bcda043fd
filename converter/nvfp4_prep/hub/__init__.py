"""The Hugging Face Hub as source and as place of publication, through the official client (1.x and 2.x)."""

from nvfp4_prep.hub.address import HubAddress, parse_address

__all__ = ["HubAddress", "parse_address"]
