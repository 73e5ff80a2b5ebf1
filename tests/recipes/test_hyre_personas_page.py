"""What E1 and its kin conclude from rows."""

import numpy as np
import pytest

from steelyard.recipes.hyre_ablations import rank_correlation
from steelyard.recipes.hyre_personas_page import findings, sections
from steelyard.recipes.hyre_population import Population

pytest.importorskip("matplotlib")
LEVELS = {
    "HyRe": 0.90,
    "Gaussian over heads": 0.92,
    "fine-tune head (wide grid)": 0.85,
    "head MAP": 0.84,
    "single model": 0.80,
    "uniform mean": 0.81,
    "best head (oracle)": 0.93,
}


def rows(levels=LEVELS, spread=0.01, heads="user heads, pooled"):
    found = []
    for world in ("agree", "conflict"):
        for split in range(3):
            for user in range(12):
                noise = np.random.default_rng([split, user]).normal(size=len(levels)) * spread
                for (method, level), move in zip(levels.items(), noise, strict=True):
                    for n in (0,) if method in ("single model", "uniform mean", "best head (oracle)") else (1, 2, 5):
                        found.append(
                            {"split": split, "world": world, "heads": heads, "method": method, "n": n,
                             "target": f"user {user}", "accuracy": level + move}
                        )  # fmt: skip
    return found


def verdicts(kinds):
    return {finding.claim: finding.verdict for finding in findings(kinds)}


def kinds(**changes):
    return {"rows": rows(LEVELS | changes), "settings": [], "queries": [], "diversity": []}


def test_verdicts_follow_from_the_rows():
    good = verdicts(kinds())
    assert set(good.values()) == {"holds"}
    assert len(good) == 6
    bad = verdicts(kinds(HyRe=0.80))
    assert set(bad.values()) - {"holds"} == {"does not hold"}
    assert [claim for claim, verdict in bad.items() if verdict == "holds"] == [
        claim for claim in bad if "Gaussian" in claim
    ]


def test_six_points_are_not_seven():
    found = verdicts(kinds(**{"single model": 0.84, "uniform mean": 0.84}))
    assert sum(verdict == "does not hold" for verdict in found.values()) == 2


def test_sections_render_without_all_parts():
    assert [section.heading[:3] for section in sections(Population(splits=3, shots=(1, 2, 5)), kinds())][:2] == [
        "E1:",
        "E1b",
    ]


def test_rank_correlation_equals_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    x = draw.normal(size=30).round(1)
    y = (x + draw.normal(size=30)).round(1)  # with ties
    found = rank_correlation(x, y)
    assert found.value == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    assert -1 <= found.low < found.value < found.high <= 1
