"""Write what TRL computes on small batches: losses, and their gradients with respect to token log-probs.

    python tests/golden/make_trl_preference.py tests/golden

needs trl 1.16, transformers and datasets. Real trainers are built around a random Llama and a tokenizer of a few words,
both made here; nothing is downloaded. `tests/objectives/preference/test_parity_trl.py` imports this file to compare the
gradients of all weights where TRL is installed; `test_golden_trl.py` reads the JSON and needs no TRL.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

WORDS = [f"w{number}" for number in range(20)]
PAD, EOS = 0, 1


@dataclass
class Case:
    """One loss of TRL.

    Attributes:
        name: `objective/variant`.
        settings: fields of our config that mean the same.
        policy: the policy TRL used; None where only a loss function was called.
        prompts, completions: token ids of each row.
        token_logps: [N, T] of the policy, zeros behind a completion's end.
        fields: further fields of our batch, plain lists.
        loss: TRL's.
        gradient: [N, T], d loss / d token_logps.
        weights: {parameter: d loss / d parameter} of the policy.
    """

    name: str
    settings: dict[str, Any]
    policy: nn.Module | None
    prompts: list[list[int]]
    completions: list[list[int]]
    token_logps: Tensor
    fields: dict[str, Any]
    loss: float
    gradient: Tensor
    weights: dict[str, Tensor]


def tokenizer() -> Any:
    """Return a tokenizer that splits at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}, "<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def language_model(seed: int) -> Any:
    """Return a Llama of two small layers with weights large enough for its log-probs to differ from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
            pad_token_id=PAD, eos_token_id=EOS, bos_token_id=EOS, attn_implementation="eager",
        )
    )  # fmt: skip


ARGUMENTS = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
    "per_device_train_batch_size": 4, "save_strategy": "no", "seed": 0,
}  # fmt: skip

PAIRS = [
    {"prompt": "w0 w1", "chosen": " w2 w3 w4", "rejected": " w5"},
    {"prompt": "w6", "chosen": " w7", "rejected": " w8 w9 w10 w11"},
    {"prompt": "w12 w13 w14", "chosen": " w15 w16", "rejected": " w17 w18"},
    {"prompt": "w19", "chosen": " w1 w1 w2", "rejected": " w4 w9"},
]

LABELLED = [
    {"prompt": "w0 w1", "completion": " w2 w3 w4", "label": True},
    {"prompt": "w6", "completion": " w8 w9 w10 w11", "label": False},
    {"prompt": "w12 w13 w14", "completion": " w15", "label": True},
    {"prompt": "w19", "completion": " w4 w9", "label": False},
]


def of_rows(values: Tensor, places: Tensor) -> Tensor:
    """Return values [N, L] at the true places [N, L] of each row, moved to the left and padded with zeros."""
    lengths = places.sum(1)
    found = values.new_zeros(len(values), int(lengths.max()))
    for row, place in enumerate(places.bool()):
        found[row, : int(lengths[row])] = values[row][place]
    return found


def texts(ids: Tensor, attention: Tensor, completion: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of prompts and completions."""
    prompts = [row[(a == 1) & (c == 0)].tolist() for row, a, c in zip(ids, attention, completion, strict=True)]
    return prompts, [row[c == 1].tolist() for row, c in zip(ids, completion, strict=True)]


class Watched:
    """Keeps the log-probs of each forward pass of a model, with their gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[Tensor] = []
        forward = model.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            if outputs.log_probs.requires_grad:
                outputs.log_probs.retain_grad()
            self.found.append(outputs.log_probs)
            return outputs

        model.forward = watched  # type: ignore[method-assign]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all parameters."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


PAIRWISE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dpo/sigmoid", {"loss_type": ["sigmoid"], "beta": 0.3}, {"beta": 0.3}),
    ("dpo/hinge", {"loss_type": ["hinge"], "beta": 0.1}, {"beta": 0.1, "loss": "hinge"}),
    (
        "dpo/robust",
        {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.1},
        {"beta": 0.3, "robust": True, "label_smoothing": 0.1},
    ),
    (
        "dpo/exo",
        {"loss_type": ["exo_pair"], "beta": 0.3, "label_smoothing": 0.05},
        {"beta": 0.3, "loss": "exo", "label_smoothing": 0.05},
    ),
    ("dpo/length", {"loss_type": ["sigmoid_norm"], "beta": 0.7}, {"beta": 0.7, "length_normalised": True}),
    ("ipo/length", {"loss_type": ["ipo"], "beta": 0.4}, {"tau": 0.4, "length_norm": True}),
    ("apo/zero", {"loss_type": ["apo_zero"], "beta": 0.2}, {"beta": 0.2}),
    ("apo/down", {"loss_type": ["apo_down"], "beta": 0.2}, {"beta": 0.2, "variant": "down"}),
]


def pairwise(folder: str) -> Iterator[Case]:
    """Yield the losses of TRL's DPO trainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    for name, theirs, ours in PAIRWISE:
        policy, reference = language_model(0), language_model(1)
        original = copy.deepcopy(policy)
        trainer = DPOTrainer(
            model=policy, ref_model=reference, args=DPOConfig(output_dir=folder, **ARGUMENTS, **theirs),
            train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer(),
        )  # fmt: skip
        inputs = next(iter(trainer.get_train_dataloader()))
        seen, referred = Watched(trainer.model), Watched(trainer.ref_model)
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        (logps,), (reference_logps,) = seen.found, referred.found
        places = inputs["completion_mask"][:, 1:]
        prompts, completions = texts(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
        rows = len(prompts) // 2
        yield Case(
            name, ours, original, prompts, completions, of_rows(logps.detach(), places),
            {
                "reference_token_logps": of_rows(reference_logps.detach(), places).tolist(),
                "pairs": [[row, row + rows] for row in range(rows)],
            },
            float(loss.detach()), of_rows(logps.grad, places), gradients_of(trainer.model),
        )  # fmt: skip


UNPAIRED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "kto/kto",
        {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    ),
    ("kto/zero", {"loss_type": "apo_zero_unpaired", "beta": 0.3}, {"beta": 0.3, "reference_point": "zero"}),
]


