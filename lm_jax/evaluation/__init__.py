"""Benchmarks: models and responses measured by rules and tasks that others wrote. Needs the extra `eval`."""
