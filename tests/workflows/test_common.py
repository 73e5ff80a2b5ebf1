"""What all runs share."""

import json

import pytest

from steelyard.config import plain
from steelyard.workflows.common import kind_of_run
from steelyard.workflows.hyre import HyReRun
from steelyard.workflows.language import LanguageRun
from steelyard.workflows.preference import PreferenceRun
from steelyard.workflows.reward_model import RewardModelRun


@pytest.mark.parametrize(
    ("config", "kind"),
    [(HyReRun(), "hyre"), (LanguageRun(), "sft"), (PreferenceRun(), "preference"), (RewardModelRun(), "reward_model")],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_run_says_of_which_kind_it_is(config, kind, tmp_path):
    assert kind_of_run(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(plain(config)))
    assert kind_of_run(tmp_path) == kind
    (tmp_path / "config.json").write_text("{}")
    assert kind_of_run(tmp_path) is None
