"""Helpers of the tests: oracles, small checkpoints, stand-ins for servers and for the Hub."""
