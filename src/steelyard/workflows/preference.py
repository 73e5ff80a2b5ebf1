"""A preference run: prompts or preferences -> updates of a language model -> evaluation, in one run directory.

Beside the files of every run (`train/rundir.py`):

    eval.jsonl     one row per fresh sample on held-out prompts: `return` its reward, `score` its win rate against the
                   reference's samples of that prompt; without a scorer one row per held-out pair, `score` 1 where the
                   policy prefers the chosen completion to the rejected one more than the reference does
    pairs.jsonl    one row per held-out pair: log-probs and log-ratios of both completions
    samples.jsonl  the texts of those samples

A checkpoint holds what is trained. Its pretrained/ folder is read by `transformers` after full fine-tuning and by
`peft` after training adapters.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from steelyard import runtime
from steelyard.artefact import find
from steelyard.config import Config, from_json, plain, require_positive, require_range
from steelyard.data.buffer import joined, trimmed
from steelyard.data.experience import ExperienceBatch
from steelyard.data.preferences import Kind, TextData, TokenizedData, Truncation, read_text_data, split, tokenize
from steelyard.data.tokenizer import ByteChat, Tokenizer
from steelyard.envs.samplers import LanguageModelSampler, SamplingConfig
from steelyard.envs.scorers import CompletionScorer, scorer_from_name, text_of
from steelyard.errors import CheckpointError, ConfigError
from steelyard.nets.lm import CausalLM, LanguageModelConfig, load_language_model
from steelyard.nets.reference_cache import with_reference
from steelyard.nets.tiny_lm import TinyLM
from steelyard.nets.transformer import TransformerConfig
from steelyard.objectives.preference import AnyPreferenceConfig, DPOConfig, build_preference_learner
from steelyard.objectives.preference.base import PreferenceLearner
from steelyard.rng import derive_seed, torch_generator
from steelyard.train import checkpoint, distributed
from steelyard.train.experience import ExperienceConfig, ExperienceData, ExperienceSource, score
from steelyard.train.loop import LoopConfig, Stage, fit, reduce, reduce_parts, update
from steelyard.train.optim import OptimConfig, Optimizers
from steelyard.train.rundir import RunDir
from steelyard.workflows.common import Case, begin, carry_out, kind_of_run, read_run_config, rewind

FORMAT = "steelyard-preference-1"
LOGS = ("pairs.jsonl", "samples.jsonl")


@dataclass(frozen=True)
class TextDataConfig(Config):
    """Prompts, or prompts with completions."""

    path: str | None = None
    """File (.jsonl, .jsonl.gz, .json, .parquet), folder, or name of a data set on the hub, in TRL's columns."""
    kind: Kind | None = None
    """Read the rows as this kind; "prompt" takes the prompts of any. None: what the columns say."""
    split: str = "train"
    """Split of a `datasets` folder or name."""
    held_out: str | None = None
    """File of held-out rows; None: a share of `path`."""
    held_out_fraction: float = 0.1
    """Share of the prompts kept apart for evaluation; 0: none, and no evaluation."""
    max_prompt_tokens: int = 512
    """Longest prompt."""
    max_completion_tokens: int = 512
    """Longest completion, EOS included; longer ones are cut, lose EOS, and are counted."""
    truncation: Truncation = "error"
    """What happens to longer prompts: an error, or keep their start or their end."""
    reference_cache: str | None = None
    """Folder where the reference's log-probs of the data's completions are kept, to be computed once for many epochs
    and runs; None: computed whenever they are needed."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "max_prompt_tokens", "max_completion_tokens")
        require_range(self, 0, 0.99, "held_out_fraction")


@dataclass(frozen=True)
class PreferenceEvaluation(Config):
    """What is looked at on held-out rows."""

    prompts: int = 16
    """Prompts that fresh samples are drawn for; 0: none."""
    samples: int = 2
    """Samples of each, of the policy and of the reference."""
    pairs: int = 64
    """Rows with preferences whose implicit rewards are measured; 0: none."""
    every: int = 0
    """Updates between evaluations; 0: at the beginning and at the end."""
    scorer: str | None = None
    """The gold reward, where training uses another one (a proxy); None: the training scorer."""
    batch_size: int = 16
    """Prompts or pairs in one forward pass."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "samples", "batch_size")
        require_range(self, 0, math.inf, "prompts", "pairs", "every")


