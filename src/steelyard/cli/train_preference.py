"""`steelyard train preference` and `steelyard train reward_model`: fine-tuning of language models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from steelyard.cli import arguments
from steelyard.config import config_hash, read_config, with_fields
from steelyard.errors import ConfigError, near
from steelyard.nets.lm import LanguageModelConfig, LoRAConfig
from steelyard.objectives.preference import PREFERENCE_OBJECTIVES
from steelyard.train.distributed import is_main
from steelyard.workflows import preference, reward_model
from steelyard.workflows.common import kind_of_run

ALIASES = {
    "--beta": ("objective.beta", "beta"),
    "--learning-rate": ("objective.learning_rate", "learning_rate"),
    "--epsilon": ("objective.epsilon", "epsilon"),
    "--epsilon-high": ("objective.epsilon_high", "epsilon_high"),
    "--num-generations": ("experience.num_generations", "num_generations = N"),
    "--num-iterations": ("experience.reuse", "num_iterations = T"),
    "--per-device-train-batch-size": ("experience.minibatch_prompts", "per_device_train_batch_size = M"),
    "--steps-per-generation": ("experience.prompts_per_refresh", "steps_per_generation = B / M"),
    "--gradient-accumulation-steps": ("optim.shards", "gradient_accumulation_steps"),
    "--num-train-epochs": ("experience.epochs", "num_train_epochs"),
    "--max-steps": ("steps", "max_steps"),
    "--max-completion-length": ("sampling.max_new_tokens", "max_completion_length"),
    "--max-prompt-length": ("data.max_prompt_tokens", "max_prompt_length"),
    "--temperature": ("sampling.temperature", "temperature"),
}
"""TRL's names for our fields: option -> (field, what TRL calls it)."""

TABLE = "\n".join(
    f"  {option:32s} {field}" + ("  (times M)" if option == "--steps-per-generation" else "")
    for option, (field, _) in ALIASES.items()
)

USAGE = f"""usage: steelyard train preference --data FILE [--objective NAME] [--model NAME] [OPTIONS]
       steelyard train --resume DIR

Fine-tune a language model on preferences or rewards.

objectives: {", ".join(PREFERENCE_OBJECTIVES)}

  --data FILE         preferences or prompts in TRL's columns: .jsonl, .json, .parquet, a folder, a name on the hub
  --objective NAME    default: dpo
  --model NAME        a name on the hub, a folder, a *.gguf file, smollm2 (packaged, default), or tiny (random)
  --lora RANK         train low-rank adapters instead of all weights
  --source SOURCE     dataset: the data's completions; policy: fresh ones of the model; mixture: both
  --reuse T           passes over each batch of completions
  --negative LAMBDA   scale of the negative gradient: 1 as published, 0 pushes nothing down
  --scorer SPEC       reward of fresh completions: length:min, contains:WORD, reward_model:DIR, python:FILE.py:FUNCTION
  --config FILE       start from the config of another run, or one written by hand
  --out DIR           run directory; default: runs/preference-OBJECTIVE-HASH
  --dry-run ROWS      build everything, carry out one update on so many rows, show shapes and masks; write nothing

TRL's names are understood too:
{TABLE}

`steelyard train preference --help` lists every option (with --objective NAME, that objective's).
"""

REWARD_USAGE = """usage: steelyard train reward_model --data FILE [--model NAME] [--lora RANK] [OPTIONS]

Train a Bradley-Terry reward model on preferences; use it with --scorer reward_model:DIR.
"""


def default_run(kind: str) -> preference.PreferenceRun:
    """Return the run that an objective has by default: on-policy where it makes no sense otherwise."""
    if kind not in PREFERENCE_OBJECTIVES:
        raise ConfigError(f"unknown preference objective {kind!r}; {near(kind, PREFERENCE_OBJECTIVES)}")
    objective = PREFERENCE_OBJECTIVES[kind]()
    config = preference.PreferenceRun(objective=objective)
    if objective.needs.on_policy or objective.needs.sampler:
        config = replace(config, experience=replace(config.experience, source="policy"))
    return config


def main(argv: list[str]) -> int:
    """Run `steelyard train preference`."""
    typed = typed_scorers(argv)
    out, rest = arguments.take_option(argv, "--out", None)
    rows, rest = arguments.take_option(rest, "--dry-run", None)
    config = read(rest)
    if rows is not None:
        if not rows.isdigit():
            raise ConfigError(f"--dry-run: expected a number of rows, found {rows!r}")
        preference.dry_run(config, int(rows), typed)
        return 0
    folder = out or f"runs/preference-{config.objective.kind}-{config_hash(config)[:8]}"
    return finish(*arguments.carry_out(lambda: preference.start(config, folder, trusted=typed)))