def unpaired(folder: str) -> Iterator[Case]:
    """Yield the losses of TRL's KTO trainer; the seeds are such that its estimate of the KL is above 0."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    for name, theirs, ours in UNPAIRED:
        policy, reference = language_model(1), language_model(0)
        original = copy.deepcopy(policy)
        trainer = KTOTrainer(
            model=policy, ref_model=reference, args=KTOConfig(output_dir=folder, **ARGUMENTS, **theirs),
            train_dataset=Dataset.from_list(LABELLED), processing_class=tokenizer(),
        )  # fmt: skip
        inputs = next(iter(trainer.get_train_dataloader()))
        seen, referred = Watched(trainer.model), Watched(trainer.ref_model)
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        parts = [("", inputs["completion_mask"])]
        if theirs["loss_type"] == "kto":
            parts.insert(0, ("KL_", inputs["KL_completion_mask"]))
        prompts, completions, logps, references, gradients = [], [], [], [], []
        for (prefix, mask), found, other in zip(parts, seen.found, referred.found, strict=True):
            both = texts(inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"], mask)
            prompts += both[0]
            completions += both[1]
            gradient = torch.zeros_like(found) if found.grad is None else found.grad
            for values, kept in ((found.detach(), logps), (other.detach(), references), (gradient, gradients)):
                kept += of_rows(values, mask[:, 1:]).unbind()
        mismatched = [1.0] * (len(prompts) - len(inputs["label"])) + [0.0] * len(inputs["label"])
        labels = [float(label) for label in inputs["label"]]
        fields: dict[str, Any] = {
            "reference_token_logps": padded(references).tolist(),
            "labels": (labels if len(prompts) == len(labels) else [0.0] * len(labels) + labels),
        }
        if sum(mismatched):
            fields["mismatched"] = mismatched
        yield Case(
            name, ours, original, prompts, completions, padded(logps), fields, float(loss.detach()),
            padded(gradients), gradients_of(trainer.model),
        )  # fmt: skip


def padded(rows: list[Tensor]) -> Tensor:
    """Return rows of several lengths as one [N, T]."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


GROUPED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("rloo/clip", {}, {"beta": 0.05}),
    (
        "rloo/normalised",
        {"normalize_advantages": True, "epsilon_high": 0.4},
        {"normalise_advantages": True, "epsilon_high": 0.4},
    ),
    ("grpo/grpo", {"loss_type": "grpo", "beta": 0.1}, {"beta": 0.1}),
    (
        "grpo/k3",
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
        {"beta": 0.1, "kl_estimator": "k3"},
    ),
    ("grpo/dapo", {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.1}, {"variant": "dapo", "beta": 0.1}),
    (
        "grpo/dr_grpo",
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.1},
        {"variant": "dr_grpo", "max_completion_tokens": 6, "beta": 0.1},
    ),
    (
        "grpo/gspo",
        {
            "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.1,
            "beta": 0.1,
        },
        {"variant": "gspo", "epsilon": 0.1, "epsilon_high": 0.1, "beta": 0.1},
    ),
    (
        "grpo/cispo",
        {"loss_type": "cispo", "epsilon_high": 1.1, "scale_rewards": "batch"},
        {"variant": "cispo", "epsilon_high": 1.1, "scale_rewards": "batch"},
    ),
]  # fmt: skip


