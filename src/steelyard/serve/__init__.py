"""HTTP services over what was trained (the extra `serve`)."""
