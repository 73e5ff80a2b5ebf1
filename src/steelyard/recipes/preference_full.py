r"""Level 3 of the preference study: the full-scale settings, as configs, and a dry run of each on eight rows.

Tajwar, Singh et al., "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data" (ICML 2024):
AlpacaFarm with Pythia-1.4B, and UltraFeedback with a Mistral-7B that was fine-tuned on UltraChat-200K.

Nothing of this scale has been run here: it needs several GPUs. What is here are the settings, as far as they are known
from the authors' released scripts, in the form that `steelyard train preference --config` reads, and the proof that
they load: generated rows in the columns of each data set are written, converted, read, put through the template and
the tokenizer, and one update is carried out, with a random model of about thirty thousand parameters and the reward
`length:min` in the places of the real ones.

What cannot be known from the release is listed with each setting; values there are this library's, not the authors'.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from steelyard.config import flatten, plain, to_json
from steelyard.envs.samplers import SamplingConfig
from steelyard.errors import DataError, MissingExtraError
from steelyard.nets.lm import LanguageModelConfig
from steelyard.objectives.preference import (
    BestOfNConfig,
    CompletionSFTConfig,
    DPOConfig,
    PPOConfig,
    PrefFTConfig,
    REINFORCEConfig,
    RWRConfig,
)
from steelyard.report.page import Section
from steelyard.report.tables import Table
from steelyard.train.experience import ExperienceConfig
from steelyard.workflows.preference import PreferenceEvaluation, PreferenceRun, TextDataConfig, dry_run

ROWS = 8
Record = Mapping[str, Any]


@dataclass(frozen=True)
class FullSetting:
    """One run at full scale.

    Attributes:
        label: for people.
        run: settings; `data.path` and, where it names no hub model, `model.name` are the user's.
        records: so many generated rows in the data set's own columns.
        convert: one such row in TRL's columns.
        tried: values that the released scripts try beside the one given here, {field: values}.
        unknown: what the release does not say, or what is otherwise here.
    """

    label: str
    run: PreferenceRun
    records: Callable[[int], list[dict[str, Any]]]
    convert: Callable[[Record], dict[str, Any]]
    tried: Mapping[str, Sequence[float]]
    unknown: tuple[str, ...] = ()


# ---- AlpacaFarm, Pythia-1.4B ----

PROMPTER, ASSISTANT, END = "<|prompter|>", "<|assistant|>", "<|endoftext|>"
"""Template of the AlpacaFarm runs: prompter token, instruction (and input), EOS, assistant token, answer, EOS. Only the
kinds of its parts are known from the release; the spelling of the first two is assumed."""


def alpaca_prompt(record: Record) -> str:
    """Return instruction and input in the template, up to where the answer begins."""
    given = str(record.get("input") or "")
    question = str(record["instruction"]) + ("\n" + given if given else "")
    return f"{PROMPTER}{question}{END}{ASSISTANT}"


def alpaca_pair(record: Record) -> dict[str, Any]:
    """Return one row (instruction, input, output_1, output_2, preference: 1 or 2) as prompt, chosen, rejected.

    Raises:
        DataError: the preference is neither 1 nor 2.
    """
    outputs = (str(record["output_1"]), str(record["output_2"]))
    preference = record["preference"]
    if preference not in (1, 2):
        raise DataError(f"preference: expected 1 or 2, found {preference!r}")
    chosen, rejected = outputs if preference == 1 else outputs[::-1]
    return {"prompt": alpaca_prompt(record), "chosen": chosen, "rejected": rejected}


def alpaca_demonstration(record: Record) -> dict[str, Any]:
    """Return one row (instruction, input, output) as prompt and completion."""
    return {"prompt": alpaca_prompt(record), "completion": str(record["output"])}


def alpaca_question(record: Record) -> dict[str, Any]:
    """Return one row (instruction, input) as a prompt."""
    return {"prompt": alpaca_prompt(record)}


_TASKS = ("Name a colour of", "List two uses of", "Describe", "Say what is near", "Give a reason for")
_THINGS = ("the sea", "a wooden chair", "an old clock", "rain in spring")


def alpaca_records(count: int) -> list[dict[str, Any]]:
    """Return generated rows with the columns of all of AlpacaFarm's splits; the last prompt is over-long."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        task, thing = _TASKS[number % len(_TASKS)], _THINGS[number % len(_THINGS)]
        rows.append(
            {
                "instruction": f"{task} {thing}, question {number}.",
                "input": "Think of a child who asks." if number % 3 == 0 else "",
                "output": f"It is {thing}, and that is all.",
                "output_1": f"Short: {thing}.",
                "output_2": f"A longer answer about {thing}, with number {number} in it.",
                "preference": 1 + number % 2,
            }
        )
    if rows:
        rows[-1]["instruction"] += " Take your time." * 12
    return rows


