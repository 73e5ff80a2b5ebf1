"""Hugging Face language models: loading, LoRA, references, log-probs that depend on nothing but the text, saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from completion_batches import padded, ragged, shuffled
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.envs.samplers import CausalLMSampler, SamplingConfig
from steelyard.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from steelyard.data.experience import ExperienceBatch  # noqa: E402
from steelyard.nets import lm  # noqa: E402
from steelyard.nets.lm import LanguageModelConfig, LoRAConfig, load_language_model  # noqa: E402

pytestmark = pytest.mark.lm

FULL = LanguageModelConfig("tiny")
LORA = LanguageModelConfig("tiny", adapter=LoRAConfig(rank=4, alpha=8.0))


def load(config: LanguageModelConfig = FULL, seed: int = 0) -> lm.CausalLM:
    return load_language_model(config, torch.Generator().manual_seed(seed))


def nudge(model: lm.CausalLM, size: float = 0.05) -> lm.CausalLM:
    """Move what is trained, as an optimiser would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for group in model.trainable().values():
            for parameter in group:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(network, batch: ExperienceBatch, temperature: float = 1.0) -> torch.Tensor:
    """Return log-probs [N, T] by one plain forward pass for each completion."""
    found = torch.zeros(batch.scored_mask.shape)
    for row, prompt_row in enumerate(batch.prompt_of.tolist()):
        prompt = batch.prompts[prompt_row][batch.prompt_mask[prompt_row] > 0]
        completion = batch.completions[row][batch.scored_mask[row] > 0]
        with torch.no_grad():
            logits = network(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0]
        logps = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        found[row, : len(completion)] = logps.gather(1, completion[:, None])[:, 0]
    return found


@pytest.mark.parametrize("attention", ["grouped", "eager", "sdpa"])
@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "lora"])
def test_log_probs_are_those_of_a_plain_forward_pass(config, attention):
    config = LanguageModelConfig("tiny", adapter=config.adapter, attention=attention)
    model, batch = nudge(load(config)), ragged(3, 8, 259, 1)
    assert model.shares_prompts
    for temperature in (1.0, 0.7):
        found = model.outputs(batch, temperature=temperature).token_logps
        assert torch.allclose(found, by_hand(model.network, batch, temperature), atol=1e-5)


@pytest.mark.parametrize("attention", ["grouped", "sdpa"])
@pytest.mark.parametrize("adapter", [None, LoRAConfig(4)], ids=["full", "lora"])
def test_shared_prompts_give_the_loss_and_gradients_of_plain_rows(adapter, attention, monkeypatch):
    config = LanguageModelConfig("tiny", adapter=adapter, attention=attention, value_head=True)
    model, batch = nudge(load(config)), ragged(2, 7, 259, 3)
    parameters = [p for group in model.trainable().values() for p in group]

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        outputs = model.outputs(batch, entropies=True, values=True)
        loss = -outputs.token_logps.sum(1).sigmoid().log().mean()
        loss = loss + (outputs.values**2).mean() - 0.1 * outputs.entropies.mean()
        return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    used = []
    plain_rows, packed_rows = lm.plain_rows, lm.packed_rows
    monkeypatch.setattr(lm, "packed_rows", lambda *given: used.append(given) or packed_rows(*given))
    monkeypatch.setattr(model, "_cost", lambda rows: rows.tokens.numel() if rows.units is not None else 1e9)
    shared = loss_and_gradient()
    assert used
    model.shares_prompts = False
    plain = loss_and_gradient()
    assert plain_rows is lm.plain_rows
    assert (shared[0] - plain[0]).abs() <= 1e-5 * plain[0].abs()
    assert (shared[1] - plain[1]).norm() <= 1e-5 * plain[1].norm()
    assert plain[1].norm() > 0.01


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), left=st.integers(0, 3), right=st.integers(0, 3), token=st.integers(0, 258))
def test_padding_order_and_parts_change_nothing(seed, left, right, token):
    model, batch = _loaded_once(), ragged(3, 6, 259, seed)
    with torch.no_grad():
        whole = model.outputs(batch).token_logps
        again = model.outputs(padded(batch, left, right, token)).token_logps[:, : whole.shape[1]]
        assert torch.allclose(again, whole, atol=1e-5)
        generator = torch.Generator().manual_seed(seed)
        order, prompt_order = torch.randperm(6, generator=generator), torch.randperm(3, generator=generator)
        moved = model.outputs(shuffled(batch, order, prompt_order)).token_logps
        assert torch.allclose(moved, whole[order], atol=1e-5)
        parts = [batch.part(number, 2) for number in range(2)]
        found = sum(model.outputs(part).token_logps.sum() for part in parts if len(part))
        assert found.item() == pytest.approx(whole.sum().item(), abs=1e-3)


