"""The terminal session of `steelyard adapt hyre --ask`; plain standard input and output will do."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text as Styled

from steelyard.adapt.personalizer import Personalizer
from steelyard.adapt.profile import Profile
from steelyard.data.tokenizer import Text
from steelyard.envs.scorers import text_of
from steelyard.workflows.adapt import labels_of
from steelyard.workflows.ask import Candidates, Place, Question, Session, rank

ANSWERS = {"a": 1.0, "b": 0.0, "=": 0.5}
PROMPT = "better: a, b, = (neither); u undo, s show, q quit > "
UP, DOWN = "\N{UPWARDS ARROW}", "\N{DOWNWARDS ARROW}"
LONGEST = 4000
"""Characters of a text that are shown."""


def run(session: Session, console: Console, save: Callable[[Profile], None], show: int) -> int:
    """Ask until there is nothing left, or the person leaves; save after every answer.

    Args:
        session: of one person.
        console: to print on.
        save: keeps a profile.
        show: completions of a ranking that are shown.

    Returns:
        Exit status: 0, or 130 after ctrl-C; everything answered is saved in both cases.
    """
    begun, prompt = session.profile, 0
    try:
        save(session.profile)
        question = session.next()
        while question is not None:
            prompt = question.prompt
            _show_question(console, session, question)
            command = _command(console)
            if command == "q":
                break
            if command == "s":
                for number in range(len(session.candidates.prompts)):
                    show_ranking(console, session.people, session.candidates, number, begun, session.profile, show)
                continue
            before = session.profile
            if command == "u":
                back = session.undo()
                if back is None:
                    _say(console, "nothing to undo: no answer of this session is left")
                    continue
                save(session.profile)
                _say(console, f"took the last answer back; {labels_of(session.profile.n)}")
                question = back
                continue
            session.answer(question, ANSWERS[command])
            save(session.profile)
            show_ranking(console, session.people, session.candidates, prompt, before, session.profile, show)
            _show_state(console, session)
            question = session.next()
        if question is None:
            _say(console, "every pair of these candidates has been asked")
    except KeyboardInterrupt:
        save(session.profile)
        console.print()
        return 130
    return 0


def _command(console: Console) -> str:
    """Read a command; the end of the input is q."""
    while True:
        try:
            word = console.input(PROMPT, markup=False).strip().casefold()
        except EOFError:
            console.print()
            return "q"
        if not sys.stdin.isatty():
            console.print(word, markup=False, highlight=False)  # a transcript that can be read
        if word in (*ANSWERS, "u", "s", "q"):
            return word
        _say(console, f"expected one of a, b, =, u, s, q, found {_shown(word)[:40]!r}")


def _show_question(console: Console, session: Session, question: Question) -> None:
    candidates = session.candidates
    prompt, own = candidates.prompts[question.prompt], candidates.completions[question.prompt]
    console.print()
    if text_of(prompt):
        console.print(Panel(Styled(_shown(prompt)), title="prompt", title_align="left"))
    for name, side in (("A", question.first), ("B", question.second)):
        console.print(Panel(Styled(_shown(own[side])), title=name, title_align="left"))


def _show_state(console: Console, session: Session) -> None:
    profile, left = session.profile, session.information()
    _say(console, f"{labels_of(profile.n)}; {profile.ess:.1f} of {profile.members} members effective")
    if left.questions:
        _say(
            console,
            f"expected information left: {left.following:.2f} bits in the next answer, {left.together:.2f} in the next "
            f"{left.questions} together; {left.unknown:.2f} bits are unknown about the members",
        )


def show_ranking(
    console: Console,
    people: Personalizer,
    candidates: Candidates,
    prompt: int,
    before: Profile,
    now: Profile,
    show: int,
) -> None:
    """Print the completions of a prompt, best first, with where they stood before."""
    found = rank(people, candidates, prompt, before, now)
    name = " ".join(_shown(candidates.prompts[prompt]).split())[:60] or candidates.source
    table = Table(
        Column("place", justify="right"), Column("before", justify="right"), "", Column("score", justify="right"),
        Column("before", justify="right"), Column("completion", no_wrap=True, overflow="ellipsis"),
        title=Styled(f"ranking: {name}"), title_justify="left", box=None,
    )  # fmt: skip
    for place in found[:show]:
        completion = " ".join(_shown(candidates.completions[prompt][place.completion]).split())
        table.add_row(
            str(place.now), str(place.before), arrow(place), f"{place.score:+.2f}", f"{place.score_before:+.2f}",
            Styled(completion),
        )  # fmt: skip
    console.print(table)
    if len(found) > show:
        _say(console, f"and {len(found) - show} more")


def arrow(place: Place) -> str:
    """Return how far a completion has moved: an arrow up or down and the number of places, or "="."""
    moved = place.before - place.now
    if not moved:
        return "="
    return f"{UP if moved > 0 else DOWN}{abs(moved)}"


def _shown(text: Text) -> str:
    """Return a text without what would steer the terminal, cut where it is too long."""
    plain = text_of(text)
    cut = plain if len(plain) <= LONGEST else f"{plain[:LONGEST]} ... ({len(plain) - LONGEST} more characters)"
    return "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in cut)


def _say(console: Console, words: str) -> None:
    console.print(words, markup=False, highlight=False, soft_wrap=True)
