"""Steelyard: turn broad prior data into values, then adapt them with very little."""

__version__ = "0.1.0"