# prompts are cut to their last 128 tokens, completions to 256, at temperature 1
_ALPACA_DATA = TextDataConfig(
    path="alpaca_farm.jsonl", max_prompt_tokens=128, max_completion_tokens=256, truncation="keep_end"
)
_ALPACA_SAMPLING = SamplingConfig(max_new_tokens=256)
_SFT_FOLDER = "alpaca-farm-sft"
_ALPACA_RUN = PreferenceRun(
    model=LanguageModelConfig(_SFT_FOLDER),
    data=_ALPACA_DATA,
    sampling=_ALPACA_SAMPLING,
    evaluation=PreferenceEvaluation(prompts=256, samples=1, pairs=256, every=100),
)
_NOT_KNOWN = (
    f"The policy starts from the result of the sft setting: a folder, here called {_SFT_FOLDER}.",
    "The number of updates is not known; here: one pass.",
    "The role marks of the template are tokens of their own there; here they are text, which the tokenizer may split.",
    "The limit of 128 tokens of prompt is that of sampling; that of training on pairs is not known.",
)
_POLICY_NOT_KNOWN = (
    *_NOT_KNOWN,
    "The reward is a model trained on the pairs (AdamW with betas 0.9 and 0.95, rate 1e-5 or 1e-6 falling to 0 as a "
    "cosine, batches of 32, no weight decay, at most 512 tokens): train it with `steelyard train reward_model`, "
    "whose rate is constant, and name it with --scorer reward_model:DIR.",
)


def _on_policy(refresh: int, minibatch: int, samples: int) -> ExperienceConfig:
    return ExperienceConfig("policy", prompts_per_refresh=refresh, minibatch_prompts=minibatch, num_generations=samples)


def _alpaca(objective: Any, experience: ExperienceConfig, scorer: str | None = None) -> PreferenceRun:
    data = replace(_ALPACA_DATA, kind="prompt" if experience.source == "policy" else "preference")
    return replace(_ALPACA_RUN, objective=objective, experience=experience, scorer=scorer, data=data)


_PAIRS = ExperienceConfig("dataset", prompts_per_refresh=16, minibatch_prompts=2)
_REWARD = "reward_model:alpaca-farm-reward"


# ---- UltraFeedback, Mistral-7B ----


def ultrafeedback_pair(record: Record) -> dict[str, Any]:
    """Return one row (prompt, chosen and rejected conversations) without what repeats the conversation's beginning."""
    return {"chosen": record["chosen"], "rejected": record["rejected"]}


def ultrafeedback_records(count: int) -> list[dict[str, Any]]:
    """Return generated rows with the columns of the binarised UltraFeedback: conversations with scores."""
    rows = []
    for number in range(count):
        question = {"role": "user", "content": f"{_TASKS[number % len(_TASKS)]} {_THINGS[number % len(_THINGS)]}."}
        good = {"role": "assistant", "content": f"Here is a careful answer, number {number}."}
        bad = {"role": "assistant", "content": "I do not know."}
        rows.append(
            {
                "prompt": question["content"],
                "prompt_id": str(number),
                "chosen": [question, good],
                "rejected": [question, bad],
                "score_chosen": 8.0,
                "score_rejected": 4.0,
            }
        )
    return rows


_ULTRA_RUN = PreferenceRun(
    model=LanguageModelConfig("mistral-7b-ultrachat-sft"),
    data=TextDataConfig(path="ultrafeedback.jsonl", kind="preference", truncation="keep_end"),
    experience=ExperienceConfig("dataset", minibatch_prompts=32),
    evaluation=PreferenceEvaluation(prompts=0, pairs=256, every=100),
)
_ULTRA_NOT_KNOWN = (
    "The folder of this experiment is absent from the release: learning rate, batch, beta, lengths and epochs are not "
    "known. All numbers here are this library's guesses.",
    "The policy starts from a Mistral-7B fine-tuned on UltraChat-200K: a folder or a name on the hub.",
    "The authors trained with HALOs; the chat template is the starting model's own.",
)

