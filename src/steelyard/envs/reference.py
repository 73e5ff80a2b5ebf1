"""Reference returns for normalised scores: facts published with D4RL.

score = 100 * (return - random) / (expert - random), where both are the mean undiscounted returns that D4RL measured on
the dense rewards (`d4rl/infos.py`, Farama Foundation, tables REF_MIN_SCORE and REF_MAX_SCORE). Maze and kitchen tasks
are reported as success, so they have none here.

The numbers belong to D4RL's own simulators. Later packages changed some rewards without a new version number (the
dense Adroit rewards of gymnasium-robotics 1.2.1, for one): compare scores only within one package version.
"""

from __future__ import annotations

from steelyard.errors import ConfigError

# task: (random, expert)
REFERENCE_RETURNS: dict[str, tuple[float, float]] = {
    "AdroitHandPen": (96.262799, 3076.8331017826877),
    "AdroitHandHammer": (-274.856578, 12794.134825156867),
    "AdroitHandRelocate": (-6.425911, 4233.877797728884),
    "AdroitHandDoor": (-56.512833, 2880.5693087298737),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
    "Hopper": (-20.272305, 3234.3),
    "Ant": (-325.6, 3879.7),
}


def reference_range(env_id: str) -> tuple[float, float] | None:
    """Return (random, expert) returns of an environment id with or without its version; None if none are published."""
    return REFERENCE_RETURNS.get(env_id.rsplit("-v", maxsplit=1)[0])


def normalized_score(env_id: str, episode_return: float) -> float:
    """Return the D4RL normalised score: 0 for a random policy, 100 for D4RL's expert.

    Args:
        env_id: id with or without its version, e.g. "AdroitHandDoor-v1" or "Hopper".
        episode_return: undiscounted return on the dense reward.

    Raises:
        ConfigError: no reference is published for the environment.
    """
    returns = reference_range(env_id)
    if returns is None:
        raise ConfigError(f"no reference returns for {env_id!r}; known are {', '.join(sorted(REFERENCE_RETURNS))}")
    random, expert = returns
    return 100.0 * (episode_return - random) / (expert - random)
