"""Which preference method for this reward, this data and this model? Rules of thumb over measures with intervals.

The study behind the rules (Tajwar, Singh et al. 2024) says *when* a property of a method matters: on-policy sampling
and a negative gradient pay where the reward peaks at responses that the reference model hardly writes; where the peak
is already likely, supervised fine-tuning on winners does as well and costs less. `bench/evidence.py` measures where a
case lies; `advise` turns the measures into recommendations, each with its numbers, its rule and how sure it is.

The thresholds are heuristics. They tell the paper's own bandits and planted cases apart (tests/bench/test_advise.py);
nobody has calibrated them on real data sets. An interval that crosses a threshold lowers the confidence.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steelyard.bench.evidence import MANY_CUT, Evidence, Measure
from steelyard.bench.stats import Estimate

Confidence = Literal["clear", "weak", "cannot tell"]
ORDER: tuple[Confidence, ...] = ("cannot tell", "weak", "clear")

# Least share of samples near the peak for "aligned". The paper's bandits under their reference lie on either side of it
# (target 20 above, target 70 below; the test computes both shares); it also means that best-of-N with N well below 20
# seldom sees the peak.
NEAR_PEAK = 0.05
# Chosen responses less likely (per token) than the model's median sample: half of them if they were its own samples.
# Three quarters is a heuristic; text of people or of other models is always somewhat above a half.
ATYPICAL = 0.75
# Mean normalised edit distance below which pairs count as near-duplicates, whose likelihoods a contrastive loss tends
# to lower both (paper, fig. 17, on more and less distinct data sets; the number is ours).
NEAR_DUPLICATE = 0.3
# Share of data completions inside the central region of the model's own samples, relative to fresh samples.
ON_POLICY_OVERLAP = 0.8
OFF_POLICY_OVERLAP = 0.5
# Log-prob per token of data less that of samples, in nats, beyond which (either way) data are foreign: below, the model
# would not write them; above, they come from a colder distribution than its own.
OFF_POLICY_NATS = 0.5
# Share of best-of-N samples with a length that the reward model's pairs cover, below which its opinion is a guess.
COVERED = 0.8
# Pair accuracy under which a reward is barely better than a coin.
ACCURATE = 0.6
# Share of pairs with the longer (or the shorter) completion chosen, beyond which length is part of what is learned.
LENGTH_BIASED = 0.6


@dataclass(frozen=True)
class Advice:
    """One recommendation.

    Attributes:
        topic: "method", "loss", "data", "length", "reward" or "reuse".
        verdict: what to do, in a sentence.
        confidence: "clear" if the interval lies on one side of the threshold, "weak" if only the number does or the
            rule was not measured here, "cannot tell".
        numbers: the measures it rests on.
        rule: the rule, and where it comes from.
        commands: what to run.
    """

    topic: str
    verdict: str
    confidence: Confidence
    numbers: tuple[str, ...]
    rule: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Names:
    """What the command lines call the model, the data and the scorer.

    Attributes:
        model: the model.
        data: the preference set, or prompts alone.
        scorer: the reward; None without one.
        preferences: the data hold pairs.
    """

    model: str
    data: str
    scorer: str | None = None
    preferences: bool = True

    def train(self, objective: str, source: str, *options: str) -> str:
        """Return a `steelyard train preference` command line."""
        words = ["steelyard", "train", "preference", "--objective", objective, "--model", self.model]
        words += ["--data", self.data, "--source", source]
        if source != "dataset":
            words += ["--scorer", self.scorer or "reward_model:runs/reward"]
        return shlex.join([*words, *options])

    def reward_model(self, data: str | None = None) -> str:
        """Return the command line that trains a reward model on the pairs."""
        words = ["steelyard", "train", "reward_model", "--model", self.model, "--data", data or self.data]
        return shlex.join([*words, "--out", "runs/reward"])

    def pairs(self, out: str = "pairs.jsonl") -> str:
        """Return the command line that collects on-policy pairs."""
        words = ["steelyard", "data", "pairs", "--model", self.model, "--prompts", self.data]
        return shlex.join([*words, "--scorer", self.scorer or "reward_model:runs/reward", "--out", out])


def side(estimate: Estimate, threshold: float) -> tuple[bool, Confidence]:
    """Return whether a number is above a threshold, and how sure that is.

    Clear: the whole interval is. Weak: at least three quarters of it are. Else nobody can tell.
    """
    above = estimate.value > threshold
    if estimate.low is None or estimate.high is None:
        return above, "cannot tell"
    if estimate.low > threshold or estimate.high < threshold:
        return above, "clear"
    width = max(estimate.high - estimate.low, 1e-12)
    over = (estimate.high - threshold) / width
    return above, "weak" if (over if above else 1 - over) >= 0.75 else "cannot tell"


def advise(evidence: Evidence, names: Names, learned: bool = False) -> list[Advice]:
    """Return recommendations: the method first, then what else the measures say.

    Args:
        evidence: of `measure`.
        names: for the command lines.
        learned: the scorer is a reward model.
    """
    found = [_method(evidence, names)]
    found += [rule for rule in (_loss(evidence, names), _data(evidence, names), _length(evidence, names)) if rule]
    found += _reward(evidence, names, learned)
    found.append(
        Advice(
            "reuse",
            "use each sample about twice; more only with an objective that clips its ratios (ppo, grpo).",
            "weak",
            (),
            "Reuse replaces some sampling and costs exploration; about 2 passes paid in the paper, more only with "
            "clipping. A rule of thumb, not measured on your case.",
            (names.train("ppo", "policy", "--reuse", "4"),) if names.scorer else (),
        )
    )
    return found


Place = Literal["aligned", "misaligned"]


def place(evidence: Evidence) -> tuple[Place, Confidence, tuple[Measure, ...], str]:
    """Return where the reward's peak lies, how sure that is, the measures it rests on, and a remark."""
    near, atypical, agreement = (evidence.find(key) for key in ("near_peak", "chosen_atypical", "agreement"))
    # where the scorer does not order the pairs as the data do, the chosen ones say nothing about its peak
    if near is not None and agreement is not None and not _at_least(agreement, ACCURATE):
        atypical = None
    if near is None and atypical is None:
        return "misaligned", "cannot tell", (), "neither a reward that varies nor a preference set was there to measure"
    if near is None:
        assert atypical is not None
        far, confidence = side(atypical.estimate, ATYPICAL)
        remark = "without a scorer only the log-probs speak, and foreign text has low ones whatever its worth"
        return ("misaligned" if far else "aligned"), _weaker(confidence, "weak"), (atypical,), remark
    aligned, confidence = side(near.estimate, NEAR_PEAK)
    where: Place = "aligned" if aligned else "misaligned"
    if atypical is None:
        return where, confidence, (near,), ""
    far, _ = side(atypical.estimate, ATYPICAL)
    if far == aligned:
        remark = "the reward of the samples and the log-probs of the chosen disagree; the reward decides"
        return where, _weaker(confidence, "weak"), (near, atypical), remark
    return where, confidence, (near, atypical), "the log-probs of the chosen say the same"


