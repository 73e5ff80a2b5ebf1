"""Your own environment and data, from first episode to trained policy, in less than a minute on a CPU.

    python examples/bring_your_own.py --out runs/bring_your_own

A point in a square has to reach the middle. Eighty clumsy episodes are recorded, checked, used for offline Cal-QL and
fine-tuned online; then the policy is loaded and acts. Needs the core and `pip install 'steelyard[data]'`.
"""

import argparse
from pathlib import Path

import gymnasium
import numpy as np

import steelyard
from steelyard.data.doctor import diagnose
from steelyard.data.returns import RewardConfig
from steelyard.envs.gym import EnvConfig, make, spec_of
from steelyard.objectives import CalQLConfig
from steelyard.objectives.actor_critic import NetworkConfig
from steelyard.train.online import OnlineConfig
from steelyard.workflows.control import ControlRun, DataConfig, EvaluationConfig, start


class Reach(gymnasium.Env):
    """Position in [-1, 1]^2; an action moves it by up to 0.15; reward 1 and the end within 0.2 of the middle."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        angle = self.np_random.uniform(0, 2 * np.pi)  # all randomness from np_random: episodes can be replayed exactly
        self.position = np.array([np.cos(angle), np.sin(angle)], np.float32)
        return self.position.copy(), {}

    def step(self, action):
        self.position = np.clip(self.position + 0.15 * np.asarray(action, np.float32), -1, 1)
        reached = bool(np.linalg.norm(self.position) < 0.2)
        return self.position.copy(), float(reached), reached, False, {}


if "Reach-v0" not in gymnasium.registry:
    gymnasium.register("Reach-v0", entry_point=Reach, max_episode_steps=30)
ENV = EnvConfig("bring_your_own:Reach-v0", success="terminated")  # "module:id" imports the module first


def record(seed: int) -> steelyard.Episode:
    rng, env = np.random.default_rng(seed), make(ENV)
    observations, actions, rewards, terminated, truncated = [env.reset(seed=seed)[0]], [], [], False, False
    while not (terminated or truncated):
        wish = -0.2 * observations[-1] + rng.normal(0, 0.6, 2)  # mostly noise, a little drift to the middle
        actions.append(np.clip(wish, -1, 1).astype(np.float32))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
    return steelyard.Episode(np.array(observations), np.array(actions), np.array(rewards), terminated, not terminated)


def main(out: Path, offline_steps: int, env_steps: int) -> None:
    spec = spec_of(make(ENV), ENV)  # shapes and bounds, so that data and environment can be compared
    store = steelyard.Store.from_episodes((record(seed) for seed in range(80)), out / "data", spec=spec)
    report = diagnose(store)
    report.print()
    assert not report.faults
    config = ControlRun(
        objective=CalQLConfig(network=NetworkConfig((64, 64), (64, 64)), discount=0.95, actor_lr=1e-3, num_samples=4),
        data=DataConfig(str(out / "data"), rewards=RewardConfig(bias=-1.0, horizon="sparse")),  # -1 a step, 0 at the end
        env=ENV,
        offline_steps=offline_steps,
        batch_size=128,
        online=OnlineConfig(env_steps=env_steps),
        evaluation=EvaluationConfig(episodes=20, every_offline=offline_steps, every_online=max(1, env_steps // 2)),
    )
    run = start(config, out / "run")
    policy = steelyard.load(run)  # weights, normalisers and spec; numpy in, numpy out
    env = make(ENV)
    observation, _ = env.reset(seed=123)
    for step in range(1, 31):
        observation, reward, terminated, _, _ = env.step(policy(observation))
        if terminated:
            print(f"loaded policy: reached the middle after {step} steps, reward {reward:g}")
            break
    print(f"next: steelyard report {run}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bring_your_own"))
    parser.add_argument("--offline-steps", type=int, default=1500)
    parser.add_argument("--env-steps", type=int, default=500)
    main(**vars(parser.parse_args()))