def read(argv: list[str]) -> preference.PreferenceRun:
    """Return the config that the options describe."""
    file, rest = arguments.take_option(argv, "--config", None)
    kind, rest = arguments.take_option(rest, "--objective", None)
    config = read_config(preference.PreferenceRun, file) if file else default_run(kind or "dpo")
    if kind is not None and config.objective.kind != kind:
        raise ConfigError(f"{file}: its objective is {config.objective.kind!r}, but {kind!r} was asked for")
    model, rest = with_model(config.model, rest)
    config = replace(config, model=model)
    source, rest = arguments.take_option(rest, "--source", None)
    short = {"--data": "data.path", "--reuse": "experience.reuse", "--scorer": "scorer", "--negative": "negative"}
    fields: dict[str, Any] = {}
    for option, field in short.items():
        value, rest = arguments.take_option(rest, option, None)
        if value is not None:
            fields[field] = value if option in ("--data", "--scorer") else _number(option, value, option == "--reuse")
    fields |= {"experience.source": _source(source)} if source is not None else {}
    config = with_fields(config, fields)
    config = with_fields(config, _aliases(config, rest))
    for option in ALIASES:
        _, rest = arguments.take_option(rest, option, None)
    found: preference.PreferenceRun = arguments.parse(
        preference.PreferenceRun, config, "steelyard train preference", rest, USAGE
    )
    return found


def _source(name: str) -> str:
    if name not in ("dataset", "policy", "mixture"):
        raise ConfigError(f"--source: expected dataset, policy or mixture, found {name!r}")
    return name


def _number(option: str, text: str, whole: bool) -> float | int:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise ConfigError(f"{option}: expected a {'whole ' if whole else ''}number, found {text!r}") from None


def _aliases(config: preference.PreferenceRun, argv: list[str]) -> dict[str, Any]:
    """Return {field: value} of the options with TRL's names."""
    found: dict[str, Any] = {}
    whole = ("num", "per", "steps", "gradient", "max")
    for option, (field, _) in ALIASES.items():
        text, _ = arguments.take_option(argv, option, None)
        if text is not None:
            is_whole = option[2:].split("-")[0] in whole and option != "--num-train-epochs"
            found[field] = _number(option, text, is_whole)
    if "sampling.max_new_tokens" in found and hasattr(config.objective, "max_completion_tokens"):
        found["objective.max_completion_tokens"] = found["sampling.max_new_tokens"]  # Dr. GRPO divides by it
    if "experience.prompts_per_refresh" in found:
        size = found.get("experience.minibatch_prompts", config.experience.minibatch_prompts)
        found["experience.prompts_per_refresh"] *= size
    return found


def with_model(model: Any, argv: list[str]) -> tuple[Any, list[str]]:
    """Apply `--model NAME` and `--lora RANK`; return the model's config and the remaining arguments."""
    name, argv = arguments.take_option(argv, "--model", None)
    rank, argv = arguments.take_option(argv, "--lora", None)
    if name is not None:
        model = replace(model, name=name) if isinstance(model, LanguageModelConfig) else LanguageModelConfig(name=name)
    if rank is not None:
        if not isinstance(model, LanguageModelConfig):
            raise ConfigError("--lora: a plain transformer has no adapters; name a language model with --model")
        number = int(_number("--lora", rank, True))
        model = replace(model, adapter=LoRAConfig(rank=number, alpha=2.0 * number))
    return model, argv


def typed_scorers(argv: list[str]) -> frozenset[str]:
    """Return the words of a command line that may name code to run: only what was typed may."""
    words = [word.split("=", 1)[1] if word.startswith("--") and "=" in word else word for word in argv]
    return frozenset(word for word in words if "python:" in word)


def resume(directory: str, rest: list[str]) -> int:
    """Continue a preference run or a reward model's; `--scorer` repeats a scorer that is code."""
    typed = typed_scorers(rest)
    for option in ("--scorer", "--evaluation.scorer"):
        _, rest = arguments.take_option(rest, option, None)
    if rest:
        raise ConfigError(f"--resume takes no other options (the run's config is in {directory}), found {rest[0]!r}")
    if kind_of_run(directory) == "reward_model":
        return finish(*arguments.carry_out(lambda: reward_model.resume(directory)))
    return finish(*arguments.carry_out(lambda: preference.resume(directory, trusted=typed)))


def main_reward_model(argv: list[str]) -> int:
    """Run `steelyard train reward_model`."""
    out, rest = arguments.take_option(argv, "--out", None)
    file, rest = arguments.take_option(rest, "--config", None)
    data, rest = arguments.take_option(rest, "--data", None)
    config = read_config(reward_model.RewardModelRun, file) if file else reward_model.RewardModelRun()
    model, rest = with_model(config.model, rest)
    config = replace(config, model=model)
    if data is not None:
        config = replace(config, data=replace(config.data, path=data))
    config = arguments.parse(reward_model.RewardModelRun, config, "steelyard train reward_model", rest, REWARD_USAGE)
    folder = out or f"runs/reward_model-{config_hash(config)[:8]}"
    return finish(*arguments.carry_out(lambda: reward_model.start(config, folder)))


def finish(folder: Path | None, status: int) -> int:
    """Report on a finished run; return the exit status."""
    if folder is not None and is_main():
        from steelyard.report.language import show

        show(folder)
    return status


__all__ = ["main", "main_reward_model", "resume"]
