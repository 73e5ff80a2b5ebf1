"""The page of a preference run: every number from its rows, changes paired, samples side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from steelyard.errors import DataError
from steelyard.report import language


def write(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    rng = np.random.default_rng(0)
    samples, texts, pairs = [], [], []
    for step in (0, 5, 10):
        for prompt in range(6):
            for sample in range(2):
                reward = prompt + step / 10 + 0.01 * rng.standard_normal()
                samples.append(
                    {"phase": "offline", "update_step": step, "env_step": 0, "episode": 2 * prompt + sample,
                     "episode_seed": 0, "prompt": prompt, "return": reward, "length": 4, "success": None,
                     "score": 0.5, "proxy": None, "kl_to_reference": step / 5, "kl_from_reference": step / 4,
                     "entropy": 1.0, "finished": True}
                )  # fmt: skip
                text = {"update_step": step, "prompt_number": prompt, "sample": sample, "prompt": f"<b>{prompt}</b>"}
                texts.append(text | {"completion": f"a b a b {step}", "reward": reward, "length": 4})
        pairs += [
            {"update_step": step, "pair": k, "chosen_logp": -1.0, "rejected_logp": -2.0, "chosen_length": 2,
             "rejected_length": 4, "chosen_ratio": -float(step), "rejected_ratio": -2.0 * step, "margin": float(step),
             "accuracy": float(step > 0)}
            for k in range(3)
        ]  # fmt: skip
    write(folder, "eval.jsonl", samples)
    write(folder, "samples.jsonl", texts)
    write(folder, "pairs.jsonl", pairs)
    write(folder, "metrics.jsonl", [{"update_step": s, "reward": s / 10, "data/dropped_ties": 3} for s in (5, 10)])
    (folder / "config.json").write_text(json.dumps({"objective": {"kind": "dpo"}, "data": {"path": "x"}, "model": {}}))
    (folder / "case.json").write_text(json.dumps({"label": "dpo", "seed": 3, "config_hash": "c", "data_hash": "d"}))
    (folder / "environment.json").write_text(json.dumps({"steelyard": "0", "commit": None}))
    (folder / "status.json").write_text(json.dumps({"status": "running", "message": ""}))
    return folder


def test_changes_are_paired_by_prompt(run):
    rows = language.sample_rows(run)
    found = language.estimates(rows, "return", "prompt")
    assert list(found) == [0, 5, 10]
    assert found[0].n == 6  # two samples of a prompt count as one
    assert found[0].value == pytest.approx(2.5, abs=0.02)
    assert found[0].high - found[0].low > 1  # prompts differ much,
    change = language.change(rows, "return", "prompt")
    assert change.value == pytest.approx(1.0, abs=0.02)
    assert change.high - change.low < 0.05  # their changes do not
    assert rows[0]["distinct_2"] == pytest.approx(len({"a b", "b a", "b 0"}) / 8)


def test_displacement_is_shown_per_token_too(run):
    rows = language.pair_rows(run)
    last = {key: language.estimates(rows, key, "pair")[10].value for key, _ in language.PAIR_MEASURES}
    assert last["chosen_ratio"] == -10
    assert last["chosen_ratio_per_token"] == -5
    assert last["rejected_ratio_per_token"] == -5
    assert last["margin"] == 10


def test_the_page(run):
    pytest.importorskip("matplotlib")
    page = language.write_language_report(run).read_text()
    assert "<b>0</b>" not in page.replace("<b>before", "").replace("<b>after", "")  # a prompt is text, never markup
    assert "&lt;b&gt;0&lt;/b&gt;" in page
    for words in ("before: 4 tokens", "after 10 updates", "3 prompts were dropped", "One training run", "a b a b 10"):
        assert words in page
    assert "after 5 updates" not in page
    assert "reward (gold) from 2.5" in page
    assert (run / "report.md").is_file()


def test_a_damaged_log_is_named(run):
    (run / "pairs.jsonl").write_text('{"update_step": 0}\nnot json\n')
    with pytest.raises(DataError, match=r"pairs.jsonl, line 2: not valid JSON"):
        language.pair_rows(run)


def test_distinct():
    assert language.distinct(["a b c", "a b"], 2) == pytest.approx(2 / 3)
    assert language.distinct(["a"], 2) is None


def test_a_measure_that_the_last_evaluation_lacks_is_missing(run):
    rows = language.sample_rows(run)
    for row in rows:
        if row["update_step"] == 10:
            row["distinct_2"] = None
    table = language.measure_table("Samples", "", rows, (("distinct_2", "bigrams"),), "prompt")
    assert table.rows[0][2] == language.MISSING
