"""Helpers of the tests with a real engine: its HTTP server, small whole models, and the source in the same engine."""
