"""Your own environment and data, from the first episode to a trained policy, in less than a minute on a CPU.

    python examples/bring_your_own.py [OUT [OFFLINE_STEPS [ENV_STEPS]]]

Eighty clumsy episodes are recorded, checked, used for offline Cal-QL and fine-tuned online; the policy is loaded, acts.
"""

import sys
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
from steelyard.workflows.control import DataConfig, EvaluationConfig


class Reach(gymnasium.Env):
    """Position in [-1, 1]^2; an action moves it by up to 0.15; reward 1 and the end within 0.2 of the middle."""

    observation_space = action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):  # noqa: D102
        super().reset(seed=seed)
        angle = self.np_random.uniform(0, 2 * np.pi)  # all randomness from np_random: episodes can be replayed exactly
        self.position = np.array([np.cos(angle), np.sin(angle)], np.float32)
        return self.position.copy(), {}

    def step(self, action):  # noqa: D102
        self.position = np.clip(self.position + 0.15 * np.asarray(action, np.float32), -1, 1)
        reached = bool(np.linalg.norm(self.position) < 0.2)
        return self.position.copy(), float(reached), reached, False, {}


if "Reach-v0" not in gymnasium.registry:
    gymnasium.register("Reach-v0", entry_point=Reach, max_episode_steps=30)
ENV = EnvConfig("bring_your_own:Reach-v0", success="terminated")  # "module:id" imports the module first


def record(seed):
    rng, env, over = np.random.default_rng(seed), make(ENV), False
    observations, actions, rewards = [env.reset(seed=seed)[0]], [], []
    while not over:
        wish = -0.2 * observations[-1] + rng.normal(0, 0.6, 2)  # mostly noise, a little drift to the middle
        actions.append(np.clip(wish, -1, 1).astype(np.float32))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        over = terminated or truncated
    return steelyard.Episode(np.array(observations), np.array(actions), np.array(rewards), terminated, not terminated)


def main(out="runs/bring_your_own", offline_steps=1000, env_steps=500):
    spec = spec_of(make(ENV), ENV)  # shapes and bounds, so that data and environment can be compared
    store = steelyard.Store.from_episodes((record(seed) for seed in range(80)), Path(out) / "data", spec=spec)
    diagnose(store).print()  # the doctor's findings
    config = steelyard.ControlRun(
        objective=CalQLConfig(network=NetworkConfig((64, 64), (64, 64)), discount=0.95, actor_lr=1e-3, num_samples=4),
        data=DataConfig(f"{out}/data", rewards=RewardConfig(bias=-1.0, horizon="sparse")),  # -1 a step, 0 at the end
        env=ENV,
        offline_steps=int(offline_steps),
        batch_size=64,
        online=OnlineConfig(env_steps=int(env_steps)),
        evaluation=EvaluationConfig(episodes=20, every_offline=int(offline_steps), every_online=250),
    )
    policy = steelyard.load(steelyard.start(config, f"{out}/run"))  # weights, normalisers and spec; numpy in, numpy out
    observation, _ = make(ENV).reset(seed=123)
    print(f"at {observation} the loaded policy does {policy(observation)}; next: steelyard report {out}/run")


if __name__ == "__main__":
    main(*sys.argv[1:])
