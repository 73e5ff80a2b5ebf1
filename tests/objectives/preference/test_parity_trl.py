"""The same losses and gradients of all weights as TRL's own trainers, on the same batch and weights.

Slower than `test_golden_trl.py`, and with TRL at hand: real trainer objects around a random Llama.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from steelyard.data.experience import ExperienceBatch, Outputs
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES, build_preference_learner

from .test_golden_trl import batch_of_case, close_to_trl
from .toys import seeded

pytestmark = [pytest.mark.lm, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")


class Policy(nn.Module):
    """A causal language model as a `PolicyModel`, by the plainest means: one row a completion, full softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def outputs(
        self, batch: ExperienceBatch, *, entropies: bool = False, values: bool = False, temperature: float = 1.0
    ) -> Outputs:
        tokens = torch.cat([batch.prompts[batch.prompt_of], batch.completions], 1)
        mask = torch.cat([batch.prompt_mask[batch.prompt_of], batch.scored_mask], 1).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits / temperature
        logps = logits.float().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[:, :, 0]
        return Outputs(logps[:, -batch.completions.shape[1] :] * batch.scored_mask)

    def reference_token_logps(self, batch: ExperienceBatch, temperature: float = 1.0) -> Tensor:
        raise AssertionError("the batch has them")

    def trainable(self) -> dict[str, tuple[nn.Parameter, ...]]:
        return {"policy": tuple(self.model.parameters())}


def test_losses_and_gradients_of_all_weights(monkeypatch):
    path = Path(__file__).resolve().parents[2] / "golden" / "make_trl_preference.py"
    spec = importlib.util.spec_from_file_location("make_trl_preference", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, made)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec.loader.exec_module(made)
    compared = []
    for case in made.cases():
        if case.policy is None:
            continue
        config = PREFERENCE_OBJECTIVES[case.name.partition("/")[0]](**case.settings)
        learner = build_preference_learner(Policy(case.policy), config)
        batch, _ = learner.complete(batch_of_case(case.fields, case.prompts, case.completions), {})
        loss, _ = learner.loss_preference(batch, seeded())
        names = [name for name, _ in case.policy.named_parameters()]
        gradients = torch.autograd.grad(loss, list(learner.groups["policy"].parameters))
        assert float(loss.detach()) == pytest.approx(case.loss, rel=1e-5, abs=1e-5), case.name
        assert set(names) == set(case.weights), case.name
        close_to_trl(
            torch.cat([g.flatten() for g in gradients]), torch.cat([case.weights[name].flatten() for name in names])
        )
        compared.append(case.name)
    assert len(compared) == len(made.PAIRWISE) + len(made.UNPAIRED) + len(made.GROUPED)