def grouped(folder: str) -> Iterator[Case]:
    """Yield the losses of TRL's RLOO and GRPO trainers, whose own code draws completions and computes advantages.

    The policy has moved a little since: the weights that drew are scaled by 1.1, so that some ratios are clipped.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    for name, theirs, ours in GROUPED:
        rewards: list[float | None] = []

        def reward(completion_ids: list[list[int]], rewards: list[float | None] = rewards, **rest: Any) -> list[Any]:
            found: list[float | None] = [sum(ids) / 10 - len(ids) for ids in completion_ids]
            found[1] = None  # unscorable
            rewards[:] = found
            return found

        is_rloo = name.startswith("rloo")
        own = {key: value for key, value in theirs.items() if key != "beta"}
        arguments = ARGUMENTS | {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 8}
        make, config = (RLOOTrainer, RLOOConfig) if is_rloo else (GRPOTrainer, GRPOConfig)
        policy, reference = language_model(0), language_model(1)
        trainer = make(
            model=policy, reward_funcs=reward, args=config(output_dir=folder, **arguments, **own, beta=0.0),
            train_dataset=Dataset.from_list([{"prompt": "w0 w1"}, {"prompt": "w6"}]), processing_class=tokenizer(),
        )  # fmt: skip
        # TRL would load a reference by the model's name: set what it would have made
        trainer.beta, trainer.ref_model = theirs.get("beta", 0.05 if is_rloo else 0.0), reference
        sys.modules[make.__module__].add_fused_lm_head(reference, temperature=trainer.temperature)
        trainer.current_gradient_accumulation_steps = 1
        torch.manual_seed(3)
        examples = [{"prompt": text} for text in ["w0 w1"] * 4 + ["w6"] * 4]
        inputs = trainer._generate_and_score_completions(examples)
        mask = inputs["completion_mask"]

        def logps_of(model: nn.Module, trainer: Any = trainer, inputs: Any = inputs) -> Tensor:
            both = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")]
            return trainer._get_per_token_logps_and_entropies(model, *both, inputs["completion_ids"].size(1))[0]

        with torch.no_grad():
            sampler = logps_of(trainer.model) * mask
            referred = logps_of(reference) * mask
            for parameter in trainer.model.parameters():
                parameter.mul_(1.1)
        original = language_model(0)  # a copy would share TRL's patched forward
        original.load_state_dict(trainer.model.state_dict())
        inputs["old_per_token_logps"], inputs["old_logps"] = sampler, sampler.sum(1)
        inputs["ref_per_token_logps"], inputs["num_items_in_batch"] = referred, mask.sum()
        watched: list[Tensor] = []
        compute = trainer._get_per_token_logps_and_entropies

        def retained(*args: Any, compute: Any = compute, watched: list[Tensor] = watched, **kwargs: Any) -> Any:
            found = compute(*args, **kwargs)
            found[0].retain_grad()
            watched.append(found[0])
            return found

        trainer._get_per_token_logps_and_entropies = retained
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        (logps,) = watched
        prompts = [row[m == 1].tolist() for row, m in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
        completions = [row[m == 1].tolist() for row, m in zip(inputs["completion_ids"], mask, strict=True)]
        fields = {
            "prompt_of": [0] * 4 + [1] * 4,
            "rewards": [float("nan") if value is None else value for value in rewards],
            "sampler_token_logps": of_rows(sampler, mask).tolist(),
            "reference_token_logps": of_rows(referred, mask).tolist(),
            "trl_advantages": inputs["advantages"].tolist(),
        }
        yield Case(
            name, ours, original, prompts, completions, of_rows(logps.detach(), mask), fields, float(loss.detach()),
            of_rows(logps.grad, mask), gradients_of(trainer.model),
        )  # fmt: skip


def functions() -> Iterator[Case]:
    """Yield the loss functions of the trainers of SimPO and ORPO, of mean log-probs."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 2, 4])
    mask = (torch.arange(4) < lengths[:, None]).float()
    logps = (-2 * torch.rand(4, 4, generator=generator) * mask).requires_grad_()
    means = logps.sum(1) / lengths
    device = SimpleNamespace(device="cpu")
    cpo: Any = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.6, beta=2.0, label_smoothing=0.0, accelerator=device
    )
    orpo: Any = SimpleNamespace(beta=0.3, accelerator=device)
    simpo_loss = CPOTrainer.cpo_loss(cpo, means[:2], means[2:])[0].mean()
    # the helper returns + beta log sigma, which the trainer subtracts from the likelihood's loss
    orpo_loss = (-means[:2] - ORPOTrainer.odds_ratio_loss(orpo, means[:2], means[2:])[0]).mean()
    for name, settings, loss in (
        ("simpo/simpo", {"beta": 2.0, "gamma": 0.6}, simpo_loss),
        ("orpo/orpo", {"odds_weight": 0.3}, orpo_loss),
    ):
        (gradient,) = torch.autograd.grad(loss, logps, retain_graph=True)
        completions = [[2] * int(length) for length in lengths]
        yield Case(
            name, settings, None, [[2]] * 4, completions, logps.detach(), {"pairs": [[0, 2], [1, 3]]},
            float(loss.detach()), gradient * mask, {},
        )  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield every case."""
    with tempfile.TemporaryDirectory() as folder:
        yield from pairwise(folder)
        yield from unpaired(folder)
        yield from grouped(folder)
        yield from functions()


def main(folder: str) -> None:
    """Write `trl_preference.json`."""
    import transformers
    import trl

    found = {
        case.name: {
            "settings": case.settings,
            "lengths": [len(tokens) for tokens in case.completions],
            "token_logps": case.token_logps.tolist(),
            **case.fields,
            "loss": case.loss,
            "gradient": case.gradient.tolist(),
        }
        for case in cases()
    }
    content = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.9g}"))
    (Path(folder) / "trl_preference.json").write_text(json.dumps(content | {"cases": rounded}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
