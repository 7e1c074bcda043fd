"""Execution of a plan: workers, jobs, results, and the files that are written last."""
