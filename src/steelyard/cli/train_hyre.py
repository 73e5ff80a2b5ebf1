"""`steelyard train hyre`: many heads on one backbone, to be re-weighted for one user by a handful of labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from steelyard.adapt.backbones import (
    AgentConfig,
    BackboneConfig,
    FeaturesConfig,
    TableBackboneConfig,
    WordsConfig,
)
from steelyard.cli import arguments
from steelyard.config import config_hash, read_config, with_fields
from steelyard.data.labelled_files import ARRAYS, TABLES
from steelyard.errors import ConfigError, near
from steelyard.nets.encoder import EncoderConfig
from steelyard.nets.lm import LanguageModelConfig, LoRAConfig
from steelyard.workflows import hyre

BACKBONES = ("minilm", "smollm2", "tiny", "words", "table", "features")
USAGE = f"""usage: steelyard train hyre --data FILE [--group-column NAME] [--backbone NAME] [--heads K] [OPTIONS]
       steelyard train --resume DIR

Train an ensemble of heads for the price of one model. A few labels of one user then choose among the heads:
steelyard adapt hyre, steelyard serve reward, --scorer hyre:DIR.

  --data FILE          pairs of texts (.jsonl, .json, .parquet, a folder, a name on the hub), a table (.csv, .tsv) or
                       features (.npz, .safetensors)
  --group-column NAME  column that names the user, annotator or source of an example; some groups are held out, to
                       choose how to adapt and to say what adaptation brings
  --task TASK          preference (default), regression or classification
  --target NAME        column of a table that is learned
  --backbone NAME      {", ".join(BACKBONES)}, a folder, encoder:NAME or lm:NAME on the hub, critic:RUN or actor:RUN;
                       default: table for tables, features for features, minilm for texts
  --lora RANK          train low-rank adapters of a language model
  --heads K            number of heads
  --shares SHARES      what each head sees: all, bootstrap, groups, or one_group (a head for every user)
  --trunk WIDTHS       hidden layers between a frozen backbone and the heads, e.g. 128 or 256,128
  --config FILE        start from the config of another run, or one written by hand
  --out DIR            run directory; default: runs/hyre-HASH
"""


def main(argv: list[str]) -> int:
    """Run `steelyard train hyre`."""
    out, rest = arguments.take_option(argv, "--out", None)
    config = read(rest)
    folder = out or f"runs/hyre-{config_hash(config)[:8]}"
    return finish(*arguments.carry_out(lambda: hyre.start(config, folder)))


def read(argv: list[str]) -> hyre.HyReRun:
    """Return the config that the options describe."""
    file, rest = arguments.take_option(argv, "--config", None)
    config = read_config(hyre.HyReRun, file) if file else hyre.HyReRun()
    data, rest = arguments.take_option(rest, "--data", None)
    if data is not None:
        config = with_fields(config, {"data.path": data})
    name, rest = arguments.take_option(rest, "--backbone", None)
    if name is None and file is None:
        suffix = Path(config.data.path or "").suffix.lower()
        name = "table" if suffix in TABLES else "features" if suffix in ARRAYS else "minilm"
    fields: dict[str, Any] = {} if name is None else {"backbone": backbone(name)}
    rank, rest = arguments.take_option(rest, "--lora", None)
    if rank is not None:
        model = fields.get("backbone", config.backbone)
        if not isinstance(model, LanguageModelConfig):
            raise ConfigError(
                f"--lora: adapters are for language models, e.g. --backbone smollm2; found {name or model}"
            )
        number = _number("--lora", rank)
        fields["backbone"] = replace(model, adapter=LoRAConfig(rank=number, alpha=2.0 * number))
        fields["objective.learning_rate"] = 1e-4
    elif "--trained" in rest:
        fields["objective.learning_rate"] = 1e-5
    for option, key in (("--group-column", "data.group_column"), ("--target", "data.target")):
        value, rest = arguments.take_option(rest, option, None)
        fields |= {} if value is None else {key: value}
    for option, key, known in (
        ("--task", "objective.task", ("preference", "regression", "classification")),
        ("--shares", "objective.shares", ("all", "bootstrap", "groups", "one_group")),
    ):
        value, rest = arguments.take_option(rest, option, None)
        if value is not None and value not in known:
            raise ConfigError(f"{option}: unknown {value!r}; {near(value, known)}")
        fields |= {} if value is None else {key: value}
    heads, rest = arguments.take_option(rest, "--heads", None)
    if heads is not None:
        fields["objective.heads.num_heads"] = _number("--heads", heads)
    trunk, rest = arguments.take_option(rest, "--trunk", None)
    if trunk is not None:
        fields["trunk"] = tuple(_number("--trunk", width) for width in trunk.split(","))
    if fields.get("objective.shares") == "one_group":  # without examples a head says nothing, instead of anything
        fields["objective.heads.init_scale"] = 0.0
    config = with_fields(config, fields)
    found: hyre.HyReRun = arguments.parse(hyre.HyReRun, config, "steelyard train hyre", rest, USAGE)
    return found


def backbone(name: str) -> BackboneConfig:
    """Return the backbone that a word on the command line means.

    Raises:
        ConfigError: it means none, or may mean several.
    """
    kind, _, rest = name.partition(":")
    if kind in ("critic", "actor") and rest:
        return AgentConfig(rest, "critic" if kind == "critic" else "actor")
    if kind == "encoder" and rest:
        return EncoderConfig(rest)
    if kind == "lm" and rest:
        return LanguageModelConfig(rest, reference="none")
    match name:
        case "table":
            return TableBackboneConfig()
        case "features":
            return FeaturesConfig()
        case "words":
            return WordsConfig()
        case "minilm":
            return EncoderConfig()
        case "smollm2" | "tiny":
            return LanguageModelConfig(name, reference="none")
    folder = Path(name)
    if (folder / "config.json").is_file():
        try:
            architectures = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
        except (ValueError, AttributeError):
            raise ConfigError(f"--backbone {name}: its config.json is not that of a model") from None
        causal = any("CausalLM" in str(one) or "LMHead" in str(one) for one in architectures)
        return LanguageModelConfig(name, reference="none") if causal else EncoderConfig(name)
    raise ConfigError(
        f"--backbone: expected {', '.join(BACKBONES)}, a model's folder, encoder:NAME, lm:NAME, critic:RUN or "
        f"actor:RUN; found {name!r}"
    )


def _number(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option}: expected a whole number, found {text!r}") from None


def resume(directory: str, rest: list[str]) -> int:
    """Continue a head set's run."""
    if rest:
        raise ConfigError(f"--resume takes no other options (the run's config is in {directory}), found {rest[0]!r}")
    return finish(*arguments.carry_out(lambda: hyre.resume(directory)))


def finish(folder: Path | None, status: int) -> int:
    """Report on a finished run; return the exit status."""
    if folder is not None:
        from steelyard.report.heads import show

        show(folder)
    return status