FULL: dict[str, FullSetting] = {
    "alpaca_farm_sft": FullSetting(
        "AlpacaFarm, Pythia-1.4B: supervised start",
        replace(
            _ALPACA_RUN,
            objective=CompletionSFTConfig(learning_rate=8e-6),
            model=LanguageModelConfig("EleutherAI/pythia-1.4b"),
            data=replace(_ALPACA_DATA, kind="completion", max_prompt_tokens=256),
            experience=ExperienceConfig("dataset", minibatch_prompts=4, epochs=10.0),
        ),
        alpaca_records,
        alpaca_demonstration,
        {},
        (
            "The optimiser is Adafactor; here it is AdamW.",
            "Prompt and answer have 512 tokens together; here at most 256 each.",
        ),
    ),
    "alpaca_farm_pref_ft": FullSetting(
        "AlpacaFarm, Pythia-1.4B: Pref-FT",
        _alpaca(PrefFTConfig(learning_rate=1e-6), _PAIRS),
        alpaca_records,
        alpaca_pair,
        {"objective.learning_rate": (1e-5, 1e-6, 5e-7, 1e-7, 1e-8)},
        _NOT_KNOWN,
    ),
    "alpaca_farm_dpo": FullSetting(
        "AlpacaFarm, Pythia-1.4B: DPO",
        _alpaca(DPOConfig(learning_rate=5e-7, beta=0.1), _PAIRS),
        alpaca_records,
        alpaca_pair,
        {"objective.learning_rate": (1e-7, 5e-7), "objective.beta": (0.05, 0.1)},
        (*_NOT_KNOWN, "The released loss averages over tokens; here it is the standard one, over whole answers."),
    ),
    "alpaca_farm_best_of_n": FullSetting(
        "AlpacaFarm, Pythia-1.4B: on-policy best of N",
        _alpaca(BestOfNConfig(learning_rate=1e-6), _on_policy(128, 2, 4), _REWARD),
        alpaca_records,
        alpaca_question,
        {"experience.prompts_per_refresh": (64, 128, 256, 512), "experience.reuse": (1, 2, 4, 8)},
        (*_POLICY_NOT_KNOWN, "The released script keeps its weights in bfloat16; here they are float32."),
    ),
    "alpaca_farm_rwr": FullSetting(
        "AlpacaFarm, Pythia-1.4B: on-policy RWR",
        _alpaca(RWRConfig(learning_rate=1e-5, tau=1.0, max_weight=20.0), _on_policy(64, 8, 1), _REWARD),
        alpaca_records,
        alpaca_question,
        {
            "objective.tau": (1, 10),
            "experience.prompts_per_refresh": (64, 128, 256, 512),
            "experience.reuse": (1, 2, 4, 8),
        },
        _POLICY_NOT_KNOWN,
    ),
    "alpaca_farm_reinforce": FullSetting(
        "AlpacaFarm, Pythia-1.4B: REINFORCE",
        _alpaca(
            REINFORCEConfig(learning_rate=1e-5, beta=0.0, baseline="ema", reward_clip=10.0),
            _on_policy(64, 8, 1),
            _REWARD,
        ),
        alpaca_records,
        alpaca_question,
        {"experience.prompts_per_refresh": (64, 128, 256, 512), "experience.reuse": (1, 2, 4, 8)},
        (*_POLICY_NOT_KNOWN, "The decay of the moving-average baseline is this library's."),
    ),
    "alpaca_farm_ppo": FullSetting(
        "AlpacaFarm, Pythia-1.4B: PPO",
        _alpaca(
            PPOConfig(
                learning_rate=1e-6, beta=0.2, target_kl=0.1, kl_horizon=10_000, epsilon=0.2, value_weight=0.1,
                gae_lambda=0.95, discount=1.0,
            ),
            _on_policy(512, 8, 1),
            _REWARD,
        ),
        alpaca_records,
        alpaca_question,
        {"experience.prompts_per_refresh": (512, 1024), "experience.reuse": (1, 2, 4, 8)},
        (
            *_POLICY_NOT_KNOWN,
            "The sweep over reuse has other values: rate 1e-5, 128 prompts a refresh, a KL weight that begins at 0.02 "
            "and a target of 6.",
        ),
    ),
    "alpaca_farm_online_dpo": FullSetting(
        "AlpacaFarm, Pythia-1.4B: on-policy DPO",
        _alpaca(DPOConfig(learning_rate=1e-5, beta=0.1), _on_policy(64, 2, 2), _REWARD),
        alpaca_records,
        alpaca_question,
        {"objective.beta": (0.01, 0.05, 0.1, 0.5), "experience.min_gap": (0, 0.1, 0.5, 1)},
        (*_POLICY_NOT_KNOWN, "Ties are dropped here; the released code makes the second sample the winner."),
    ),
    "ultrafeedback_pref_ft": FullSetting(
        "UltraFeedback, Mistral-7B: Pref-FT",
        replace(_ULTRA_RUN, objective=PrefFTConfig(learning_rate=5e-7)),
        ultrafeedback_records,
        ultrafeedback_pair,
        {},
        _ULTRA_NOT_KNOWN,
    ),
    "ultrafeedback_dpo": FullSetting(
        "UltraFeedback, Mistral-7B: DPO",
        replace(_ULTRA_RUN, objective=DPOConfig(learning_rate=5e-7, beta=0.1)),
        ultrafeedback_records,
        ultrafeedback_pair,
        {},
        _ULTRA_NOT_KNOWN,
    ),
}  # fmt: skip
"""Settings by name."""


