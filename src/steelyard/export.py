"""Policies leave the house: a policy and its critic as ONNX graphs, with a machine-readable spec and a model card.

    DIR/actor.onnx    raw observations [B, O] -> actions [B, A] in the environment's units, deterministic mode
    DIR/critic.onnx   raw observations and actions -> min_i Q_i [B], where there is a critic
    DIR/spec.json     names, shapes, order of concatenation, bounds, meaning, hashes
    DIR/README.md     model card

Normaliser and action box are inside the graphs. Nothing is written unless both graphs gave the same numbers in
onnxruntime as in torch. `steelyard.deploy` reads DIR with numpy and onnxruntime alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from steelyard import __version__
from steelyard.artefact import ControlArtefact, find, load_learner
from steelyard.bench import stats
from steelyard.bench.rows import read_lines
from steelyard.config import plain
from steelyard.data.batch import TransitionBatch
from steelyard.data.episode import Spec
from steelyard.data.normalize import Normalizer
from steelyard.errors import CheckpointError, ConfigError, require
from steelyard.objectives.actor_critic import observation_size
from steelyard.objectives.base import Learner
from steelyard.rng import numpy_generator, torch_generator
from steelyard.train import checkpoint

FORMAT = "steelyard-export-1"
TOLERANCE = 1e-4
"""Greatest difference between torch and onnxruntime, relative to the largest number that torch gave (at least 1)."""
OPSET = 18
ROWS = 64


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: the directory.
        differences: file -> greatest absolute difference between torch and onnxruntime.
    """

    path: Path
    differences: dict[str, float]


class _Actor(nn.Module):
    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner
        self.generator = torch_generator(0, "export")

    def forward(self, observations: Tensor) -> Tensor:
        return self.learner.policy().act(observations, self.generator, "mean")


class _Critic(nn.Module):
    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        nothing = observations.new_zeros(observations.shape[:1], dtype=torch.float32)
        batch = TransitionBatch(observations, actions, nothing, observations, nothing, nothing, nothing)
        value: Tensor = self.learner.score(batch)  # type: ignore[operator]
        return value


def export(run: str | Path, out: str | Path, which: Literal["last", "best"] = "last") -> Export:
    """Write the policy of a run, checkpoint or pretrained/ directory to the new directory `out`.

    Raises:
        CheckpointError: the policy cannot be one graph call, or onnxruntime does not give torch's numbers.
        ConfigError: `out` exists.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "export")
    out = Path(out)
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; name a new directory")
    folder = find(run, which)
    learner, artefact = load_learner(folder)
    learner.requires_grad_(False)
    _require_one_call(learner, artefact, folder)
    inputs = _inputs(learner, artefact.spec)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        actor, observations, actions = _Actor(learner), inputs["observations"], inputs["actions"]
        differences = {"actor.onnx": _graph(actor, {"observations": observations}, "actions", staging / "actor.onnx")}
        if hasattr(learner, "score"):
            differences["critic.onnx"] = _graph(
                _Critic(learner), {"observations": observations, "actions": actions}, "value", staging / "critic.onnx"
            )
        spec = _spec(artefact, inputs, differences, staging)
        (staging / "spec.json").write_text(json.dumps(spec, indent=2) + "\n")
        (staging / "README.md").write_text(_card(folder, artefact, differences, which))
        staging.chmod(0o777 & ~_umask())  # mkdtemp made it private
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Export(out, differences)


def _require_one_call(learner: Learner, artefact: ControlArtefact, folder: Path) -> None:
    """Refuse policies that remember something between calls or draw random numbers in their deterministic mode."""
    policy = learner.policy()
    rows = _inputs(learner, artefact.spec)["observations"]
    generator = torch_generator(0, "export")
    before = generator.get_state()
    policy.reset()
    policy.act(rows, generator, "mean")
    if memory := sorted(getattr(policy, "state_tensors", dict)()):
        raise CheckpointError(
            f"{folder}: {type(policy).__name__} remembers {memory[0]!r} between steps (an action chunk being played), "
            "which one graph call cannot express; use steelyard.load there"
        )
    if not torch.equal(before, generator.get_state()):
        raise CheckpointError(
            f"{folder}: {type(policy).__name__} draws random numbers also in its deterministic mode (best of several "
            "samples), which one graph call cannot express; use steelyard.load there"
        )


def _inputs(learner: Learner, spec: Spec) -> dict[str, Tensor]:
    """Draw observations within three standard deviations of the data's mean, and actions within their bounds."""
    draw, size = torch_generator(0, "export/inputs"), observation_size(spec)
    observations = torch.rand(ROWS, size, generator=draw) * 2 - 1
    if all(entry.dtype == "uint8" for entry in spec.observations.values()):
        observations = ((observations + 1) * 127.5).to(torch.uint8)
    else:
        found = [m for m in learner.modules() if isinstance(m, Normalizer) and m.mean.shape == (size,)]
        if found:
            observations = found[0].inverse(3 * observations)
    if spec.num_actions is not None:
        return {"observations": observations, "actions": torch.arange(ROWS) % spec.num_actions}
    low, high = torch.tensor(spec.actions.low), torch.tensor(spec.actions.high)
    return {"observations": observations, "actions": low + (high - low) * torch.rand(ROWS, len(low), generator=draw)}


