"""Benchmarks: models and responses measured by rules and tasks that others wrote, or by a judge.

What is lm-eval's needs the extra `eval`.
"""
