"""Full-scale settings: complete, read back exactly, and dry-run through the real path on generated rows."""

import json

import pytest
from rich.console import Console

from steelyard.config import from_json, to_json
from steelyard.data.preferences import read_text_data
from steelyard.errors import DataError
from steelyard.recipes import preference_full
from steelyard.recipes.preference_full import (
    ASSISTANT,
    END,
    FULL,
    PROMPTER,
    ROWS,
    alpaca_pair,
    alpaca_prompt,
    alpaca_records,
    run,
    stand_in,
    ultrafeedback_records,
)
from steelyard.workflows.preference import PreferenceRun


def test_settings_are_those_of_the_released_scripts():
    assert {name.partition("_")[0] for name in FULL} == {"alpaca", "ultrafeedback"}
    ppo = FULL["alpaca_farm_ppo"].run
    assert (ppo.experience.prompts_per_refresh, ppo.experience.minibatch_prompts) == (512, 8)
    assert (ppo.objective.epsilon, ppo.objective.value_weight, ppo.objective.gae_lambda) == (0.2, 0.1, 0.95)
    best = FULL["alpaca_farm_best_of_n"].run
    assert (best.experience.num_generations, best.objective.keep, best.objective.learning_rate) == (4, 1, 1e-6)
    for name, setting in FULL.items():
        assert setting.unknown, name  # nowhere does the release say everything
        for field in setting.tried:
            part, _, key = field.partition(".")
            assert hasattr(getattr(setting.run, part), key)


@pytest.mark.parametrize("name", FULL)
def test_settings_read_back_exactly(name):
    text = to_json(FULL[name].run)
    assert to_json(from_json(PreferenceRun, text)) == text


@pytest.mark.parametrize("name", FULL)
def test_rows_are_read_as_what_the_setting_says(name, tmp_path):
    config = stand_in(FULL[name], tmp_path, name)
    data = read_text_data(config.data.path, config.data.kind)
    assert len(data) == ROWS
    assert data.kind == config.data.kind
    assert len((tmp_path / f"{name}.columns.jsonl").read_text().splitlines()) == ROWS


def test_the_alpaca_template_and_its_labels():
    record = {"instruction": "Say hello.", "input": "In French.", "output_1": "Bonjour", "output_2": "Hi"}
    prompt = f"{PROMPTER}Say hello.\nIn French.{END}{ASSISTANT}"
    assert alpaca_prompt(record) == prompt
    assert alpaca_prompt({"instruction": "Say hello.", "input": ""}) == f"{PROMPTER}Say hello.{END}{ASSISTANT}"
    assert alpaca_pair(record | {"preference": 2}) == {"prompt": prompt, "chosen": "Hi", "rejected": "Bonjour"}
    assert alpaca_pair(record | {"preference": 1})["chosen"] == "Bonjour"
    with pytest.raises(DataError, match="expected 1 or 2, found 0"):
        alpaca_pair(record | {"preference": 0})
    assert {row["preference"] for row in alpaca_records(ROWS)} == {1, 2}


def test_conversations_keep_their_question_apart(tmp_path):
    config = stand_in(FULL["ultrafeedback_dpo"], tmp_path, "ultra")
    row = read_text_data(config.data.path).rows[0]
    assert row.prompt == [ultrafeedback_records(1)[0]["chosen"][0]]
    assert row.completions[0][0]["content"].startswith("Here is a careful answer")


def test_without_the_extra_the_page_says_so(tmp_path, monkeypatch):
    def absent(*_, **__):
        raise preference_full.MissingExtraError("transformers is not installed; install it with: pip install 'x'")

    monkeypatch.setattr(preference_full, "dry_run", absent)
    (section,) = run(tmp_path, Console(quiet=True), ("alpaca_farm_dpo",))
    assert "Not run." in section.parts[0]
    assert section.parts[2].rows[0][2].startswith("not dry-run: transformers is not installed")


@pytest.mark.lm
def test_dry_runs_pass_through_the_real_path(tmp_path):
    pytest.importorskip("transformers")
    names = ("alpaca_farm_sft", "alpaca_farm_dpo", "ultrafeedback_dpo", "alpaca_farm_ppo")
    (section,) = run(tmp_path, Console(quiet=True), names)
    table = section.parts[2]
    assert [row[2] for row in table.rows] == ["passed"] * len(names)
    assert all(row[5].startswith("loss/preference") for row in table.rows)
    seen = (tmp_path / "dry_run" / "alpaca_farm_dpo.txt").read_text()
    assert "scored" in seen
    assert "EOS" in seen
    assert "cut" in seen  # the over-long prompt is reported
    assert json.loads((tmp_path / "configs" / "alpaca_farm_dpo.json").read_text())["objective"]["kind"] == "dpo"


@pytest.mark.lm
@pytest.mark.slow
def test_every_dry_run_passes(tmp_path):
    pytest.importorskip("transformers")
    (section,) = run(tmp_path, Console(quiet=True))
    assert [row[2] for row in section.parts[2].rows] == ["passed"] * len(FULL)
