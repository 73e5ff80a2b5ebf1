"""Whole runs: data, learner, loop and evaluation put together. One file per kind of work."""