def _method(evidence: Evidence, names: Names) -> Advice:
    where, confidence, measures, remark = place(evidence)
    if evidence.cut > MANY_CUT:
        confidence = _weaker(confidence, "weak")
    numbers = tuple(measure.text() for measure in measures) + ((remark,) if remark else ())
    agreement = evidence.find("agreement")
    usable = names.preferences and (agreement is None or _at_least(agreement, ACCURATE))
    on_policy = names.train("dpo", "policy", "--reuse", "2", "--negative", "1.0")
    offline = names.train("pref_ft", "dataset") if usable else names.train("best_of_n", "policy")
    if confidence == "cannot tell":
        return Advice(
            "method",
            "run both at the same budget and compare: the measurement does not say where the reward's peak lies.",
            confidence,
            numbers,
            "Aligned cases need no more than supervised fine-tuning on winners, misaligned ones on-policy samples and "
            "a negative gradient (paper, sections 5.1 and 5.2).",
            (offline, on_policy) if names.scorer else (offline, names.train("dpo", "dataset")) if usable else (),
        )
    if where == "aligned":
        return Advice(
            "method",
            "supervised fine-tuning on winners: the reward peaks where the model already writes.",
            confidence,
            numbers,
            "Aligned peak: offline supervised methods come out comparable, and they cost less (paper, section 5.1).",
            (offline,),
        )
    rule = (
        "Misaligned peak: on-policy sampling supplies coverage, the negative gradient draws more out of each batch, "
        "and they add up (paper, sections 5.1 to 5.3). Which loss is best is not settled by it: rloo is as good a "
        "first try as dpo."
    )
    verdict = "on-policy samples with a negative gradient: the reward peaks where the model hardly writes."
    if names.scorer is None:
        return Advice(
            "method",
            verdict
            + " This needs a reward: train a reward model on the pairs first; offline dpo is the cheap stand-in.",
            confidence,
            numbers,
            rule,
            (names.reward_model(), on_policy, names.train("dpo", "dataset")),
        )
    commands = (on_policy, names.train("rloo", "policy", "--reuse", "2"))
    quantile = evidence.find("chosen_quantile")
    if usable and quantile is not None and _at_least(quantile, 0.9):
        commands = (names.train("dpo", "mixture", "--experience.offline-share", "0.5", "--reuse", "2"), on_policy)
        numbers += (quantile.text(),)
        verdict += " Mix the data in, for their chosen ones beat what it samples."
    return Advice("method", verdict, confidence, numbers, rule, commands)