_models: list[lm.CausalLM] = []


def _loaded_once() -> lm.CausalLM:
    if not _models:
        _models.append(nudge(load(LORA)))
    return _models[0]


def test_first_weights_are_the_generators_and_nothing_global_is_drawn():
    before = torch.random.get_rng_state()
    first, again, other = load(LORA), load(LORA), load(LORA, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    mine, same, else_ = (dict(model.network.named_parameters()) for model in (first, again, other))
    assert all(torch.equal(mine[name], same[name]) for name in mine)
    assert any(not torch.equal(mine[name], else_[name]) for name in mine if "lora_A" in name)
    targets = {name.split(".")[-4] for name in mine if "lora_A" in name}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(parameter.dtype == torch.float32 for parameter in first.network.parameters())
    assert load(LanguageModelConfig("tiny", adapter=LoRAConfig(2, targets=("q_proj",)))).trainable()["policy"][
        0
    ].shape == (2, 32)


def test_reference_is_the_model_as_loaded():
    batch = ragged(2, 4, 259, 0)
    for config in (FULL, LORA):
        model = load(config)
        before = model.outputs(batch).token_logps.detach()
        assert torch.allclose(model.reference_token_logps(batch), before, atol=1e-6), "ratio is 1 at step 0"
        nudge(model)
        assert (model.outputs(batch).token_logps - before).abs().max() > 0.01
        assert torch.allclose(model.reference_token_logps(batch), before, atol=1e-6)
        assert (model.outputs(batch).token_logps - before).abs().max() > 0.01, "and the policy is back"


def test_a_reference_pass_between_forward_and_backward_is_harmless():
    batch = ragged(2, 4, 259, 0)
    for config in (FULL, LORA):
        model = nudge(load(config))
        parameters = model.trainable()["policy"]
        expected = torch.autograd.grad(model.outputs(batch).token_logps.sum(), parameters)
        outputs = model.outputs(batch)
        model.reference_token_logps(batch)
        found = torch.autograd.grad(outputs.token_logps.sum(), parameters)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_continued_adapter_is_its_own_reference(tmp_path):
    batch = ragged(2, 4, 259, 0)
    first = nudge(load(LORA))
    trained = first.outputs(batch).token_logps.detach()
    folder = first.save_pretrained(tmp_path / "adapter", merged=False)
    config = LanguageModelConfig(str(folder))
    model = load(config)  # the base is "tiny" with the same generator
    assert torch.allclose(model.outputs(batch).token_logps, trained, atol=1e-5)
    nudge(model)
    assert torch.allclose(model.reference_token_logps(batch), trained, atol=1e-5)
    assert (model.outputs(batch).token_logps - trained).abs().max() > 0.01
    with pytest.raises(ConfigError, match="continues an adapter"):
        load(LanguageModelConfig(str(folder), reference="adapter_off"))
    with pytest.raises(ConfigError, match="leave `adapter` unset"):
        load(LanguageModelConfig(str(folder), adapter=LoRAConfig()))


def test_adapters_compute_what_peft_computes():
    model, batch = nudge(load(LORA)), ragged(3, 6, 259, 4)

    def found() -> tuple[torch.Tensor, ...]:
        logps = model.outputs(batch).token_logps
        return logps, *torch.autograd.grad((logps**2).sum(), model.trainable()["policy"])

    ours = found()
    for module in model.network.modules():
        module.__dict__.pop("forward", None)
    theirs = found()
    assert not torch.equal(ours[0], theirs[0]), "both ways were taken"
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-3, rtol=1e-4)
    assert (ours[0] - theirs[0]).abs().max() < 1e-5


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no adapter; use 'copy'"):
        load(LanguageModelConfig("tiny", reference="adapter_off"))
    batch = ragged(2, 4, 259, 0)
    bare = load(LanguageModelConfig("tiny", reference="none"))
    with pytest.raises(ConfigError, match="no reference"):
        bare.reference_token_logps(batch)
    with pytest.raises(ConfigError, match="no value head"):
        bare.outputs(batch, values=True)
    with pytest.raises(ConfigError, match="no adapter to save alone"):
        bare.save_pretrained(tmp_path, merged=False)
    with pytest.raises(ConfigError, match=r"no such file"):
        load(LanguageModelConfig(str(tmp_path / "absent.gguf")))
    with pytest.raises(ConfigError, match="expected 'smollm2', 'tiny'"):
        load(LanguageModelConfig(str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match=r"adapter:.*nothing"):
        load(LanguageModelConfig("tiny", adapter=LoRAConfig(targets=("nothing",))))
    with pytest.raises(ConfigError, match="rank"):
        LoRAConfig(rank=0)


def test_state_dict_holds_what_is_trained():
    for config in (FULL, LORA, LanguageModelConfig("tiny", adapter=LORA.adapter, value_head=True)):
        model = nudge(load(config))
        state = model.state_dict()
        count = sum(len(group) for group in model.trainable().values())
        assert len(state) == count
        other = load(config)
        other.load_state_dict(state)
        batch = ragged(2, 4, 259, 0)
        assert torch.equal(other.outputs(batch).token_logps, model.outputs(batch).token_logps)
        inside = torch.nn.ModuleDict({"model": load(config)})
        inside.load_state_dict({f"model.{name}": value for name, value in state.items()})
        state.popitem()
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict(state)


@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "lora"])
def test_saved_weights_load_with_plain_transformers(tmp_path, config):
    model, batch = nudge(load(config)), ragged(2, 4, 259, 0)
    expected = model.outputs(batch).token_logps.detach()
    folder = model.save_pretrained(tmp_path / "merged")
    assert not list(folder.glob("*.bin"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(by_hand(plain, batch), expected, atol=1e-5)
    own = load(LanguageModelConfig(str(folder)))
    assert torch.allclose(own.outputs(batch).token_logps, expected, atol=1e-5)
    assert torch.equal(model.outputs(batch).token_logps, expected), "saving leaves the model as it was"
    if config.adapter is not None:
        folder = model.save_pretrained(tmp_path / "adapter", merged=False)
        base = load(FULL).network
        alone = peft.PeftModel.from_pretrained(base, folder)
        assert torch.allclose(by_hand(alone, batch), expected, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    batch, found = ragged(2, 4, 259, 0), []
    for checkpointing in (False, True):
        config = LanguageModelConfig("tiny", adapter=LORA.adapter, gradient_checkpointing=checkpointing)
        model = nudge(load(config))
        found.append(torch.autograd.grad(model.outputs(batch).token_logps.sum(), model.trainable()["policy"]))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def llama(**changes) -> object:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return sizes | {"vocab_size": 64, "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 0} | changes


@pytest.mark.parametrize("kind", ["gemma2", "mistral", "gpt2", "bloom", "mamba"])
def test_other_families_score_as_they_do_themselves(kind, tmp_path):
    """Soft-capped logits, sliding windows, learned positions, no positions, recurrence: found out by trying."""
    config = {
        "gemma2": lambda: transformers.Gemma2Config(**llama(head_dim=8, sliding_window=4)),
        "mistral": lambda: transformers.MistralConfig(**llama(sliding_window=4)),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=1),
        "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, eos_token_id=1),
        "mamba": lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    }[kind]()
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in network.parameters():
        parameter.data.mul_(4.0) if parameter.ndim > 1 else None
    network.save_pretrained(tmp_path)
    record = {"format": "steelyard-model-1", "tokenizer": "byte"}
    (tmp_path / lm.RECORD).write_text(json.dumps(record))
    model = load(LanguageModelConfig(str(tmp_path)))
    assert model.shares_prompts == (kind == "gpt2")
    assert model.head_is_plain == (kind != "gemma2")
    batch = ragged(2, 5, 64, 0)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(model.outputs(batch).token_logps, by_hand(plain, batch), atol=1e-4)
    if kind in ("gemma2", "gpt2"):
        found = CausalLMSampler(model, SamplingConfig(max_new_tokens=6)).sample(
            batch.prompts, batch.prompt_mask, 2, seed=0, step=0, keys=torch.arange(2)
        )
        drawn = ExperienceBatch(batch.prompts, batch.prompt_mask, found.completions, found.scored_mask, found.prompt_of)
        assert torch.allclose(model.outputs(drawn).token_logps, found.token_logps, atol=1e-4)


@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_sampled_log_probs_are_the_policys(config, temperature):
    model, batch = nudge(load(config)), ragged(3, 3, 250, 5)
    sampler = CausalLMSampler(model, SamplingConfig(temperature=temperature, max_new_tokens=20))
    sampler.eos = 97  # likelier than the real one to end some rows
    arguments = {"seed": 0, "step": 0}
    found = sampler.sample(batch.prompts, batch.prompt_mask, 4, keys=torch.arange(3), **arguments)
    assert found.tempered == (temperature != 1)
    drawn = ExperienceBatch(batch.prompts, batch.prompt_mask, found.completions, found.scored_mask, found.prompt_of)
    again = model.outputs(drawn, temperature=temperature).token_logps
    assert (again - found.token_logps).abs().max() <= 1e-4, "the ratio is 1 at step 0"
    state = [p.detach().clone() for p in model.network.parameters()]
    with model.as_reference():
        reference = sampler.sample(batch.prompts, batch.prompt_mask, 4, keys=torch.arange(3), **arguments)
    assert torch.allclose(
        model.reference_token_logps(
            ExperienceBatch(
                batch.prompts, batch.prompt_mask, reference.completions, reference.scored_mask, reference.prompt_of
            ),
            temperature=temperature,
        ),
        reference.token_logps,
        atol=1e-4,
    )
    assert all(torch.equal(a, b) for a, b in zip(state, model.network.parameters(), strict=True))
    assert all(p.requires_grad for p in model.trainable()["policy"])


def test_samples_do_not_depend_on_the_batch():
    model = nudge(load(FULL)).double()
    batch = ragged(4, 4, 250, 6)
    sampler = CausalLMSampler(model, SamplingConfig(max_new_tokens=24))
    sampler.eos = 97
    keys = torch.tensor([5, 6, 7, 8])
    whole = sampler.sample(batch.prompts, batch.prompt_mask, 5, seed=3, step=1, keys=keys)
    lengths = whole.scored_mask.sum(1).int().tolist()
    for part in ([2], [3, 1], [1, 0, 2]):
        some = sampler.sample(batch.prompts[part], batch.prompt_mask[part], 5, seed=3, step=1, keys=keys[part])
        for place, prompt in enumerate(part):
            for sample in range(5):
                row, other = 5 * prompt + sample, 5 * place + sample
                length = lengths[row]
                assert some.scored_mask[other].sum() == length
                assert torch.equal(some.completions[other, :length], whole.completions[row, :length])


def test_a_prompt_too_long_for_the_context_is_said():
    model = load(FULL)
    prompts = torch.zeros(1, 500).long()
    with pytest.raises(DataError, match="500 tokens and 64 new ones: expected at most 512"):
        CausalLMSampler(model, SamplingConfig()).sample(
            prompts, torch.ones(1, 500), 1, seed=0, step=0, keys=torch.zeros(1).long()
        )


def test_hidden_states_for_other_heads():
    model, batch = load(FULL), ragged(3, 6, 259, 2)
    final = model.final_states(batch)
    assert final.shape == (6, model.width)
    prompt_row = int(batch.prompt_of[0])
    prompt = batch.prompts[prompt_row][batch.prompt_mask[prompt_row] > 0]
    text = torch.cat([prompt, batch.completions[0][batch.scored_mask[0] > 0]])[None]
    alone = model.hidden(text, torch.ones(text.shape))
    assert torch.allclose(alone[0, -1], final[0], atol=1e-5)
    for left, right in ((3, 0), (0, 2)):
        mask = torch.nn.functional.pad(torch.ones(text.shape), (left, right))
        found = model.hidden(torch.nn.functional.pad(text, (left, right)), mask)
        assert torch.allclose(found[:, left : left + text.shape[1]], alone, atol=1e-5)


def test_value_head_is_saved_with_the_weights(tmp_path):
    config = LanguageModelConfig("tiny", value_head=True)
    model, batch = nudge(load(config)), ragged(2, 3, 259, 0)
    folder = model.save_pretrained(tmp_path)
    again = load(LanguageModelConfig(str(folder), value_head=True))
    expected = model.outputs(batch, values=True).values
    assert torch.allclose(again.outputs(batch, values=True).values, expected, atol=1e-5)
    assert expected.abs().max() > 0


@pytest.mark.slow
def test_packaged_model_is_converted_once_and_checked(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = LanguageModelConfig("smollm2", reference="none")
    try:
        model = load(config)
    except ConfigError as error:
        pytest.skip(str(error))
    assert "converting to safetensors, once" in capsys.readouterr().err
    assert "slightly damaged" in model.notes[0]
    prompt = model.tokenizer.prompt([{"role": "user", "content": "What is the capital of France?"}])
    sampler = CausalLMSampler(model, SamplingConfig(temperature=0, max_new_tokens=12))
    found = sampler.sample(
        torch.tensor([prompt]), torch.ones(1, len(prompt)), 1, seed=0, step=0, keys=torch.zeros(1).long()
    )
    assert "Paris" in model.tokenizer.decode(found.completions[0].tolist())
    assert found.finished.all()
    again = load(config)
    assert "converting" not in capsys.readouterr().err
    (folder,) = (path for path in (tmp_path / "steelyard" / "gguf").iterdir())
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert not lm._intact(Path(folder), json.loads((folder / "manifest.json").read_text())["source"])
    assert again.shares_prompts
