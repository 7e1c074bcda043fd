"""Helpers of the tests that run a real server's code on the CPU."""
