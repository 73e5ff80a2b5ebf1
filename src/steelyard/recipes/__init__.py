"""One file per published system: which data, objective, adaptation and claim; presets tiny | small | paper."""

from __future__ import annotations

RECIPES = {
    "cal_ql": "Cal-QL: calibrated offline pre-training for fast online fine-tuning, against CQL, IQL and others",
    "reds": "CQL (ReDS): a support constraint by re-weighting, on data whose noise depends on the place",
    "discrete": "CQL, Cal-QL and ReDS over discrete actions from pixels, against cloning",
    "preference_study": "preference fine-tuning: on-policy sampling, reuse and the negative gradient at three scales",
    "adaptive_compute": "adaptive inference-time compute: as many samples as needed, pruned early, judged by the model",
    "hyre": "HyRe: many heads on one backbone, re-weighted by a handful of labels, against fine-tuning and others",
}
"""Name of the module in this package -> one line for `steelyard run --help`."""
