"""The command `steelyard`."""
