"""Benchmarks: models and responses measured by rules and tasks that others wrote, or by a judge."""
