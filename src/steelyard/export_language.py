"""Language models leave the house: safetensors in the hub's layout, merged or as an adapter, with a model card.

DIR/model.safetensors, config.json, ...        after full fine-tuning, or with the adapter merged: `transformers`
DIR/adapter_model.safetensors, ...             the adapter alone: `peft`
DIR/README.md                                  model card: only what stands in the run's files
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from steelyard import __version__
from steelyard.artefact import find
from steelyard.bench.stats import Estimate
from steelyard.config import plain
from steelyard.errors import CheckpointError, ConfigError
from steelyard.nets.lm import CausalLM, LanguageModelConfig
from steelyard.report.language import PAIR_MEASURES, SAMPLE_MEASURES, estimates, pair_rows, sample_rows
from steelyard.train import checkpoint
from steelyard.workflows.preference import FORMAT, PreferenceArtefact, load_policy


def is_language_artefact(path: str | Path) -> bool:
    """Return whether a run, checkpoint or pretrained/ directory holds a fine-tuned language model."""
    try:
        file = find(path) / "pretrained/config.json"
    except CheckpointError:
        return False
    return file.is_file() and json.loads(file.read_text()).get("format") == FORMAT


def export_language(run: str | Path, out: str | Path, merged: bool | None = None, which: str = "last") -> Path:
    """Write the policy of a preference run to the new directory `out`. Return the directory.

    Args:
        run: run directory, checkpoint or pretrained/ directory.
        out: it must not exist.
        merged: add the adapter to the weights; False: the adapter alone; None: merged.
        which: "last" or "best" checkpoint.

    Raises:
        ConfigError: `out` exists, or there is no adapter to write alone.
        CheckpointError: the model has no layout that `transformers` knows.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; name a new directory")
    folder = find(run, "best" if which == "best" else "last")
    learner, artefact = load_policy(folder)
    model = learner.model
    if not isinstance(model, CausalLM):
        raise CheckpointError(
            f"{run}: its model is a plain transformer of this library, which transformers does not know; nothing to "
            "export"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(staging, merged=merged is not False)
        _name_base(staging / "adapter_config.json", artefact)
        (staging / "README.md").write_text(
            card(folder, artefact, merged is not False, which, model._peft[0] is not None)
        )
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o777 & ~mask)  # mkdtemp made it private
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _name_base(file: Path, artefact: PreferenceArtefact) -> None:
    """Name the hub's model in an adapter of the packaged one, instead of a folder of this machine."""
    if file.is_file() and isinstance(artefact.model, LanguageModelConfig) and artefact.model.name == "smollm2":
        settings = json.loads(file.read_text()) | {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
        file.write_text(json.dumps(settings, indent=2) + "\n")


def card(folder: Path, artefact: PreferenceArtefact, merged: bool, which: str, adapter: bool) -> str:
    """Return the model card of a checkpoint: only what stands in the run's files."""
    step = checkpoint.read_manifest(folder)["step"]
    run = folder.parent.parent
    files = {name: json.loads((run / f"{name}.json").read_text())
             for name in ("case", "environment", "config") if (run / f"{name}.json").is_file()}  # fmt: skip
    case, about, config = (files.get(name, {}) for name in ("case", "environment", "config"))
    kind, model = artefact.objective.kind, artefact.model
    base = model.name if isinstance(model, LanguageModelConfig) else "a random transformer"
    what = "merged into the weights" if merged else "alone; it needs the base model"
    source = config.get("experience", {}).get("source", "not recorded")
    data = f"content hash `{case['data_hash']}`" if case.get("data_hash") else "not recorded"
    versions = {"steelyard": about.get("steelyard"), "commit": about.get("commit"), **about.get("packages", {})}
    listed = ", ".join(f"{name} {value}" for name, value in versions.items() if value) or "not recorded"
    settings: dict[str, Any] = {"objective": plain(artefact.objective), "negative": artefact.negative}
    settings |= {key: config[key] for key in ("experience", "scorer") if key in config}
    settings |= {"sampling": plain(artefact.sampling), "model": plain(model)}
    lines = [
        "---",
        "tags: [steelyard, preference-fine-tuning]",
        "---",
        f"# {base} after {kind}\n",
        f"`{base}` fine-tuned with `{kind}` by Steelyard: {step} updates"
        + (f", seed {case['seed']}" if case else "")
        + (f"; low-rank adapters, {what}." if adapter else "; all weights were trained."),
        "\n## What is in it\n",
        f"- Base model: `{base}`"
        + (" (SmolLM2-135M-Instruct from a 4-bit file, slightly damaged)" if base == "smollm2" else ""),
        f"- Data: {data}; completions from: {source}",
        f"- Reward: {'`' + config['scorer'] + '`' if config.get('scorer') else 'none; preferences only'}",
        "\n## Evaluation\n",
        *evaluation_lines(run, step),
        *(
            ["", 'The checkpoint "best" was chosen by these evaluations, so they are optimistic.']
            if which == "best"
            else []
        ),
        "\n## Objective and settings\n",
        "```json",
        json.dumps(settings, indent=2),
        "```\n",
        "## Versions\n",
        f"Trained with: {listed}. Exported with steelyard {__version__}.\n",
        "## Limits\n",
        "- One training run; the intervals above are over held-out rows and say nothing about other seeds.",
        "- The reward it was trained on is not the quality of its answers: a policy finds what the reward overlooks.",
        "- It was judged on held-out rows of its own data only; safety was not evaluated.",
        "- Whatever is wrong with the base model and the data is in it. The licence is that of the base model and the "
        "data.",
    ]
    return "\n".join(lines) + "\n"


def evaluation_lines(run: Path, step: int) -> list[str]:
    """Return the evaluation of these weights as a Markdown table with intervals."""
    lines = ["| measure | value | 95% interval | rows |", "|---|---|---|---|"]
    plan = ((sample_rows(run), SAMPLE_MEASURES, "prompt"), (pair_rows(run), PAIR_MEASURES, "pair"))
    for rows, measures, group in plan:
        for key, words in measures:
            found = estimates([row for row in rows if row["update_step"] == step], key, group)
            if step in found:
                lines.append(_line(words, found[step], group))
    if len(lines) == 2:
        return ["No evaluation of these weights is on record."]
    return ["On held-out rows, made by the training run itself; bootstrap over prompts or pairs.\n", *lines]


def _line(words: str, estimate: Estimate, group: str) -> str:
    interval = "one only" if estimate.low is None else f"[{estimate.low:.4g}, {estimate.high:.4g}]"
    return f"| {words} | {estimate.value:.4g} | {interval} | {estimate.n} {group}s |"
