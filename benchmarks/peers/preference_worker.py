"""The contenders of `benchmarks/preference_step.py`: this library, TRL's trainers, and `generate` of transformers.

All read the same weights and the same token ids. TRL's update is its `training_step` (loss, its metrics, backward), the
clipping of the gradient and the optimiser's step, without its logging; ours is the whole `update` of the training loop.
"""

from __future__ import annotations

import argparse
import os
import resource
from typing import Any

import torch
from torch import Tensor
from worker import keep_memory, serve

NUM_BATCHES = 4


def tokens(options: argparse.Namespace, vocabulary: int) -> list[dict[str, Tensor]]:
    """Draw prompts [B, L] and two completions [B, T] of each; ids below 32 are left to special tokens."""
    draw = torch.Generator().manual_seed(7)
    low = min(32, vocabulary // 2)

    def some(length: int) -> Tensor:
        return torch.randint(low, min(vocabulary, 256) if vocabulary < 300 else vocabulary, (options.batch, length),
                             generator=draw)  # fmt: skip

    return [
        {"prompts": some(options.prompt), "chosen": some(options.completion), "rejected": some(options.completion)}
        for _ in range(NUM_BATCHES)
    ]


def memory() -> dict[str, float]:
    """Return the peak of this process's memory so far, in MB."""
    return {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def load(options: argparse.Namespace) -> Any:
    """Load our model; its network and adapter are what TRL trains, too."""
    from steelyard.nets.lm import LanguageModelConfig, LoRAConfig, load_language_model

    adapter = LoRAConfig(rank=options.rank) if options.train == "lora" else None
    needs_reference = options.task == "dpo" and options.library == "steelyard"
    config = LanguageModelConfig(options.model, adapter=adapter, reference="auto" if needs_reference else "none")
    return load_language_model(config, torch.Generator().manual_seed(0))


def steelyard_step(options: argparse.Namespace) -> None:
    """Serve updates of the training loop."""
    from steelyard import runtime
    from steelyard.data.experience import ExperienceBatch
    from steelyard.objectives.preference import CompletionSFTConfig, DPOConfig, build_preference_learner
    from steelyard.train.loop import update
    from steelyard.train.optim import OptimConfig, Optimizers

    runtime.prepare(runtime.RuntimeConfig(threads=options.threads))
    model = load(options)
    kinds = {"dpo": DPOConfig, "sft": CompletionSFTConfig}
    learner = build_preference_learner(model, kinds[options.task](learning_rate=options.rate))
    optimizers = Optimizers(learner, OptimConfig(max_grad_norm=1.0))
    rows = torch.arange(options.batch)
    batches = []
    for drawn in tokens(options, model.tokenizer.vocab_size):
        pair = options.task == "dpo"
        completions = torch.cat([drawn["chosen"], drawn["rejected"]]) if pair else drawn["chosen"]
        batch = ExperienceBatch(
            drawn["prompts"],
            torch.ones(drawn["prompts"].shape),
            completions,
            torch.ones(completions.shape),
            torch.cat([rows, rows]) if pair else rows,
            pairs=torch.stack([rows, rows + options.batch], 1) if pair else None,
        )
        if options.cached_reference:
            from dataclasses import replace

            batch = replace(batch, reference_token_logps=model.reference_token_logps(batch))
        batches.append(batch)

    def step(number: int) -> float:
        found = update(learner, optimizers, batches[number % NUM_BATCHES], 0, number)
        return float(found["loss/preference"])

    serve(step, {"library": "steelyard"}, {"losses": _losses(step), "memory": memory})


def trl_step(options: argparse.Namespace) -> None:
    """Serve updates of TRL's trainers."""
    if options.keep_memory:
        torch.set_float32_matmul_precision("medium")
        keep_memory()
    import datasets
    import transformers
    import trl

    model = load(options)
    network, own = model.network, getattr(model.tokenizer, "tokenizer", None)
    network.set_attn_implementation("sdpa")
    network.config._name_or_path = model.base
    if own is None:
        own = _word_tokenizer(model.tokenizer)
    if own.pad_token_id is None:
        own.pad_token = own.eos_token
    common = {
        "output_dir": options.scratch,
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.rate,
        "gradient_checkpointing": options.checkpointing,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "max_length": None,
    }
    if options.task == "dpo":
        rows = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
        config, kind = trl.DPOConfig(**common), trl.DPOTrainer
    else:
        rows = {"prompt": ["a"], "completion": ["b"]}
        config, kind = trl.SFTConfig(**common), trl.SFTTrainer
    extra: dict[str, Any] = {}
    peft = model._peft[0]
    if options.task == "dpo" and peft is None:
        import copy

        extra["ref_model"] = copy.deepcopy(network)
    if peft is not None:  # TRL puts a new adapter around the bare network; its first weights become ours
        start = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
        extra["peft_config"] = peft.peft_config["default"]
        network = peft.unload()
    trainer = kind(
        model=network, args=config, train_dataset=datasets.Dataset.from_dict(rows), processing_class=own, **extra
    )
    if peft is not None:
        found = dict(trainer.model.get_base_model().named_parameters())
        with torch.no_grad():
            for name, value in start.items():
                found[name].copy_(value)
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batches = []
    for drawn in tokens(options, model.tokenizer.vocab_size):
        parts = ("chosen", "rejected") if options.task == "dpo" else ("chosen",)
        ids = torch.cat([torch.cat([drawn["prompts"], drawn[part]], 1) for part in parts])
        scored = torch.zeros_like(ids)
        scored[:, options.prompt :] = 1
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if options.task == "dpo":
            batch["completion_mask"] = scored
        else:
            batch["labels"] = ids.masked_fill(scored == 0, -100)
        batches.append(batch)
    count = torch.tensor(options.batch * options.completion)

    def step(number: int) -> float:
        batch = dict(batches[number % NUM_BATCHES])
        arguments = {"num_items_in_batch": count} if options.task == "sft" else {}
        loss = trainer.training_step(trainer.model, batch, **arguments)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), config.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return float(loss)

    facts = {"library": "trl", "trl": trl.__version__, "transformers": transformers.__version__}
    facts["optimizer"] = type(trainer.optimizer).__name__
    serve(step, facts, {"losses": _losses(step), "memory": memory})


def steelyard_sample(options: argparse.Namespace) -> None:
    """Serve rounds of sampling with log-probs."""
    from steelyard import runtime
    from steelyard.envs.samplers import CausalLMSampler, SamplingConfig

    runtime.prepare(runtime.RuntimeConfig(threads=options.threads))
    model = load(options)
    sampler = CausalLMSampler(model, SamplingConfig(max_new_tokens=options.completion))
    sampler.eos = None  # every contender writes as many tokens
    prompts = tokens(options, model.tokenizer.vocab_size)[0]["prompts"]

    def step(number: int) -> None:
        mask, keys = torch.ones(prompts.shape), torch.arange(len(prompts))
        found = sampler.sample(prompts, mask, options.samples, seed=0, step=number, keys=keys)
        assert found.completions.shape == (len(prompts) * options.samples, options.completion)

    serve(step, {"library": "steelyard"}, {"memory": memory})


def generate_sample(options: argparse.Namespace) -> None:
    """Serve rounds of `generate`, as a training loop calls it."""
    import transformers

    model = load(options)
    network = model.network.eval()
    network.set_attn_implementation("sdpa")
    prompts = tokens(options, model.tokenizer.vocab_size)[0]["prompts"]
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=options.completion,
        num_return_sequences=options.samples,
        return_dict_in_generate=True,
        output_logits=options.logps,
        pad_token_id=0,
    )
    network.generation_config = transformers.GenerationConfig()

    @torch.no_grad()
    def step(number: int) -> None:
        found = network.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
        written = found.sequences[:, prompts.shape[1] :]
        assert written.shape == (len(prompts) * options.samples, options.completion)
        if options.logps:
            logits = torch.stack(found.logits, 1)
            for row, ids in zip(logits, written, strict=True):  # row by row: what a careful user does
                row.log_softmax(-1).gather(1, ids[:, None])

    serve(step, {"library": "transformers", "transformers": transformers.__version__}, {"memory": memory})


def _losses(step: Any) -> Any:
    """Return the question that carries out the first updates and answers with their losses."""

    def losses(count: int) -> list[float]:
        return [step(number) for number in range(count)]

    return losses


def _word_tokenizer(byte: Any) -> Any:
    """Return a tokenizer object for TRL to hold; its ids are never used."""
    import tokenizers
    import transformers

    vocabulary = {"a": 0, "b": 1, "c": 2, "<s>": byte.bos, "</s>": byte.eos, "<pad>": byte.pad}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=("steelyard", "trl", "generate"), required=True)
    parser.add_argument("--task", choices=("dpo", "sft", "sample"), required=True)
    parser.add_argument("--train", choices=("lora", "full"), default="lora")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-6)
    parser.add_argument("--cached-reference", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--logps", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.task == "sample":
        (steelyard_sample if options.library == "steelyard" else generate_sample)(options)
    else:
        (steelyard_step if options.library == "steelyard" else trl_step)(options)


if __name__ == "__main__":
    main()
