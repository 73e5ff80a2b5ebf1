"""What a progress line says about slow and fast work."""

from __future__ import annotations

import pytest

from steelyard.train.progress import ProgressLine, pace


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0, "0/s"), (0.03, "33 s each"), (1.0, "1.0/s"), (2.44, "2.4/s"), (12.6, "13/s"), (1234.0, "1234/s")],
)
def test_pace(rate, text):
    assert pace(rate) == text


def test_a_plain_line_tells_pace_and_note(capsys, monkeypatch):
    clock = iter([0.0, 20.0])
    monkeypatch.setattr("steelyard.train.progress.time.monotonic", lambda: next(clock))
    with ProgressLine("dpo", 4) as progress:
        progress.plain = True
        progress.advance_to(2, "score 0.50")
    assert capsys.readouterr().err == "dpo: 2/4, 10 s each, 20 s left, score 0.50\n"