def _loss(evidence: Evidence, names: Names) -> Advice | None:
    distance = evidence.find("edit_distance")
    if distance is None:
        return None
    distinct, confidence = side(distance.estimate, NEAR_DUPLICATE)
    numbers = tuple(m.text() for m in (distance, evidence.find("shared_tokens"), evidence.find("log_prob_gap")) if m)
    rule = (
        "A negative gradient always widens the margin; whether it raises the chosen response depends on how different "
        "the two are (paper, section 5.2, figs. 16 and 17). Watch rewards/chosen and rewards/rejected apart."
    )
    if confidence == "cannot tell":
        verdict = "the pairs may be too alike for a plain contrastive loss: watch whether rewards/chosen falls."
        return Advice("loss", verdict, confidence, numbers, rule)
    if distinct:
        return Advice("loss", "the pairs are distinct enough for a plain contrastive loss.", confidence, numbers, rule)
    return Advice(
        "loss",
        "expect displacement: the pairs are near-duplicates, and a contrastive loss may lower both; anchor it.",
        confidence,
        numbers,
        rule,
        (
            names.train("dpo", "dataset", "--objective.nll-weight", "1.0"),
            names.train("apo", "dataset"),
        ),
    )


def _data(evidence: Evidence, names: Names) -> Advice | None:
    overlap, ratio = evidence.find("overlap"), evidence.find("log_ratio")
    if overlap is None or ratio is None:
        return None
    numbers = tuple(
        m.text() for m in (overlap, ratio, evidence.find("length_test"), evidence.find("log_prob_test")) if m
    )
    rule = (
        "Offline losses learn from what the model would not write; the same loss on its own samples does better at "
        "equal KL (paper, section 5.1; Tang et al. 2024)."
    )
    on, on_sure = side(overlap.estimate, ON_POLICY_OVERLAP)
    inside, off_sure = side(overlap.estimate, OFF_POLICY_OVERLAP)
    far, far_sure = _beyond(ratio.estimate, OFF_POLICY_NATS)
    if evidence.cut > MANY_CUT:  # lengths say nothing then
        on_sure, off_sure, far_sure = (_weaker(sure, "weak") for sure in (on_sure, off_sure, far_sure))
    if far or not inside:
        confidence = max((sure for there, sure in ((far, far_sure), (not inside, off_sure)) if there), key=ORDER.index)
        verdict = "the pairs are foreign to the model: for a contrastive loss collect some of its own."
        commands = (names.pairs(),) if names.scorer else (names.reward_model(), names.pairs())
        return Advice("data", verdict, confidence, numbers, rule, commands)
    if on:
        return Advice("data", "the pairs look like the model's own samples.", on_sure, numbers, rule)
    return Advice("data", "the pairs are partly the model's own.", "cannot tell", numbers, rule)


