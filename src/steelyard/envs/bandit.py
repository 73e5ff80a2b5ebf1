"""The didactic bandits of preference fine-tuning: one decision per context, everything known exactly.

Tajwar, Singh et al., "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data" (ICML 2024), the
bandit experiments. An action is one of V = 100 bins of [-1, 1]; the reference pi_ref is the distribution of
tanh(Cauchy(-0.7, 0.4)) over them, from its distribution function rather than from samples; the reward is a bump

    r(a) = exp(-((a - a*) / w)^2)

around a*: bin 20 is where the reference has its mode (aligned), bin 70 lies in its tail (misaligned). With several
positions the reward is their mean. Contexts are U[0, 1]^100 and carry no information about the reward.

Shapes: P contexts, D features, N completions, T positions, V actions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steelyard.data.experience import ExperienceBatch
from steelyard.nets.categorical import CategoricalPolicy

BINS = 100
FEATURES = 100
LOCATION, SCALE = -0.7, 0.4
TARGETS = {"aligned": 20, "misaligned": 70}
"""Scenario -> a*."""


@functools.lru_cache(maxsize=1)
def reference_bins() -> Tensor:
    """Return pi_ref, float64 [V]: the exact mass of tanh(Cauchy) in V equal bins of [-1, 1]; not to be changed."""
    edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64)
    edges[0], edges[-1] = -1.0, 1.0  # atanh of exactly these is infinite, which is where the tails belong
    cdf = 0.5 + torch.atan((torch.atanh(edges) - LOCATION) / SCALE) / math.pi
    return cdf.diff()


@dataclass(frozen=True)
class BanditProblem:
    """A reward over actions.

    Attributes:
        target: a*, the bin with the highest reward.
        width: w of the bump, in bins.
        tokens: T, positions of a completion.
    """

    target: int = 70
    width: float = 10.0
    tokens: int = 1

    @functools.cached_property
    def action_rewards(self) -> Tensor:
        """r(a), float64 [V]."""
        actions = torch.arange(BINS, dtype=torch.float64)
        return torch.exp(-(((actions - self.target) / self.width) ** 2))

    def rewards(self, completions: Tensor) -> Tensor:
        """Return float32 [N] of completions int64 [N, T]: the mean over positions."""
        return self.action_rewards[completions].mean(1).float()

    def contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw contexts, float32 [count, D]."""
        return torch.rand(count, FEATURES, generator=generator)

    def experience(
        self, policy: CategoricalPolicy, contexts: Tensor, n: int, generator: torch.Generator, born: int
    ) -> ExperienceBatch:
        """Draw and score n completions of each context from a policy."""
        completions, logps = policy.sample(contexts, n, generator)
        return self._batch(contexts, n, completions, logps, born)

    def foreign_experience(self, contexts: Tensor, n: int, generator: torch.Generator) -> ExperienceBatch:
        """Draw and score n completions of each context from pi_ref: a data set that no policy of the run has made."""
        probabilities = reference_bins().expand(len(contexts) * n, -1)
        completions = torch.multinomial(probabilities, self.tokens, replacement=True, generator=generator)
        logps = reference_bins().log().float()[completions]
        return self._batch(contexts, n, completions, logps, -1)

    def _batch(self, contexts: Tensor, n: int, completions: Tensor, logps: Tensor, born: int) -> ExperienceBatch:
        return ExperienceBatch(
            prompts=contexts,
            prompt_mask=torch.ones_like(contexts),
            completions=completions,
            scored_mask=torch.ones(completions.shape),
            prompt_of=torch.arange(len(contexts)).repeat_interleave(n),
            rewards=self.rewards(completions),
            sampler_token_logps=logps,
            born=torch.full((len(completions),), born),
        )

    @torch.no_grad()
    def measure(self, policy: CategoricalPolicy, contexts: Tensor) -> dict[str, float]:
        """Return exact expectations under the policy, averaged over contexts.

        Returns:
            reward: E_pi[r].
            reverse_kl: KL(pi || pi_ref), summed over positions.
            forward_kl: KL(pi_ref || pi), summed over positions.
            entropy: of pi, summed over positions.
            near: probability of an action within w of the target, mean over positions.
        """
        log_probs = policy.log_probs(contexts).double()  # [P, T, V]
        probs = log_probs.exp()
        reference = reference_bins()
        ratios = log_probs - reference.log()
        near = (torch.arange(BINS) - self.target).abs() <= self.width
        values = torch.stack(
            [
                (probs @ self.action_rewards).mean(),
                (probs * ratios).sum((1, 2)).mean(),
                -(reference * ratios).sum((1, 2)).mean(),
                -(probs * log_probs).sum((1, 2)).mean(),
                probs[:, :, near].sum(2).mean(),
            ]
        )
        return dict(zip(("reward", "reverse_kl", "forward_kl", "entropy", "near"), values.tolist(), strict=True))
