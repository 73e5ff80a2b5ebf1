"""Suites of runs, their rows and their statistics."""