@dataclass(frozen=True)
class PreferenceRun(Config):
    """One preference run: everything that decides its result."""

    objective: AnyPreferenceConfig = field(default_factory=DPOConfig)
    """What is learned, and how."""
    negative: float = 1.0
    """lambda: scale of the negative gradient; 1: the objective as published, 0: nothing is pushed down."""
    model: LanguageModelConfig | TransformerConfig = field(default_factory=LanguageModelConfig)
    """Which language model, and what of it is trained; a plain transformer begins at random and reads bytes."""
    data: TextDataConfig = field(default_factory=TextDataConfig)
    """Prompts and preferences."""
    experience: ExperienceConfig = field(default_factory=ExperienceConfig)
    """Where completions come from and how often they are used."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are drawn, in training and evaluation."""
    scorer: str | None = None
    """The reward that trains, e.g. length:min, reward_model:DIR, python:FILE.py:FUNCTION (typed, never from a file)."""
    evaluation: PreferenceEvaluation = field(default_factory=PreferenceEvaluation)
    """Evaluation on held-out rows."""
    steps: int | None = None
    """Updates; None: `experience.epochs` passes over the prompts."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=10, checkpoint_every=200))
    """Log and checkpoint intervals."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(max_grad_norm=1.0))
    """Optimiser; `shards` is gradient accumulation."""
    runtime: runtime.RuntimeConfig = field(default_factory=runtime.RuntimeConfig)
    """Threads, precision, device."""
    seed: int = 0
    """Of everything random in the run."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_positive(self, "steps")
        if not (math.isfinite(self.negative) and self.negative >= 0):
            raise ConfigError(f"negative must be at least 0, found {self.negative}")


@dataclass(frozen=True)
class PreferenceArtefact(Config):
    """Key "steelyard" of pretrained/config.json: how to build the policy that the weights belong to."""

    objective: AnyPreferenceConfig
    """What was learned, and how."""
    model: LanguageModelConfig | TransformerConfig
    """The language model."""
    sampling: SamplingConfig
    """How completions were drawn."""
    negative: float = 1.0
    """Scale of the negative gradient."""
    max_prompt_tokens: int = 512
    """Longest prompt."""
    max_completion_tokens: int = 512
    """Longest completion."""
    seed: int = 0
    """Of the first weights, where the model began at random."""
    format: Literal["steelyard-preference-1"] = "steelyard-preference-1"
    """Version of this layout."""


@distributed.launched
def start(
    config: PreferenceRun,
    run_dir: str | Path,
    case: Case | None = None,
    quiet: bool = False,
    trusted: Collection[str] = (),
) -> Path:
    """Begin a run in a new directory and carry it to its end. Return the directory.

    Args:
        config: of the run.
        run_dir: where it writes.
        case: which comparison it belongs to.
        quiet: no progress on the terminal.
        trusted: the `python:` scorers that the user has asked for; no other may run.

    Raises:
        SteelyardError: anything that makes the run impossible or stops it, in one sentence.
        Interrupted: ctrl-C, after a checkpoint was written.
    """
    run, quiet = distributed.run_dir(run_dir, LOGS), quiet or not distributed.is_main()
    shards = distributed.shards_of(config.optim.shards, config.experience.minibatch_prompts)
    config = replace(config, optim=replace(config.optim, shards=shards))
    parts = Parts(config, trusted)
    begin(run, config, case or Case(), parts.data_hash)
    for sentence in parts.notes:
        run.event(sentence)
        if not quiet:
            print(sentence, file=sys.stderr)
    return carry_out(run, lambda: _train(config, run, parts, None, quiet))


@distributed.launched
def resume(run_dir: str | Path, quiet: bool = False, trusted: Collection[str] = ()) -> Path:
    """Continue a stopped run exactly. Return its directory.

    Raises:
        CheckpointError: the directory holds no run, or its files are damaged.
        DataError: the data have changed since.
        ConfigError: its scorer is code and not among the `trusted` ones.
    """
    run, quiet = distributed.run_dir(run_dir, LOGS), quiet or not distributed.is_main()
    config = read_run_config(run, PreferenceRun)
    distributed.shards_of(config.optim.shards, config.experience.minibatch_prompts, begun=True)
    if run.read_status() == "done":
        return run.path
    parts = Parts(config, trusted)
    found = rewind(run, config.data.path, parts.data_hash) if distributed.is_main() else None
    return carry_out(run, lambda: _train(config, run, parts, found, quiet))


# ---------------------------------------------------------------------------------------------- the parts


class Parts:
    """Model, data, scorers, sampler and source of a config, checked against each other.

    Args:
        config: of the run.
        trusted: `python:` scorers that may run.
        rows: read so many rows only (dry run); None: all.
    """

    def __init__(self, config: PreferenceRun, trusted: Collection[str] = (), rows: int | None = None) -> None:
        runtime.prepare(config.runtime)
        if config.optim.autocast == "bf16":
            runtime.require_bf16(config.runtime.device)
        # first what is quick to refuse
        self.scorer = None if config.scorer is None else scorer_from_name(config.scorer, config.scorer in trusted)
        gold = config.evaluation.scorer
        self.gold = self.scorer if gold is None else scorer_from_name(gold, gold in trusted)
        train, held_out = read_rows(config.data, config.seed, rows)
        self.learner, self.tokenizer = build(
            config.objective, config.negative, config.model, config.seed, config.runtime.device
        )
        needs = config.objective.needs
        if config.experience.source != "dataset" and (needs.sampler or needs.on_policy):
            # what is trained is the distribution that is sampled; only then is a ratio a ratio
            if config.sampling.temperature == 0:
                raise ConfigError("sampling.temperature is 0: a policy gradient needs completions drawn at random")
            self.learner.temperature = config.sampling.temperature
        limits = (config.data.max_prompt_tokens, config.data.max_completion_tokens, config.data.truncation)
        self.data: TokenizedData = tokenize(train, self.tokenizer, *limits)
        self.held_out = None if held_out is None else tokenize(held_out, self.tokenizer, *limits)
        self.data_hash = self.data.content_hash
        cache = config.data.reference_cache
        served: ExperienceData = self.data
        if cache is not None and needs.reference and config.experience.source != "policy":
            served = with_reference(self.data, self.learner.model, cache, temperature=self.learner.temperature)
        self.notes = [*train.notes, *self.data.report.sentences(), *getattr(self.learner.model, "notes", ())]
        self.sampler = LanguageModelSampler(self.learner.model, config.sampling, self.tokenizer.eos, self.tokenizer.pad)
        self.source = ExperienceSource(
            self.learner,
            served,
            self.sampler,
            self.scorer,
            None,
            config.experience,
            config.seed,
            decode=self.tokenizer.decode,
            shards=config.optim.shards,
        )
        self.optimizers = Optimizers(self.learner, config.optim)
        self.artefact = PreferenceArtefact(
            config.objective, config.model, config.sampling, config.negative,
            config.data.max_prompt_tokens, config.data.max_completion_tokens, config.seed,
        )  # fmt: skip

    def pretrained_config(self) -> dict[str, Any]:
        """Return pretrained/config.json: ours, beside the hub's where the folder holds a whole model."""
        model = self.learner.model
        own = {"format": FORMAT, "steelyard": plain(self.artefact)}
        if not _saves_whole(model):
            return own
        return {**json.loads(model.network.config.to_json_string(use_diff=True)), **own}

    def write_pretrained(self, folder: Path) -> None:
        """Write what `transformers` or `peft` need beside the weights, into pretrained/ of a checkpoint."""
        model = self.learner.model
        if not isinstance(model, CausalLM):
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not _saves_whole(model):
            model.save_pretrained(folder, merged=False)
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty form; `steelyard export` writes a card
            return
        own = getattr(self.tokenizer, "tokenizer", None)
        if own is not None:
            own.save_pretrained(folder)


