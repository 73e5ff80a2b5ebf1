"""Where agents act: Gymnasium adapters, and behaviour policies that make prior data."""