def _beyond(estimate: Estimate, threshold: float) -> tuple[bool, Confidence]:
    """Return whether a number lies beyond a threshold on either side of 0, and how sure that is."""
    if estimate.value >= 0 or estimate.low is None or estimate.high is None:
        return side(estimate, threshold)
    return side(Estimate(-estimate.value, -estimate.high, -estimate.low, estimate.n), threshold)


def _length(evidence: Evidence, names: Names) -> Advice | None:
    longer = evidence.find("longer_chosen")
    if longer is None or (names.scorer or "").startswith("length:"):
        return None  # of a reward that is length, length is no bias
    estimate = longer.estimate
    assert estimate.low is not None
    assert estimate.high is not None
    fewer = Estimate(1 - estimate.value, 1 - estimate.high, 1 - estimate.low, estimate.n)
    for mirrored, word in ((estimate, "longer"), (fewer, "shorter")):
        biased, confidence = side(mirrored, LENGTH_BIASED)
        if biased and confidence != "cannot tell":
            return Advice(
                "length",
                f"the {word} completion is usually the chosen one: judge the result by a length-controlled win rate.",
                confidence,
                tuple(m.text() for m in (longer, evidence.find("length_gap")) if m),
                "A sum of log-ratios grows with length; a length-normalised loss does not.",
                (names.train("dpo", "dataset", "--objective.length-normalised"),),
            )
    return None


def _reward(evidence: Evidence, names: Names, learned: bool) -> list[Advice]:
    found: list[Advice] = []
    agreement, coverage = evidence.find("agreement"), evidence.find("coverage")
    if agreement is not None:
        good, confidence = side(agreement.estimate, ACCURATE)
        if not good and confidence != "cannot tell":
            verdict = (
                "the reward model is hardly better than a coin on these pairs: improve it before optimising it."
                if learned
                else "the pairs were not labelled by this reward: an offline method on them would learn something else."
            )
            rule = "Optimising a reward against pairs that contradict it is two goals at once."
            found.append(Advice("reward", verdict, confidence, (agreement.text(),), rule, (names.pairs(),)))
    if coverage is not None:
        good, confidence = side(coverage.estimate, COVERED)
        if not good and confidence != "cannot tell":
            found.append(
                Advice(
                    "reward",
                    "the reward model judges lengths that its pairs hardly hold: collect on-policy pairs and train it "
                    "anew before a long run.",
                    confidence,
                    (coverage.text(),),
                    "On-policy optimisation ends where the reward model is highest, right or wrong; one that orders "
                    "its pairs almost perfectly can be wrong where they are sparse. Report the gold reward beside it.",
                    (names.pairs(), names.reward_model("pairs.jsonl")),
                )
            )
    return found


def _at_least(measure: Measure, threshold: float) -> bool:
    return side(measure.estimate, threshold)[0]


def _weaker(first: Confidence, second: Confidence) -> Confidence:
    return min(first, second, key=ORDER.index)


# --- out ------------------------------------------------------------------------------------------------------------


def as_json(evidence: Evidence, advice: Sequence[Advice]) -> dict[str, Any]:
    """Return everything as plain JSON values."""
    return {
        "measures": {
            measure.key: {
                "question": question, "label": measure.label, "value": measure.estimate.value,
                "low": measure.estimate.low, "high": measure.estimate.high, "n": measure.estimate.n,
            }
            for question, measures in evidence.questions.items() for measure in measures
        },
        "warnings": list(evidence.warnings),
        "advice": [
            {
                "topic": a.topic, "verdict": a.verdict, "confidence": a.confidence, "numbers": list(a.numbers),
                "rule": a.rule, "commands": list(a.commands),
            }
            for a in advice
        ],
        "thresholds": {
            name: value for name, value in globals().items() if name.isupper() and isinstance(value, (int, float))
        },
    }  # fmt: skip
