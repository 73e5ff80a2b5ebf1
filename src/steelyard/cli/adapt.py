"""`steelyard adapt hyre DIR --labels FILE`, and `--ask`: a trained head set adapted to one person."""

from __future__ import annotations

import io
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from steelyard import runtime
from steelyard.adapt.artefact import AdaptSettings, LoadedHeads, MethodName, load_heads
from steelyard.adapt.base import Posterior, Support
from steelyard.adapt.personalizer import Personalizer
from steelyard.adapt.profile import Profile, read_profile, seen_hash, write_profile
from steelyard.adapt.query import How
from steelyard.bench.stats import Estimate
from steelyard.cli import adapt_ask
from steelyard.errors import ConfigError, near
from steelyard.workflows import adapt as work
from steelyard.workflows.ask import Session, read_candidates

USAGE = """usage: steelyard adapt hyre DIR --labels FILE [--test FILE] [--profile OUT.json] [OPTIONS]
       steelyard adapt hyre DIR --ask --pool FILE --profile OUT.json [OPTIONS]
       steelyard adapt best_of_n PROMPTS --model MODEL --out ANSWERS.jsonl [OPTIONS]

hyre: re-weight a trained head set (steelyard train hyre) by a few labels of one person, or ask for them.
best_of_n: answer prompts with as many samples as each needs (steelyard train self_eval).
steelyard adapt hyre --help and steelyard adapt best_of_n --help list all options.
"""


@dataclass(frozen=True)
class AdaptArguments:
    """Adapt a trained head set to one person's labels, say what that brings, and keep it as a small profile.

    Without --test every label is judged by what is adapted to the others. With --ask a session in the terminal asks for
    the labels: the most informative comparison first.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Head set: a run of `steelyard train hyre`, a checkpoint or its pretrained/ directory."""
    labels: str | None = None
    """Labelled examples: pairs (prompt, chosen, rejected), a table, or features; as the heads were trained on."""
    test: str | None = None
    """Other labelled examples, to judge by; one that is among the labels too is an error."""
    method: MethodName | None = None
    """How to adapt; default: what training chose on held-out groups."""
    eta: float | None = None
    """How fast evidence sharpens the weights; default: what training chose."""
    noise: float | None = None
    """Assumed share of labels that are wrong; default: what training chose."""
    mix: float | None = None
    """Share of the prior that stays in the weights; default: what training chose."""
    profile: Path | None = None
    """Write what was learned to this JSON file. With --ask an existing one is gone on with."""
    profile_in: Path | None = None
    """Go on from this profile."""
    top: int | None = None
    """Write a short profile with so many weights instead of the exact one."""
    candidates: str | None = None
    """Rank these: prompts with completions; shows where each stood before."""
    ask: bool = False
    """Ask for labels in the terminal: a, b, = (neither), u (undo), s (show), q (quit)."""
    pool: str | None = None
    """What --ask asks about: prompts with completions."""
    how: How = "bald"
    """How --ask chooses the next comparison."""
    show: int = 10
    """Completions of a ranking that are shown."""
    seed: int = 0
    """Of ties among questions."""