def stand_in(setting: FullSetting, folder: Path, name: str) -> PreferenceRun:
    """Write the generated rows, as they come and converted, and return the run with the small stand-ins."""
    records = setting.records(ROWS)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{name}.columns.jsonl", records)
    path = folder / f"{name}.jsonl"
    _write(path, [setting.convert(record) for record in records])
    run = setting.run
    assert isinstance(run.model, LanguageModelConfig)
    return replace(
        run,
        model=replace(run.model, name="tiny"),
        data=replace(run.data, path=str(path)),
        scorer=None if run.scorer is None else "length:min",
    )


def _write(path: Path, rows: Sequence[Record]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(out: Path, console: Console, names: Sequence[str] = tuple(FULL)) -> list[Section]:
    """Write every setting as JSON into out/configs, dry-run it, and return the section of the report.

    Without the extra `lm` the settings are written and shown, and the section says that they were not even dry-run.
    """
    configs = out / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    section = Section("Full scale: settings only, not run")
    section.text(
        "Not run. AlpacaFarm with Pythia-1.4B and UltraFeedback with Mistral-7B need several GPUs; this page has no "
        "result at this scale, neither ours nor the paper's. Below are the settings, as far as the authors' released "
        f"scripts give them, and what a dry run of each on {ROWS} generated rows showed: reading, template, tokens, "
        "masks, loss and one update, with a random model of about thirty thousand parameters and the reward length:min "
        "standing in.",
        "Each setting is a file in configs/ that `steelyard train preference --config FILE` reads, given your data "
        "(--data.path), your starting model (--model.name) and, for on-policy methods, your reward (--scorer).",
    )
    rows = []
    for name in names:
        setting = FULL[name]
        (configs / f"{name}.json").write_text(to_json(setting.run), encoding="utf-8")
        lines: list[str] = []
        began = time.perf_counter()
        try:
            dry_run(stand_in(setting, out / "dry_run", name), ROWS, say=lines.append)
            outcome = "passed"
        except MissingExtraError as error:
            outcome = f"not dry-run: {error}"
        console.print(f"{name}: dry run {outcome}", markup=False, highlight=False, soft_wrap=True)
        (out / "dry_run" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows.append(
            (setting.label, name, outcome, f"{time.perf_counter() - began:.1f}", _tokens(lines), _update(lines))
        )
    section.table(
        Table(
            "Dry runs",
            f"On {ROWS} generated rows in the data set's columns; model and reward are stand-ins, so the numbers "
            "say that the path works and nothing about the method. Everything that was seen is in dry_run/NAME.txt.",
            ("setting", "name", "dry run", "seconds", "tokens of the first batch", "loss of one update"),
            tuple(rows),
        )
    )
    section.table(*(_settings(name) for name in names))
    return [section]


def _tokens(lines: Sequence[str]) -> str:
    return next((line.removeprefix("tokens: ") for line in lines if line.startswith("tokens: ")), "-")


def _update(lines: Sequence[str]) -> str:
    found = next((line for line in lines if line.startswith("one update: ")), "")
    return next((part for part in found.removeprefix("one update: ").split(", ") if "loss/preference" in part), "-")


SHOWN = (
    "objective", "model.name", "data.kind", "data.max_prompt_tokens", "data.max_completion_tokens", "data.truncation",
    "experience.source", "experience.prompts_per_refresh", "experience.minibatch_prompts",
    "experience.num_generations", "experience.reuse", "experience.epochs", "sampling.temperature",
    "sampling.max_new_tokens", "scorer",
)  # fmt: skip


def _settings(name: str) -> Table:
    """Return one setting's values, what else the scripts try, and what is not known."""
    setting = FULL[name]
    rows = []
    for key, value in flatten(plain(setting.run)).items():
        if any(key == shown or key.startswith(f"{shown}.") for shown in SHOWN):
            tried = ", ".join(f"{x:g}" for x in setting.tried.get(key, ()))
            rows.append((key, "-" if value is None else f"{value}", tried or "-"))
    notes = tuple((f"not known ({number})", text) for number, text in enumerate(setting.unknown, 1))
    return Table(
        setting.label, f"configs/{name}.json", ("field", "value", "also tried by the scripts"), tuple(rows), notes
    )
