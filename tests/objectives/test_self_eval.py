"""Self-evaluation: soft labels and losses by hand, limiting cases, invariances, conformance; it learns on a toy."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from steelyard.config import from_json, to_json
from steelyard.data.prefixes import PoolTokens, PrefixBatch, PrefixSource, StateBatch
from steelyard.data.restart_labels import RestartLabelConfig
from steelyard.data.sample_pool import PromptSamples, SamplePool
from steelyard.errors import ConfigError, DataError
from steelyard.nets.self_eval import (
    ProbeConfig,
    SlotConfig,
    SuffixConfig,
    build_evaluator,
    drawn_so_far,
    head,
    hidden_states,
    read,
)
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.self_eval import SelfEvalConfig, SelfEvaluation, divergence, likeliest, states_of
from steelyard.rng import numpy_generator, torch_generator
from steelyard.train.loop import update
from steelyard.train.optim import OptimConfig, Optimizers

from . import conformance
from .conformance import seeded

SIZE = TransformerConfig(vocab_size=12, width=16, layers=2, heads=2, context=32)
ASK, YES, NO, EOS = 8, 9, 10, 0
READERS = {
    "suffix": SuffixConfig(tokens=(ASK, 11), yes_token=YES, no_token=NO, reserved=(ASK, YES, NO)),
    "slot": SlotConfig(yes_token=YES, no_token=NO),
    "probe": ProbeConfig(hidden=(8,)),
}


def tiny(seed: int = 0, scale: float = 8.0) -> TinyLM:
    model = TinyLM(SIZE, torch_generator(seed, "init"))
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1.0)  # far from uniform, so that mistakes show
    return model.renew_reference()


def learner(reader: str = "suffix", seed: int = 0, moved: bool = False, **config) -> SelfEvaluation:
    model = tiny(seed)
    if moved:  # away from the reference, so that there is a divergence
        with torch.no_grad():
            for parameter in model.transformer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(5)))
    evaluator = build_evaluator(READERS[reader], model, torch_generator(seed, "evaluator"))
    return SelfEvaluation(SelfEvalConfig(reader=READERS[reader], **config), model, evaluator)


def pool(prompts: int = 6, samples: int = 4, seed: int = 0) -> SamplePool:
    """Random completions of 1 to 6 tokens of 1..5 (and EOS but for every third); reward: no 5 in it."""
    g = numpy_generator(seed, "pool")
    items = []
    for _ in range(prompts):
        finished = np.arange(samples) % 3 != 2
        tokens = tuple(tuple(g.integers(1, 6, g.integers(1, 7)).tolist()) + ((EOS,) if end else ()) for end in finished)
        rewards = np.array([float(5 not in of) for of in tokens])
        prompt = tuple(g.integers(1, 8, g.integers(1, 4)).tolist())
        items.append(
            PromptSamples("", rewards, np.array([len(of) for of in tokens]), tokens=tokens, prompt_tokens=prompt,
                          finished=finished)
        )  # fmt: skip
    return SamplePool(tuple(items), source="toy")


def source(prompts: int = 6, samples: int = 4, **changes) -> PrefixSource:
    given = {"batch_prompts": prompts, "samples": 3, "prefixes": 2, "prompt_only": True, "seed": 0} | changes
    return PrefixSource(PoolTokens(pool(prompts, samples)), RestartLabelConfig(), **given)


BATCH = source().batch(0)


# --------------------------------------------------------------------------------------------- golden


def test_a_reading_is_what_the_model_says_row_by_row():
    """Every place of every reader, against a forward pass of that row alone, without padding."""
    for name in READERS:
        model = learner(name)
        with torch.no_grad():
            found = read(model.model, model.evaluator, BATCH, BATCH.cuts).log_odds
            for row in range(len(BATCH)):
                prompt = BATCH.prompts[BATCH.prompt_of[row]][BATCH.prompt_mask[BATCH.prompt_of[row]] > 0]
                for column, cut in enumerate(BATCH.cuts[row].tolist()):
                    if cut < 0:
                        assert math.isnan(found[row, column])
                        continue
                    tokens = torch.cat([prompt, BATCH.completions[row, :cut]])
                    if name == "suffix":
                        tokens = torch.cat([tokens, torch.tensor(model.evaluator.suffix)])
                    state = model.model.transformer.features(tokens[None])[0, -1]
                    if name == "probe":
                        logits = (
                            model.model.transformer.features(tokens[None])[0]
                            @ model.model.transformer.token_embedding.T
                        )
                        own = logits[len(prompt) - 1 : -1].log_softmax(1).gather(1, tokens[len(prompt) :, None])[:, 0]
                        lowest = float(own.min()) if cut else 0.0
                        drawn = torch.tensor([[cut, float(own.sum()), lowest]])
                        expected = model.evaluator.log_odds(state[None], torch.tensor([len(tokens)]), drawn)[0]
                    else:
                        logits = model.model.transformer.token_embedding @ state
                        expected = logits[NO] - logits[YES]
                    assert float(found[row, column]) == pytest.approx(float(expected), abs=1e-4)


def test_a_probe_is_told_how_likely_the_tokens_were():
    """Mean, lowest and total log-probability, as log(1 + x) of their negatives; by hand."""
    told = learner("probe").evaluator
    width, found = SIZE.width, []
    told.net.forward = lambda x, _: (found.append(x), x.sum(-1, keepdim=True))[1]
    told.log_odds(torch.zeros(1, width), torch.tensor([5]), torch.tensor([[2.0, -3.0, -2.5]]))
    expected = [math.log(5) / 8, math.log1p(1.5), math.log1p(2.5), math.log1p(3.0)]
    torch.testing.assert_close(found[0][0, width:], torch.tensor(expected))
    logps = torch.tensor([[-1.0, -3.0, -0.5]])
    torch.testing.assert_close(
        drawn_so_far(logps, torch.tensor([[0, 1, 3, -1]]))[0],
        torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, -1.0], [3.0, -4.5, -3.0], [0.0, 0.0, 0.0]]),
    )
    deaf = build_evaluator(ProbeConfig(hidden=(8,), confidence=False), tiny(), torch_generator(0, "evaluator"))
    states, lengths = torch.randn(1, width, generator=seeded(1)), torch.tensor([5])
    heard = [deaf.log_odds(states, lengths, torch.tensor([[2.0, -x, -x]])) for x in (0.1, 9.0)]
    assert heard[0] == heard[1]  # the limiting case: a probe on the state alone


def test_the_loss_by_hand():
    """Two places with log-odds l and soft targets y: -(y log s(l) + (1 - y) log s(-l)), mean over places."""
    model = learner("slot", kl_weight=0.0)
    batch = dataclasses.replace(
        BATCH.of_prompts(torch.tensor([1])),
        cuts=torch.tensor([[2, -1], [1, -1], [-1, -1]]),
        targets=torch.tensor([[1 / 3, 0.7], [1.0, 0.7], [0.7, 0.7]]),
    )
    l0, l1 = read(model.model, model.evaluator, batch, batch.cuts).log_odds[:2, 0].tolist()
    sigma = [1 / (1 + math.exp(-x)) for x in (l0, l1)]
    by_hand = -(math.log(sigma[0]) / 3 + 2 * math.log(1 - sigma[0]) / 3 + math.log(sigma[1])) / 2
    loss, metrics = model.loss_self_eval(batch, seeded())
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-5)
    assert float(metrics["data/no_better"].mean()) == pytest.approx((1 / 3 + 1) / 2)


def full_divergence(model: SelfEvaluation, reserved: tuple[int, ...]) -> torch.Tensor:
    """D_KL(reference || policy) of all tokens that may be drawn, at every completion token."""
    kept = [token for token in range(SIZE.vocab_size) if token not in reserved]
    found = []
    for transformer in (model.model.reference, model.model.transformer):
        rows = hidden_states(model.model, BATCH)[1]
        states = transformer.features(rows.tokens).flatten(0, 1)[rows.sources]
        found.append((states @ transformer.token_embedding.T)[:, kept].log_softmax(1))
    return (found[0].exp() * (found[0] - found[1])).sum(1)


@pytest.mark.parametrize("reader", ["suffix", "slot"])
def test_with_all_tokens_the_divergence_is_the_whole_one(reader):
    model = learner(reader, moved=True, kl_weight=2.0, kl_tokens=50)
    plain = learner(reader, moved=True, kl_weight=0.0)
    loss, metrics = model.loss_self_eval(BATCH, seeded())
    exact = float(full_divergence(model, model.evaluator.reserved).mean().detach())
    assert exact > 0.01
    assert float(metrics["loss/kl"]) == pytest.approx(exact, rel=1e-4)
    without = plain.loss_self_eval(BATCH, seeded())[0]
    assert float((loss - without).detach()) == pytest.approx(2 * exact, rel=1e-3)


def test_top_tokens_by_hand():
    """p = (.6, .3, .1), q = (.2, .3, .5), one token apart: .6 log(.6/.2) + .4 log(.4/.8), less than the whole."""
    p, q = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    weight = torch.eye(3)
    teacher = likeliest(p, weight, None, 1)
    assert teacher[0].tolist() == [[0]]
    found = float(divergence(q, weight, None, teacher))
    assert found == pytest.approx(0.6 * math.log(3) + 0.4 * math.log(0.5), rel=1e-5)
    assert found < float((p.exp() * (p - q)).sum())
    # token 0 reserved: both are renormalised over the others, of which token 1 is now the likeliest
    teacher = likeliest(p, weight, None, 1, (0,))
    assert teacher[0].tolist() == [[1]]
    expected = 0.75 * math.log(0.75 / 0.375) + 0.25 * math.log(0.25 / 0.625)
    assert float(divergence(q, weight, None, teacher, (0,))) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------ limiting cases


def gradients(model: SelfEvaluation, batch: PrefixBatch = BATCH) -> torch.Tensor:
    parameters = [p for group in model.groups.values() for p in group.parameters]
    found = torch.autograd.grad(model.loss_self_eval(batch, seeded())[0], parameters)
    return torch.cat([one.flatten() for one in found])


@pytest.mark.parametrize("reader", ["suffix", "slot"])
@pytest.mark.parametrize("kl_tokens", [3, 50])
def test_at_the_reference_the_divergence_has_no_gradient(reader, kl_tokens):
    free, kept = learner(reader, kl_weight=0.0), learner(reader, kl_weight=10.0, kl_tokens=kl_tokens)
    assert float(kept.loss_self_eval(BATCH, seeded())[1]["loss/kl"]) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(gradients(kept), gradients(free), atol=1e-4, rtol=0)  # 10 times rounding
    assert float(gradients(free).abs().max()) > 0.01


def test_the_heavier_the_divergence_the_less_the_policy_moves():
    """Weight 0 moves it freely; a weight that dwarfs the labels leaves it where it was."""
    moved = {}
    for weight in (0.0, 1e3):
        model = learner("suffix", kl_weight=weight, kl_tokens=50, learning_rate=2e-3)
        optimizers = Optimizers(model, OptimConfig())
        for step in range(40):
            update(model, optimizers, BATCH, 0, step)
        moved[weight] = float(full_divergence(model, model.evaluator.reserved).mean().detach())
    assert moved[1e3] < 2e-3 < moved[0.0]


def test_a_probe_leaves_the_model_as_it_is():
    model = learner("probe", kl_weight=5.0)  # a weight that does not count
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    assert list(model.groups) == ["probe"]
    update(model, Optimizers(model, OptimConfig()), BATCH, 0, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.model.transformer.parameters())


def test_two_samples_are_a_pair_loss():
    """N = 2: the label is whether the other one is better, so the loss is cross-entropy on 0 and 1."""
    two = SamplePool(
        (PromptSamples("", np.array([1.0, 0.0]), np.array([2, 2]), tokens=((1, 0), (5, 0)), prompt_tokens=(3,),
                       finished=np.array([True, True])),)
    )  # fmt: skip
    found = PrefixSource(PoolTokens(two), RestartLabelConfig(), 1, 2, 0, False, 0).batch(0)
    assert found.targets[:, 0].tolist() == [1.0, 0.0]
    assert found.cuts.tolist() == [[1, -1], [1, -1]]  # before EOS
    model = learner("slot", kl_weight=0.0)
    logs = torch.nn.functional.logsigmoid
    odds = read(model.model, model.evaluator, found, found.cuts).log_odds[:, 0]
    loss = model.loss_self_eval(found, seeded())[0]
    torch.testing.assert_close(loss, -(logs(odds[0]) + logs(-odds[1])) / 2)


# --------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("reader", list(READERS))
def test_padding_order_and_company_change_nothing(reader):
    model = learner(reader)
    whole = dataclasses.replace(BATCH, scored_mask=BATCH.scored_mask)
    expected = model.score(whole)
    padded = dataclasses.replace(
        BATCH,
        prompts=torch.nn.functional.pad(BATCH.prompts, (2, 0), value=7),
        prompt_mask=torch.nn.functional.pad(BATCH.prompt_mask, (2, 0)),
        completions=torch.nn.functional.pad(BATCH.completions, (0, 3), value=3),
        scored_mask=torch.nn.functional.pad(BATCH.scored_mask, (0, 3)),
    )
    torch.testing.assert_close(model.score(padded), expected, atol=1e-5, rtol=1e-5)
    alone = torch.cat([model.score(BATCH.of_prompts(torch.tensor([k]))) for k in range(6)])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("reader", ["suffix", "slot", "probe"])
def test_losses_of_parts_average_to_the_loss_of_the_whole(reader, parts):
    model = learner(reader, moved=True)
    whole = float(model.loss_self_eval(model.prepare(BATCH), seeded())[0].detach())
    means = [
        float(model.loss_self_eval(model.prepare(BATCH.part(number, parts)), seeded())[0].detach())
        for number in range(parts)
    ]
    assert sum(means) / parts == pytest.approx(whole, rel=1e-4)
    states = states_of(model.model, BATCH)
    if reader == "probe":
        means = [float(model.loss_self_eval(states.part(k, parts), seeded())[0].detach()) for k in range(parts)]
        assert sum(means) / parts == pytest.approx(whole, rel=1e-4)


def test_batches_are_a_function_of_the_step():
    one, again = source(batch_prompts=2), source(batch_prompts=2)
    again.batch(0)
    first, second = one.batch(3).tensors(), again.batch(3).tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(one.batch(4).completions, one.batch(3).completions)


def test_places_are_inside_the_samples_and_the_prompt_has_its_mean_label():
    whole = PoolTokens(pool())
    found = source(samples=4).batch(1)
    lengths = found.scored_mask.sum(1).long()
    ends = lengths - (found.completions.gather(1, lengths[:, None] - 1)[:, 0] == EOS).long()
    assert torch.equal(found.cuts[:, 0], ends)
    inner = found.cuts[:, 1:-1]
    assert bool(((inner == -1) | ((inner >= 1) & (inner < ends[:, None]))).all())
    assert bool((inner[ends > 1] >= 1).all())
    first = torch.tensor([int((found.prompt_of == k).nonzero()[0]) for k in range(6)])
    assert found.cuts[first, -1].tolist() == [0] * 6
    assert int((found.cuts[:, -1] == 0).sum()) == 6
    better = source().better
    prompts = source(samples=4).sampler.indices(1)
    expected = [1 - better[prompt].mean() for prompt in prompts]
    np.testing.assert_allclose(found.targets[first, -1].numpy(), expected, rtol=1e-6)
    assert [len(of) for of in whole.ends] == [4] * 6


# --------------------------------------------------------------------------------------------- conformance


CHECKS = (
    conformance.check_losses_and_metrics,
    conformance.check_plan_and_groups,
    conformance.check_phases_stay_in_their_groups,
)


@pytest.mark.parametrize("reader", list(READERS))
@pytest.mark.parametrize("check", CHECKS, ids=conformance.check_name)
def test_conformance(check, reader):
    model = learner(reader)
    batch = model.prepare(BATCH) if reader == "probe" else BATCH
    check(lambda seed: learner(reader, seed, learning_rate=1e-3), batch)


@pytest.mark.parametrize("reader", list(READERS))
def test_determinism_saving_and_resuming_are_exact(reader):
    """7 updates = 3, saved and loaded into another learner, and 4 more; the global random state is not used."""
    data = source(batch_prompts=2)

    def run(model: SelfEvaluation, optimizers: Optimizers, first: int, stop: int) -> None:
        for step in range(first, stop):
            update(model, optimizers, data.batch(step), 0, step)

    torch.manual_seed(3)
    before = conformance.global_random_state()
    whole = learner(reader, learning_rate=1e-3)
    run(whole, Optimizers(whole, OptimConfig()), 0, 7)
    assert conformance.global_random_state() == before
    first = learner(reader, learning_rate=1e-3)
    steps = Optimizers(first, OptimConfig())
    run(first, steps, 0, 3)
    second = learner(reader, 1, learning_rate=1e-3)
    resumed = Optimizers(second, OptimConfig())
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    resumed.load_state_tensors({name: value.clone() for name, value in steps.state_tensors().items()})
    run(second, resumed, 3, 7)
    assert not conformance.differing(conformance.snapshot(whole), conformance.snapshot(second))


# -------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("reader", ["suffix", "slot"])
def test_it_learns_which_samples_are_beaten(reader):
    """A 5 anywhere in a sample is worse than none; unseen samples are ordered right."""
    model = learner(reader, learning_rate=3e-3, kl_weight=0.1)
    train = PrefixSource(PoolTokens(pool(60, 8, seed=1)), RestartLabelConfig(), 8, 6, 1, True, 0)
    optimizers = Optimizers(model, OptimConfig(max_grad_norm=1.0))
    for step in range(100):
        update(model, optimizers, train.batch(step), 0, step)
    other = PrefixSource(PoolTokens(pool(40, 8, seed=2)), RestartLabelConfig(), 40, 8, 0, False, 0).batch(0)
    with torch.no_grad():
        odds = read(model.model, model.evaluator, other, other.cuts).log_odds[:, 0]
    bad = (other.completions == 5).any(1)
    wins = (odds[~bad][:, None] > odds[bad][None]).float().mean()
    assert float(wins) > 0.85


# ------------------------------------------------------------------------------------------------- faults


def test_faults_are_one_sentence():
    with pytest.raises(ConfigError, match="kl_weight"):
        SelfEvalConfig(kl_weight=-1.0)
    bare = TinyLM(SIZE, seeded(), reference="none")
    evaluator = build_evaluator(READERS["slot"], bare, seeded())
    with pytest.raises(ConfigError, match="no reference"):
        SelfEvaluation(SelfEvalConfig(reader=READERS["slot"]), bare, evaluator)
    SelfEvaluation(SelfEvalConfig(reader=READERS["slot"], kl_weight=0.0), bare, evaluator)
    with pytest.raises(ConfigError, match="no tokenizer"):
        build_evaluator(SuffixConfig(), bare, seeded())
    with pytest.raises(ConfigError, match=r"0\.\.11, found 12"):
        build_evaluator(SlotConfig(yes_token=12, no_token=1), bare, seeded())
    with pytest.raises(ConfigError, match="twice"):
        build_evaluator(SlotConfig(yes_token=1, no_token=1), bare, seeded())
    item = pool(1).items[0]
    with pytest.raises(DataError, match="finished"):
        PoolTokens(SamplePool((dataclasses.replace(item, finished=None),)))
    with pytest.raises(DataError, match="prompt 0: expected token ids"):
        PoolTokens(SamplePool((dataclasses.replace(item, prompt_tokens=()),)))
    unknown = dataclasses.replace(item, rewards=np.full(4, np.nan))
    with pytest.raises(DataError, match="two samples whose rewards are known"):
        PrefixSource(PoolTokens(SamplePool((unknown,))), RestartLabelConfig(), 1, 1, 0, False, 0)


def test_the_config_is_read_back():
    for reader in READERS.values():
        config = SelfEvalConfig(reader=reader, kl_weight=10.0)
        assert from_json(SelfEvalConfig, to_json(config)) == config


def test_the_page_runs():
    text = (Path(__file__).parents[2] / "docs/objectives/self_eval.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert "steps=150" in code
    exec(compile(code.replace("steps=150", "steps=2"), "self_eval.md", "exec"), {"__name__": "page"})


def test_heads_of_a_model():
    model = tiny()
    weight, bias = head(model)
    assert weight is model.transformer.token_embedding
    assert bias is None
    assert isinstance(states_of(model, BATCH), StateBatch)
