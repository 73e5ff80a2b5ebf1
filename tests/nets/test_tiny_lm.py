"""TinyLM: log-probs are those of sequences, whatever the padding, order and cut of a batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from completion_batches import padded, ragged, shuffled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steelyard.data.experience import ExperienceBatch
from steelyard.errors import ConfigError, DataError
from steelyard.nets import completions
from steelyard.nets.completions import head_entropies, head_logps, packed_rows, plain_rows
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig


def tiny(vocabulary: int = 11, seed: int = 0, **options: object) -> TinyLM:
    model = TinyLM(TransformerConfig(vocabulary, 16, 2, 2, 24), torch.Generator().manual_seed(seed), **options)
    with torch.no_grad():  # first weights are so small that every token is equally likely
        for parameter in model.transformer.parameters():
            parameter.mul_(3.0)
    return model.double()


def test_probabilities_of_all_completions_sum_to_one():
    model, end = tiny(4, reference="none"), 3
    texts = [(*start, end) for length in range(4) for start in itertools.product(range(3), repeat=length)] + list(
        itertools.product(range(3), repeat=4)
    )  # those that the limit of 4 tokens cuts
    rows = torch.tensor([[*text, *[0] * (4 - len(text))] for text in texts])
    mask = torch.tensor([[1.0] * len(text) + [0.0] * (4 - len(text)) for text in texts])
    prompt = torch.tensor([[0, 2, 1]])
    batch = ExperienceBatch(prompt, torch.tensor([[0.0, 1.0, 1.0]]), rows, mask, torch.zeros(len(rows)).long())
    total = model.outputs(batch).token_logps.sum(1).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), left=st.integers(0, 3), right=st.integers(0, 3), token=st.integers(0, 10))
def test_padding_order_and_parts_change_nothing(seed, left, right, token):
    model, batch = tiny(value_head=True), ragged(3, 5, 11, seed)
    with torch.no_grad():
        model.value_head.normal_(generator=torch.Generator().manual_seed(1))
    whole = model.outputs(batch, entropies=True, values=True)
    again = model.outputs(padded(batch, left, right, token), entropies=True, values=True)
    generator = torch.Generator().manual_seed(seed)
    order, prompt_order = torch.randperm(5, generator=generator), torch.randperm(3, generator=generator)
    moved = model.outputs(shuffled(batch, order, prompt_order), entropies=True, values=True)
    for name in ("token_logps", "entropies", "values"):
        value = getattr(whole, name)
        assert torch.allclose(getattr(again, name)[:, : value.shape[1]], value, atol=1e-12)
        assert (getattr(again, name)[:, value.shape[1] :] == 0).all()
        assert torch.allclose(getattr(moved, name), value[order], atol=1e-12)
        assert (value[batch.scored_mask == 0] == 0).all()
    parts = [batch.part(number, 3) for number in range(3)]
    found = sum(model.outputs(part).token_logps.sum() for part in parts if len(part))
    assert found.item() == pytest.approx(whole.token_logps.sum().item(), abs=1e-10)


def test_gradients_of_parts_add_up_to_the_whole():
    model, batch = tiny(), ragged(4, 9, 11, 5)
    parameters = model.trainable()["policy"]

    def gradient(batches):
        loss = sum((model.outputs(part).token_logps ** 2).sum() for part in batches if len(part))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    whole = gradient([batch])
    assert whole.norm() > 0.1
    assert torch.allclose(gradient([batch.part(number, 2) for number in range(2)]), whole, atol=1e-9)


def test_temperature_divides_the_logits():
    model, batch = tiny(), ragged(2, 3, 11, 2)
    found = model.outputs(batch, temperature=0.5).token_logps
    prompt = batch.prompts[batch.prompt_of[0]][batch.prompt_mask[batch.prompt_of[0]] > 0]
    text = torch.cat([prompt, batch.completions[0][batch.scored_mask[0] > 0]])
    features = model.transformer.features(text[None])[0]
    expected = (features @ model.transformer.token_embedding.T / 0.5).log_softmax(-1)
    expected = expected[len(prompt) - 1 : -1].gather(1, text[len(prompt) :, None])[:, 0]
    assert torch.allclose(found[0][batch.scored_mask[0] > 0], expected)
    reference = model.reference_token_logps(batch, temperature=0.5)
    assert not torch.allclose(reference, model.reference_token_logps(batch))


def test_reference_is_frozen_and_renewed():
    model, batch = tiny(), ragged(2, 3, 11, 2)
    model.renew_reference()
    before = model.outputs(batch).token_logps.detach()
    with torch.no_grad():
        for parameter in model.trainable()["policy"]:
            parameter.add_(0.1)
    assert torch.equal(model.reference_token_logps(batch), before)
    after = model.outputs(batch).token_logps
    assert not torch.allclose(after, before)
    with model.as_reference():
        assert torch.equal(model.outputs(batch).token_logps, before)
    assert torch.equal(model.renew_reference().reference_token_logps(batch), after.detach())
    held = {id(parameter) for group in model.trainable().values() for parameter in group}
    assert all(id(parameter) not in held for parameter in model.reference.parameters())


def test_what_was_not_built_is_said():
    model, batch = tiny(reference="none"), ragged(2, 3, 11, 2)
    with pytest.raises(ConfigError, match="no reference"):
        model.reference_token_logps(batch)
    with pytest.raises(ConfigError, match="no value head"):
        model.outputs(batch, values=True)
    empty = ragged(2, 3, 11, 2)
    empty.prompt_mask[1] = 0
    with pytest.raises(DataError, match="prompt 1: expected at least one token"):
        model.outputs(empty)
    empty.prompt_mask[1] = torch.tensor([1.0, 0, 0, 0, 0, 1.0])
    with pytest.raises(DataError, match="padded on the left"):
        model.outputs(empty)


@pytest.mark.parametrize("kept", [0, 1 << 26])
@pytest.mark.parametrize("trained", ["hidden", "all"])
def test_blockwise_head_has_the_gradients_of_log_softmax(monkeypatch, kept, trained):
    monkeypatch.setattr(completions, "KEPT", kept)
    monkeypatch.setattr(completions, "BLOCK", 21)  # three rows at a time
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((8, 5), (7, 5), (7,))
    )
    leaves = [hidden.requires_grad_()] + ([weight.requires_grad_(), bias.requires_grad_()] if trained == "all" else [])
    targets, weights = torch.tensor([0, 6, 3, 3, 1, 2, 5, 4]), torch.linspace(-1, 2, 8, dtype=torch.float64)
    plain = nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    expected = plain.gather(1, targets[:, None])[:, 0]
    found = head_logps(hidden, weight, targets, bias)
    assert torch.allclose(found, expected)
    gradients = [torch.autograd.grad((x * weights).sum(), leaves, retain_graph=True) for x in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)
    entropies, exact = head_entropies(hidden, weight, bias), -(plain.exp() * plain).sum(1)
    assert torch.allclose(entropies, exact)
    gradients = [torch.autograd.grad((x * weights).sum(), leaves, retain_graph=True) for x in (entropies, exact)]
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), most=st.integers(1, 4))
def test_packed_rows_hold_every_prompt_and_completion(seed, most):
    batch = ragged(4, 7, 1000, seed)
    plain, packed = plain_rows(batch), packed_rows(batch, most)
    visible = packed.visible()
    assert torch.equal(plain.targets, packed.targets)
    assert packed.tokens.shape[1] <= plain.tokens.numel()
    tokens, positions = packed.tokens.flatten(), packed.positions.flatten()
    width = packed.tokens.shape[1]

    def context(place: int) -> list[tuple[int, int]]:
        """Return (position, token) of all that a place sees, in order."""
        row, column = divmod(place, width)
        seen = visible[row, column].nonzero()[:, 0] + row * width
        return sorted(zip(positions[seen].tolist(), tokens[seen].tolist(), strict=True))

    scored = batch.scored_mask.nonzero()
    for place, (completion, offset) in zip(packed.sources.tolist(), scored.tolist(), strict=True):
        prompt = batch.prompt_of[completion]
        text = torch.cat([batch.prompts[prompt][batch.prompt_mask[prompt] > 0], batch.completions[completion, :offset]])
        assert context(place) == list(enumerate(text.tolist()))
    for completion, place in enumerate(packed.ends.tolist()):
        assert tokens[place] == batch.completions[completion][int(batch.lengths[completion]) - 1]
        assert plain.tokens.flatten()[plain.ends[completion]] == tokens[place]


def test_packing_shares_the_prompt():
    batch = ragged(1, 4, 50, 3)
    alone, shared = packed_rows(batch, 1), packed_rows(batch, 4)
    prompt = int(batch.prompt_mask.sum())
    assert (alone.units >= 0).sum() - (shared.units >= 0).sum() == 3 * prompt