def _graph(module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> float:
    """Write a graph with a free batch axis and compare it with torch at several batch sizes. Return the difference."""
    onnxruntime = require("onnxruntime", "export")
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in inputs),
                opset_version=OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        assert program is not None
        program.save(str(path), external_data=False)
    except Exception as error:  # the exporter raises anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path.name}: torch cannot express this policy as a graph: {reason:.200}") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    greatest = 0.0
    for rows in (ROWS, 1, 3):
        some = {name: values[:rows] for name, values in inputs.items()}
        with torch.no_grad():
            expected = module(*some.values()).numpy()
        try:
            found = session.run([output], {name: values.numpy() for name, values in some.items()})[0]
        except Exception as error:  # onnxruntime's own; e.g. a policy that fixed the batch size while it was traced
            raise CheckpointError(f"{path.name}: does not run on {rows} rows: {error!s:.160}") from error
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise CheckpointError(
                f"{path.name}: gives {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}"
            )
        difference = float(np.abs(found.astype(np.float64) - expected).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise CheckpointError(
                f"{path.name}: onnxruntime differs from torch by {difference:.3g}, more than {TOLERANCE:g} relative; "
                "nothing was written"
            )
        greatest = max(greatest, difference)
    return greatest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and advice off the terminal; its errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _spec(
    artefact: ControlArtefact, inputs: dict[str, Tensor], differences: dict[str, float], folder: Path
) -> dict[str, Any]:
    spec = plain(artefact.spec)
    dtype = str(inputs["observations"].dtype).removeprefix("torch.")
    return {
        "format": FORMAT,
        "steelyard": __version__,
        "torch": torch.__version__,
        "objective": artefact.objective.kind,
        "env": None if artefact.env is None else plain(artefact.env),
        # a list, because the order is the order of concatenation
        "observations": [{"name": name, **entry} for name, entry in spec["observations"].items()],
        "observation_size": observation_size(artefact.spec),
        "observation_dtype": dtype,
        "actions": spec["actions"] | {"num_actions": spec["num_actions"], "meaning": spec["meaning"]},
        "graphs": {
            name: {
                "inputs": ["observations"] if name == "actor.onnx" else ["observations", "actions"],
                "output": "actions" if name == "actor.onnx" else "value",
                "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
                "greatest_difference_to_torch": difference,
            }
            for name, difference in differences.items()
        },
    }


def _card(folder: Path, artefact: ControlArtefact, differences: dict[str, float], which: str) -> str:
    """Return the model card: only what stands in the run's files."""
    step = checkpoint.read_manifest(folder)["step"]
    run = folder.parent.parent
    case = json.loads((run / "case.json").read_text()) if (run / "case.json").is_file() else {}
    about = json.loads((run / "environment.json").read_text()) if (run / "environment.json").is_file() else {}
    kind, spec = artefact.objective.kind, artefact.spec
    task = "not stated (trained from data alone)" if artefact.env is None else f"`{artefact.env.id}`"
    names = ", ".join(f"`{name}` {list(entry.shape)}" for name, entry in spec.observations.items())
    if spec.num_actions is None:
        actions = f"{int(np.prod(spec.actions.shape))} continuous values within {_bounds(spec)}"
    else:
        actions = f"one of {spec.num_actions} choices (int64)"
    stated = {key: value for key, value in plain(spec.meaning).items() if value is not None}
    if case.get("data_hash"):
        data = f"content hash `{case['data_hash']}`"
    else:
        data = "none (learned online)" if case else "not known (the checkpoint stands alone)"
    seed = f", seed {case['seed']}" if case else ""
    critic = "`critic.onnx`: raw observations and actions -> the smallest critic's value [B].\n"
    versions = {"steelyard": about.get("steelyard"), "commit": about.get("commit"), **about.get("packages", {})}
    lines = [
        f"# Policy: {case.get('label') or kind}\n",
        f"A policy trained with `{kind}` by Steelyard, after {step} updates{seed}, as ONNX graphs.\n",
        "## What is in it\n",
        f"- Task: {task}",
        f"- Prior data: {data}",
        f"- Observations, in the order of concatenation: {names}",
        f"- Actions: {actions}",
        f"- Meaning of the actions: {json.dumps(stated) if stated else 'not stated by the data'}",
        "\n`actor.onnx`: raw observations [B, O] -> actions in the environment's units, deterministic mode. Normaliser "
        "and action bounds are inside. " + (critic if "critic.onnx" in differences else "There is no critic.\n"),
        "```python",
        "from steelyard import deploy",
        "",
        'policy = deploy.load("DIRECTORY")  # needs numpy and onnxruntime',
        "action = policy(observation)",
        "```\n",
        "## Evaluation\n",
        *_evaluation(run / "eval.jsonl", step),
        *(
            ["", 'The checkpoint "best" was chosen by these evaluations, so they are optimistic.']
            if which == "best"
            else []
        ),
        "\n## Objective and settings\n",
        "```json",
        json.dumps(plain(artefact.objective), indent=2),
        "```\n",
        "## Versions\n",
        f"Trained with: {_listed(versions)}. Exported with steelyard {__version__}, torch {torch.__version__}. "
        "Greatest difference between torch and onnxruntime when it was exported: "
        + ", ".join(f"`{name}` {value:.2g}" for name, value in differences.items())
        + ".\n",
        "## Intended use\n",
        f"Acting in the task above ({task}), or as a start for research on it. Observations must be raw, in the units "
        "of the training data and in the order above.\n",
        "## Limits\n",
        "- The policy has only been judged where the table above says so; outside the states of its data it may do "
        "anything within the action bounds.",
        "- There is no safety layer: limits of force, speed or workspace are the caller's.",
        "- A critic's values are training quantities, not success probabilities.",
        "- Biases and gaps of the prior data are in the policy.",
    ]
    return "\n".join(lines) + "\n"


def _evaluation(file: Path, step: int) -> list[str]:
    rows = [row for row in read_lines(file) if row["update_step"] == step]
    if rows:  # both phases evaluate at the step between them; the later rows are the ones of the exported weights
        rows = [row for row in rows if (row["phase"], row["env_step"]) == (rows[-1]["phase"], rows[-1]["env_step"])]
    if not rows:
        return ["No evaluation of these weights is on record."]
    lines = [f"{len(rows)} episodes, made by the training run itself.\n", "| measure | value | 95% interval |"]
    lines.append("|---|---|---|")
    returns: npt.NDArray[np.float64] = np.array([row["return"] for row in rows], np.float64)
    estimate = stats.mean_estimate(returns, numpy_generator(0, "eval/return"))
    lines.append(f"| return (mean) | {estimate.value:.4g} | {_interval(estimate)} |")
    won = [row.get("success") for row in rows]
    if None not in won:
        success = stats.wilson_interval(sum(map(bool, won)), len(won))
        lines.append(f"| success (Wilson) | {success.value:.3f} | {_interval(success)} |")
    lines.append(f"| length (median) | {np.median([row['length'] for row in rows]):.0f} | |")
    return lines


def _interval(estimate: stats.Estimate) -> str:
    return "one episode" if estimate.low is None else f"[{estimate.low:.4g}, {estimate.high:.4g}]"


def _bounds(spec: Spec) -> str:
    low, high = spec.actions.low or (), spec.actions.high or ()
    if len(set(low)) == 1 and len(set(high)) == 1:
        return f"[{low[0]:g}, {high[0]:g}]"
    return "the bounds of `spec.json`"


def _listed(versions: dict[str, Any]) -> str:
    known = [f"{name} {value}" for name, value in versions.items() if value]
    return ", ".join(known) if known else "not recorded"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
