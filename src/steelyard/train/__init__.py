"""The one loop, optimisers, checkpoints, guards, the online phase."""