def _saves_whole(model: nn.Module) -> bool:
    return isinstance(model, CausalLM) and model._peft[0] is None


def read_rows(config: TextDataConfig, seed: int, rows: int | None = None) -> tuple[TextData, TextData | None]:
    """Return training rows and held-out rows, no more than `rows` of each."""
    if config.path is None:
        raise ConfigError("no data: give a file of prompts or preferences with --data PATH (config key 'data.path')")
    data = read_text_data(config.path, config.kind, config.split)
    if config.held_out is not None:
        held_out = read_text_data(config.held_out, config.kind, config.split)
    elif config.held_out_fraction > 0:
        data, held_out = split(data, config.held_out_fraction, seed)
    else:
        held_out = None
    if rows is not None:
        data = replace(data, rows=data.rows[:rows])
        held_out = None if held_out is None else replace(held_out, rows=held_out.rows[:rows])
    return data, held_out


def build(
    objective: Any, negative: float, model: LanguageModelConfig | TransformerConfig, seed: int, device: str
) -> tuple[PreferenceLearner, Tokenizer]:
    """Build a learner and its tokenizer."""
    generator = torch_generator(seed, "initial weights", device=device)
    policy: Any
    tokenizer: Tokenizer
    values = objective.needs.values
    if isinstance(model, TransformerConfig):
        policy, tokenizer = TinyLM(model, generator, value_head=values), ByteChat()
        if model.vocab_size != tokenizer.vocab_size:
            raise ConfigError(
                f"model: a plain transformer reads bytes and needs vocab_size {tokenizer.vocab_size}, found "
                f"{model.vocab_size}"
            )
    else:
        policy = load_language_model(replace(model, value_head=model.value_head or values), generator)
        tokenizer = policy.tokenizer
        if objective.needs.reference and policy.reference_kind == "none":
            raise ConfigError(
                f"objective {objective.kind!r} compares with a reference, but model.reference is 'none'; use 'auto'"
            )
    learner = build_preference_learner(policy, objective, negative)
    if _saves_whole(policy):
        _use_hub_names(learner)
    return learner, tokenizer