def main(argv: list[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] == "best_of_n":
        from steelyard.cli.adapt_best_of_n import best_of_n

        return best_of_n(argv[1:])
    if argv[0] != "hyre":
        known = near(argv[0], ["hyre", "best_of_n"])
        raise ConfigError(f"what is to be adapted? Expected 'hyre' or 'best_of_n', found {argv[0]!r}; {known}")
    args = tyro.cli(AdaptArguments, prog="steelyard adapt hyre", args=argv[1:])
    _check(args)
    runtime.prepare(runtime.RuntimeConfig())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # texts hold what no terminal can be asked to show
    heads = load_heads(args.run)
    given = _profile_in(args)
    if given is not None:
        given.require(heads, str(args.profile_in or args.profile))
    settings, asked = _settings(args, heads.settings)
    people = Personalizer(heads, work.method_for(heads, settings, given, asked))
    begun = people.new() if given is None else given
    if args.labels is not None or args.ask:
        people.posterior(begun)  # a short profile that cannot go on says so before anything else is done
    console = Console()
    profile = begun if args.labels is None else _adapt(args, heads, people, begun, console)
    if args.candidates is not None:
        candidates = read_candidates(args.candidates, heads)
        before = begun if args.labels is not None else people.new()
        for number in range(len(candidates.prompts)):
            adapt_ask.show_ranking(console, people, candidates, number, before, profile, args.show)
    if not args.ask:
        if args.profile is not None:
            _write(args, profile)
        return 0
    assert args.pool is not None
    session = Session(heads, people, profile, read_candidates(args.pool, heads), args.how, args.seed)
    for note in session.notes:
        print(f"note: {note}", file=sys.stderr)
    status = adapt_ask.run(session, console, lambda found: _write(args, found, quiet=True), args.show)
    words = f"saved {args.profile} ({work.labels_of(session.profile.n)}); the same command goes on"
    print(words, file=sys.stderr if status else sys.stdout)
    return status


def _check(args: AdaptArguments) -> None:
    """Raise `ConfigError` for options that do not fit each other."""
    if args.labels is None and not args.ask and args.candidates is None:
        raise ConfigError("no labels: give a file with --labels FILE, or --ask to be asked for them")
    if args.ask and args.profile is None:
        raise ConfigError("--ask saves after every answer: say where with --profile FILE")
    if args.ask and args.top is not None:
        raise ConfigError("--top writes a short profile, and --ask goes on from its file: write a short one afterwards")
    if args.ask and args.pool is None:
        raise ConfigError("--ask asks about completions of prompts: give them with --pool FILE")
    if args.pool is not None and not args.ask:
        raise ConfigError("--pool is what --ask asks about: add --ask, or rank with --candidates")
    if args.test is not None and args.labels is None:
        raise ConfigError("--test judges what is adapted to labels: give them with --labels FILE")
    if args.top is not None and args.top < 1:
        raise ConfigError(f"--top must be at least 1, found {args.top}")
    if args.show < 1:
        raise ConfigError(f"--show must be at least 1, found {args.show}")
    if args.profile is None:
        return
    if not args.profile.parent.is_dir():
        raise ConfigError(f"--profile {args.profile}: there is no folder {args.profile.parent}")
    same = args.profile_in is not None and args.profile_in.absolute() == args.profile.absolute()
    if args.profile.exists() and not same and (not args.ask or args.profile_in is not None):
        raise ConfigError(
            f"--profile {args.profile}: exists; go on from it with --profile-in {shlex.quote(str(args.profile))}, or "
            "name another file"
        )


def _profile_in(args: AdaptArguments) -> Profile | None:
    if args.profile_in is not None:
        return read_profile(args.profile_in)
    if args.ask and args.profile is not None and args.profile.exists():
        found = read_profile(args.profile)
        print(f"going on from {args.profile} ({work.labels_of(found.n)})", file=sys.stderr)
        return found
    return None


def _settings(args: AdaptArguments, own: AdaptSettings) -> tuple[AdaptSettings, bool]:
    """Return the head set's settings with what was asked for, and whether anything was."""
    given = {name: getattr(args, name) for name in ("method", "eta", "noise", "mix")}
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(own, **changes), bool(changes)


def _write(args: AdaptArguments, profile: Profile, quiet: bool = False) -> None:
    assert args.profile is not None
    write_profile(args.profile, profile, args.top)
    if not quiet:
        kind = "exact" if args.top is None else "short"
        print(f"wrote {args.profile} ({kind}, {args.profile.stat().st_size} bytes)")


# ---------------------------------------------------------------------------------------------------------- labels


def _adapt(args: AdaptArguments, heads: LoadedHeads, people: Personalizer, begun: Profile, console: Console) -> Profile:
    """Adapt to the labels, print what that brings, and return the profile."""
    assert args.labels is not None
    everything = work.read_labelled(args.labels, heads, people)
    test = None if args.test is None else work.read_labelled(args.test, heads, people)
    if test is not None:
        work.require_apart(everything, test, begun)
    labels, notes = work.new_labels(everything, begun)
    for note in (*everything.notes, *notes):
        print(f"note: {note}", file=sys.stderr)
    before = people.posterior(begun)
    after = before.update(labels.support) if len(labels) else before
    profile = people.profile(after, (*begun.seen, *map(seen_hash, labels.keys)))
    _show_weights(heads, after, len(labels), console)
    _show_comparison(heads, before, after, labels.support if len(labels) else None, test, console)
    sentence = work.diversity_sentence(args.run, test, heads.task)
    if sentence is not None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    return profile


def _show_weights(heads: LoadedHeads, posterior: Posterior, used: int, console: Console) -> None:
    about, members = posterior.diagnostics(), heads.num_members
    table = Table("measure", "value", title=work.after_name(heads, posterior), title_justify="left", box=None)
    total = "" if posterior.n == used else f" ({posterior.n:g} with those before)"
    table.add_row("labels used", f"{used}{total}")
    table.add_row("effective members (ESS)", f"{about['ess']:.1f} of {members}")
    table.add_row("entropy of the weights", f"{about['entropy']:.2f} nats")
    best = work.best_members(heads, posterior)
    table.add_row("best members", ", ".join(f"{name} {weight:.2f}" for name, weight in best))
    console.print(table)


def _show_comparison(
    heads: LoadedHeads,
    before: Posterior,
    after: Posterior,
    labels: Support | None,
    test: work.Labelled | None,
    console: Console,
) -> None:
    found = work.compare(heads, before, after, labels, test)
    if found is None:
        console.print("too few labels to judge by: give other examples with --test FILE", highlight=False)
        return
    measure = "rmse" if heads.task == "regression" else "accuracy"
    table = Table("", measure, "95% interval", title=f"judged on {found.on}", title_justify="left", box=None)
    for one in (*found.before, found.after):
        _row(table, one.name, one.estimate(heads.task))
    what = "squared error" if heads.task == "regression" else "accuracy"
    for one in found.before:
        _row(table, f"{what}, adapted minus {one.name}", found.after.minus(one))
    console.print(table)
    if not found.changed:
        console.print(
            f"Re-weighting changed no decision on these {found.after.right.size} examples: the members say the same "
            "about them, or the labels say nothing.", highlight=False,
        )  # fmt: skip


def _row(table: Table, name: str, value: Estimate) -> None:
    table.add_row(name, f"{value.value:.3f}", value.interval(3))