_PREFIX = "model.network."


def _use_hub_names(learner: nn.Module) -> None:
    """Let the state dict call weights what `transformers` calls them, so that it can read pretrained/ as it is."""

    def shorten(module: nn.Module, state: dict[str, Any], prefix: str, local: dict[str, Any]) -> None:
        for name in [name for name in state if name.startswith(_PREFIX)]:
            state[name.removeprefix(_PREFIX)] = state.pop(name)

    def lengthen(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
        own = {_PREFIX + name for name, _ in module.model.network.named_parameters()}  # type: ignore[union-attr]
        for name in [name for name in state if _PREFIX + name in own]:
            state[_PREFIX + name] = state.pop(name)

    learner.register_state_dict_post_hook(shorten)  # type: ignore[no-untyped-call]
    learner.register_load_state_dict_pre_hook(lengthen)  # type: ignore[no-untyped-call]


def load_policy(
    path: str | Path, which: Literal["last", "best"] = "last", device: str = "cpu"
) -> tuple[PreferenceLearner, PreferenceArtefact]:
    """Read a policy with its reference from a run, a checkpoint or its pretrained/ directory; files are checked.

    Returns:
        The learner, whose `model` is the policy, and the artefact's config.

    Raises:
        CheckpointError: it holds something else, or its files are damaged.
    """
    folder = find(path, which)
    checkpoint.verify(folder)
    file = folder / "pretrained/config.json"
    found = json.loads(file.read_text())
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a preference run ({FORMAT}), found format {found.get('format')!r}")
    artefact = from_json(PreferenceArtefact, json.dumps(found["steelyard"]), where=str(file))
    learner, _ = build(artefact.objective, artefact.negative, artefact.model, artefact.seed, device)
    weights = safetensors.torch.load_file(folder / "pretrained/model.safetensors")
    checkpoint.load_into(learner, weights, str(folder))
    return learner.eval(), artefact


def load_by_name(name: str, device: str = "cpu") -> Any:
    """Return a language model by name, or the policy of a preference run, to be sampled from; prints its notes."""
    if kind_of_run(name) == "preference" or (Path(name) / "pretrained").is_dir():
        return load_policy(name, device=device)[0].model.eval()
    generator = torch_generator(0, "initial weights", device=device)
    model = load_language_model(LanguageModelConfig(name=name, reference="none"), generator)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    return model.eval()


def tokenizer_of(model: nn.Module) -> Tokenizer:
    """Return the tokenizer of a policy that `load_policy` gave."""
    tokenizer: Tokenizer = model.tokenizer if isinstance(model, CausalLM) else ByteChat()
    return tokenizer


# ---------------------------------------------------------------------------------------------- the run


def _train(config: PreferenceRun, run: RunDir, parts: Parts, found: checkpoint.Checkpoint | None, quiet: bool) -> None:
    learner, optimizers, source = parts.learner, parts.optimizers, parts.source
    first = 0
    if found is not None:
        checkpoint.load_into(learner, found.model, str(found.path))
        optimizers.load_state_tensors(found.optimizers)
        first = found.step
    first = distributed.share_state(learner, optimizers, first)
    state = distributed.share({} if found is None else found.source)
    if state:
        source.load_state_tensors(state)
    steps = config.experience.updates(len(parts.data)) if config.steps is None else config.steps
    examiner = Examiner(config, run, parts)
    fit(
        learner,
        source,
        optimizers,
        Stage("offline", 0, steps, (config.evaluation.every or steps) if examiner.looks else 0),
        config.loop,
        run,
        seed=config.seed,
        start=first,
        artefact=parts.pretrained_config(),
        evaluate=examiner.look,
        quiet=quiet,
        label=f"{config.objective.kind} seed {config.seed}",
        also=parts.write_pretrained,
    )


class Examiner:
    """Evaluates on held-out rows; never touches what training draws from."""

    def __init__(self, config: PreferenceRun, run: RunDir, parts: Parts) -> None:
        self.config, self.run, self.parts = config.evaluation, run, parts
        self.seed, self.device = config.seed, config.runtime.device
        self.temperature = config.sampling.temperature or 1.0  # KLs are those of the distributions that are sampled
        data, self.rows, self.pair_rows = parts.held_out, np.arange(0), np.arange(0)
        if data is not None:
            self.rows = np.arange(min(self.config.prompts, len(data)))
            if data.kind == "preference":
                self.pair_rows = np.arange(min(self.config.pairs, len(data)))
        model = parts.learner.model
        self.has_reference = getattr(model, "reference_kind", "copy") != "none"
        self._reference: tuple[ExperienceBatch, Tensor | None] | None = None

    @property
    def looks(self) -> bool:
        """Whether there is anything to look at."""
        return len(self.rows) + len(self.pair_rows) > 0

    @torch.no_grad()
    def look(self, step: int) -> float | None:
        """Evaluate after update `step`, append rows, and return the mean score."""
        fixed = {"phase": "offline", "update_step": step, "env_step": 0}
        scored: list[dict[str, Any]] = []
        pairs = self._pairs()
        self.run.append("pairs.jsonl", [fixed | row for row in pairs])
        if len(self.rows):
            samples, texts = self._samples()
            self.run.append("samples.jsonl", [fixed | row for row in texts])
            scored = samples if self.parts.gold is not None else []
        if not scored:
            scored = [
                {
                    "episode": row["pair"],
                    "episode_seed": self.seed,
                    "return": row["margin"],
                    "length": row["chosen_length"],
                    "success": None,
                    "score": row["accuracy"],
                }
                for row in pairs
            ]
        self.run.append("eval.jsonl", [fixed | row for row in scored])
        scores = [row["score"] for row in scored if row["score"] is not None]
        return float(np.mean(scores)) if scores else None

    # pairs

    def _pairs(self) -> list[dict[str, Any]]:
        """Return one row per held-out pair."""
        found: list[dict[str, Any]] = []
        data = self.parts.held_out
        for first in range(0, len(self.pair_rows), self.config.batch_size):
            assert data is not None
            batch = data.batch(self.pair_rows[first : first + self.config.batch_size])
            if batch.pairs is None or not len(batch.pairs):
                continue
            logps, reference, _ = self._logps(batch, temperature=self.parts.learner.temperature)
            lengths = batch.lengths
            for chosen, rejected in batch.pairs.tolist():
                row: dict[str, Any] = {"pair": len(found)}
                for name, one in (("chosen", chosen), ("rejected", rejected)):
                    row[f"{name}_logp"] = float(logps[one].sum())
                    row[f"{name}_length"] = int(lengths[one])
                    row[f"{name}_ratio"] = None if reference is None else float((logps[one] - reference[one]).sum())
                if reference is None:  # what a policy without a reference prefers: the likelier token for token
                    margin = row["chosen_logp"] / row["chosen_length"] - row["rejected_logp"] / row["rejected_length"]
                else:
                    margin = row["chosen_ratio"] - row["rejected_ratio"]
                found.append(row | {"margin": margin, "accuracy": float(margin > 0) + 0.5 * (margin == 0)})
        return found

    # samples

    def _samples(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return one row of numbers and one of text per fresh sample."""
        data = self.parts.held_out
        assert data is not None
        batch, finished = self._drawn("eval/samples")
        gold = self._rewards(self.parts.gold, batch)
        proxy = None if self.parts.scorer is self.parts.gold else self._rewards(self.parts.scorer, batch)
        logps, reference, entropies = self._logps(batch, entropies=True, temperature=self.temperature)
        other, other_gold, backwards = self._from_reference()
        prompts, texts = data.texts(self.rows), []
        rows: list[dict[str, Any]] = []
        for one in range(len(batch)):
            prompt = int(batch.prompt_of[one])
            tokens = batch.completions[one][batch.scored_mask[one] > 0].tolist()
            reward = None if gold is None else _number(gold[one])
            rows.append(
                {
                    "episode": one,
                    "episode_seed": self.seed,
                    "prompt": prompt,
                    "return": reward,
                    "length": len(tokens),
                    "success": None,
                    "score": None if gold is None or other_gold is None
                    else _wins(float(gold[one]), other_gold[other.prompt_of == prompt]),  # type: ignore[union-attr]
                    "proxy": None if proxy is None else _number(proxy[one]),
                    "kl_to_reference": None if reference is None else float((logps[one] - reference[one]).sum()),
                    "kl_from_reference": None if backwards is None else float(backwards[one]),
                    "entropy": float(entropies[one].sum() / len(tokens)) if tokens else None,  # type: ignore[index]
                    "finished": bool(finished[one]),
                }
            )  # fmt: skip
            texts.append(
                {
                    "prompt_number": prompt,
                    "sample": one % self.config.samples,
                    "prompt": text_of(prompts[prompt]),
                    "completion": self.parts.tokenizer.decode(tokens),
                    "reward": reward,
                    "length": len(tokens),
                }
            )
        return rows, texts

    def _from_reference(self) -> tuple[ExperienceBatch | None, Tensor | None, Tensor | None]:
        """Return the reference's samples, their gold rewards, and log pi_ref - log pi [N] on them.

        They are the same at every evaluation: drawn from frozen weights with fixed seeds, so nothing need be saved.
        """
        if not self.has_reference:
            return None, None, None
        if self._reference is None:
            with self.parts.learner.model.as_reference():
                drawn, _ = self._drawn("eval/reference")
            self._reference = (drawn, self._rewards(self.parts.gold, drawn))
        batch, gold = self._reference
        logps, reference, _ = self._logps(batch, temperature=self.temperature)
        assert reference is not None
        return batch, gold, (reference - logps).sum(1)

    def _drawn(self, stream: str) -> tuple[ExperienceBatch, Tensor]:
        """Return samples of all evaluation prompts, and which of them ended by themselves."""
        data = self.parts.held_out
        assert data is not None
        parts, finished = [], []
        for first in range(0, len(self.rows), self.config.batch_size):
            rows = self.rows[first : first + self.config.batch_size]
            prompts, mask = data.prompts(rows)
            samples = self.parts.sampler.sample(
                prompts.to(self.device),
                mask.to(self.device),
                self.config.samples,
                seed=derive_seed(self.seed, stream),
                step=0,
                keys=torch.from_numpy(rows).to(self.device),
            )
            finished.append(samples.finished.cpu())
            parts.append(
                ExperienceBatch(
                    prompts, mask, samples.completions.cpu(), samples.scored_mask.cpu(), samples.prompt_of.cpu()
                )
            )
        return joined(parts), torch.cat(finished)

    def _rewards(self, scorer: CompletionScorer | None, batch: ExperienceBatch) -> Tensor | None:
        data = self.parts.held_out
        if scorer is None or data is None:
            return None
        texts, columns = data.texts(self.rows), data.columns(self.rows)
        return score(scorer, batch, texts, columns, self.parts.tokenizer.decode)

    def _logps(
        self, batch: ExperienceBatch, entropies: bool = False, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log-probs, those of the reference, and entropies, each [N, T], worked in small parts."""
        learner = self.parts.learner
        found: list[list[Tensor]] = [[], [], []]
        batch = batch.of_prompts(torch.arange(len(batch.prompts)))  # rows by prompt, as the parts will be
        for prompts in torch.split(torch.arange(len(batch.prompts)), self.config.batch_size):
            part = trimmed(batch.of_prompts(prompts)).to(self.device)
            outputs = learner.model.outputs(part, entropies=entropies, temperature=temperature)
            values = [outputs.token_logps, None, outputs.entropies]
            if self.has_reference:
                values[1] = learner.model.reference_token_logps(part, temperature=temperature)
            for kept, value in zip(found, values, strict=True):
                if value is not None:
                    width = batch.completions.shape[1] - value.shape[1]
                    kept.append(torch.nn.functional.pad(value.float().cpu(), (0, width)))
        logps, reference, entropy = (torch.cat(values) if values else None for values in found)
        assert logps is not None
        return logps, reference, entropy


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def _wins(reward: float, others: Tensor) -> float | None:
    """Return the share of the reference's samples that a reward beats, ties half; None where it cannot be told."""
    others = others[~others.isnan()]
    if math.isnan(reward) or not len(others):
        return None
    return float((others < reward).float().mean() + 0.5 * (others == reward).float().mean())


# ---------------------------------------------------------------------------------------------- dry run


def dry_run(
    config: PreferenceRun, rows: int, trusted: Collection[str] = (), say: Callable[[str], None] = print
) -> None:
    """Build everything on `rows` rows, carry out one update, and say what was seen; write nothing.

    Raises:
        SteelyardError: whatever would stop the run itself.
    """
    import resource  # not on every system

    if rows < 2:
        raise ConfigError(f"a dry run needs at least 2 rows, found {rows}")
    size = min(config.experience.minibatch_prompts, rows)
    whole = min(config.experience.prompts, rows) // size * size
    data = replace(config.data, held_out_fraction=0.0)
    config = replace(
        config,
        data=data,
        experience=replace(config.experience, minibatch_prompts=size, prompts_per_refresh=whole),
        optim=replace(config.optim, shards=math.gcd(config.optim.shards, size)),
    )
    parts = Parts(config, trusted, rows)
    learner = parts.learner
    trained = sum(p.numel() for group in learner.groups.values() for p in group.parameters)
    everything = sum(p.numel() for p in learner.parameters())
    say(f"objective: {config.objective.kind}, source {config.experience.source}, negative {config.negative:g}")
    say(f"parameters: {everything:,}, of which {trained:,} are trained")
    for sentence in parts.notes:
        say(f"note: {sentence}")
    batch = parts.source.batch(0)
    for name, value in batch.tensors().items():
        say(f"batch.{name}: {list(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    prompt_tokens, scored = int(batch.prompt_mask.sum()), int(batch.scored_mask.sum())
    say(f"tokens: {prompt_tokens} of prompts, {scored} scored, {batch.scored_mask.numel() - scored} padding")
    for line in mask_lines(batch, parts.tokenizer):
        say(line)
    metrics = update(learner, parts.optimizers, batch, config.seed, 0)
    means = reduce(metrics) if config.optim.shards == 1 else reduce_parts(metrics)
    say("one update: " + ", ".join(f"{name} {value:.4g}" for name, value in sorted(means.items())))
    optimiser = sum(value.numel() * value.element_size() for value in parts.optimizers.state_tensors().values())
    weights = sum(p.numel() * p.element_size() for p in learner.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gib = [f"{value / 2**30:.2f}" for value in (weights, trained * 4, optimiser, peak)]
    say(f"memory: weights {gib[0]} GiB, gradients {gib[1]} GiB, optimiser {gib[2]} GiB; peak of this process "
        f"{gib[3]} GiB at {len(batch)} completions of up to {batch.completions.shape[1]} tokens")  # fmt: skip
    say("nothing was written")


def mask_lines(batch: ExperienceBatch, tokenizer: Tokenizer) -> list[str]:
    """Return the first completion token by token, with what is scored: to see templates, boundary and EOS."""
    prompt = batch.prompts[batch.prompt_of[0]][batch.prompt_mask[batch.prompt_of[0]] > 0].tolist()
    lines = [f"first prompt: {len(prompt)} tokens, ends with {tokenizer.decode(prompt[-16:])!r}", "its completion:"]
    tokens = list(zip(batch.completions[0].tolist(), batch.scored_mask[0].tolist(), strict=True))
    scored = int(batch.scored_mask[0].sum())
    shown = sorted({*range(min(12, len(tokens))), *range(max(0, scored - 4), min(scored + 2, len(tokens)))})
    for place, number in enumerate(shown):
        if place and number != shown[place - 1] + 1:
            lines.append("      ...")
        token, mask = tokens[number]
        name = "EOS" if token == tokenizer.eos and mask else repr(tokenizer.decode([token]))
        lines.append(f"  {token:>7d} {'scored ' if mask else 'padding'} {name}")
    if not any(token == tokenizer.eos and mask for token, mask in tokens):
        lines.append("  no EOS in it: it was cut at the limit")
    return lines
