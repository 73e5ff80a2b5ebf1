"""`steelyard data inspect | check | convert | generate | concentrability | pool`: look at data, judge it, make some."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from steelyard.data.binary import BinaryEpisodes
from steelyard.data.doctor import Report, diagnose
from steelyard.data.episode import ArraySpec, Episode, Spec
from steelyard.data.formats import FORMATS, detect, episodes_from, open_dataset, write_dataset
from steelyard.data.store import Store
from steelyard.errors import ConfigError, DataError, SteelyardError

if TYPE_CHECKING:
    from steelyard.data.text_doctor import TextReport

FormatName = Literal["auto", "steelyard", "minari", "flat", "robomimic"]
Target = Literal["steelyard", "minari", "flat", "robomimic"]
MEMORY_LIMIT = 512 * 2**20  # larger sources go through a temporary native store instead of memory
Generator = tuple[type[Any], Callable[[Any], Iterable[Episode]], Callable[[Any], Spec]]
"""Config class of a kind of data, the episodes that a config makes, and their spec."""
PLAIN_INTERVAL = 5.0  # seconds between progress lines without a terminal

USAGE = """usage: steelyard data COMMAND ...

commands:
  inspect PATH            spec, counts, returns, hash and an excerpt of one episode
  check PATH              the data doctor, for episodes and for text (prompts, completions, preferences);
                          exit 0 without faults, 1 with faults, 2 if unreadable
  convert SRC DST --to F  write SRC in another format
  generate KIND OUT       make data with a scripted behaviour (KIND: point_maze, ant_maze, ogbench,
                          adroit_door, grid, atari)
  concentrability PATH    how unevenly the data constrain a policy (--policy RUN)
  pairs                   sample from a language model, score, pair, and write preference data
  pool                    sample pools: build them, import them, describe them

`steelyard data COMMAND --help` lists the options. Formats: {formats}
"""


@dataclass(frozen=True)
class ReadOptions:
    """What some formats need to be told."""

    dialect: Literal["auto", "d4rl", "ogbench"] | None = None
    """flat: what `terminals` means; "auto" decides where the arrays leave no doubt."""
    missing_rewards: Literal["error", "zero", "final"] | None = None
    """flat, robomimic: rewards of a file without any: "zero", or "final" (1 at the last step of each episode)."""
    dones: Literal["terminated", "truncated"] | None = None
    """robomimic: meaning of the flag at a demonstration's last step."""
    mask: str | None = None
    """robomimic: read only the demonstrations in this mask."""
    observation_keys: tuple[str, ...] | None = None
    """minari, robomimic: observation arrays to read; all by default."""

    def given(self) -> dict[str, Any]:
        """Return the options that were set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Inspect:
    """Show what a data set holds."""

    path: tyro.conf.Positional[Path]
    """File or directory."""
    format: FormatName = "auto"
    """Format of the data set."""
    episode: int = 0
    """Episode to show an excerpt of."""
    options: ReadOptions = field(default_factory=ReadOptions)


@dataclass(frozen=True)
class TextOptions:
    """Prompts, completions and preferences (.jsonl, .jsonl.gz, .json, .parquet, folders of them, `datasets`)."""

    tokenizer: str = "byte"
    """text: what lengths and masks are judged by: "byte", "smollm2", a folder, a *.gguf file or a name on the hub."""
    context: int | None = None
    """text: tokens of a prompt and a completion together; longer rows are findings."""
    held_out: Path | None = None
    """text: second file whose prompts must not be among the first's."""
    kind: Literal["preference", "unpaired", "completion", "prompt", "text"] | None = None
    """text: kind of the rows; the columns of the first row decide by default."""
    split: str = "train"
    """text: which split of a `datasets` folder or name."""


@dataclass(frozen=True)
class Check:
    """Examine a data set; exit status 0 without faults, 1 with faults, 2 if it cannot be read."""

    path: tyro.conf.Positional[Path]
    """File or directory; a name on the hub with --format text."""
    format: FormatName | Literal["text"] = "auto"
    """Format of the data set."""
    json: bool = False
    """Print the report as JSON."""
    low: float | None = None
    """Lower bound of every action, where the data set states none (with `high`)."""
    high: float | None = None
    """Upper bound of every action."""
    options: ReadOptions = field(default_factory=ReadOptions)
    text: TextOptions = field(default_factory=TextOptions)


@dataclass(frozen=True)
class Convert:
    """Write a data set in another format."""

    src: tyro.conf.Positional[Path]
    """File or directory to read."""
    dst: tyro.conf.Positional[Path]
    """What to write; must not exist. The suffix .npz or .hdf5 chooses the kind of a flat file."""
    to: Target
    """Format to write."""
    from_: Annotated[FormatName, tyro.conf.arg(name="from")] = "auto"
    """Format of SRC."""
    success_reward: float | None = None
    """Rewrite for a binary task: a step with at least this raw reward is a success. Rewards become 0 there and -1
    elsewhere; episodes without success are left out, others end, terminated, with their last success."""
    options: ReadOptions = field(default_factory=ReadOptions)


def main(argv: list[str]) -> int:
    """Run `steelyard data` with the arguments after it and return the exit status.

    A `SteelyardError` is printed as its one sentence on stderr and gives 2, like a mistake on the command line.
    """
    commands: dict[str, Callable[[list[str]], int]] = {
        "inspect": inspect, "check": check, "convert": convert, "generate": generate,
        "concentrability": _concentrability, "pairs": _pairs, "pool": _pool,
    }  # fmt: skip
    if not argv or argv[0] not in commands:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        print(USAGE.format(formats=", ".join(FORMATS)), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        return commands[argv[0]](argv[1:])
    except SteelyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # tyro's: 0 after --help, 2 after a mistake
        return stop.code if isinstance(stop.code, int) else 2


ArgsT = TypeVar("ArgsT")


def _parse(cls: type[ArgsT], name: str, argv: list[str]) -> ArgsT:
    return tyro.cli(cls, prog=f"steelyard data {name}", args=argv, config=(tyro.conf.OmitArgPrefixes,))


@contextmanager
def opened(path: Path, format_name: str, options: ReadOptions) -> Iterator[Store]:
    """Open any data set as a store; a large foreign one through a temporary native store."""
    name = detect(path) if format_name == "auto" else format_name
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    if name == "steelyard" or sum(file.stat().st_size for file in files) <= MEMORY_LIMIT:
        yield open_dataset(path, name, **options.given())
        return
    with tempfile.TemporaryDirectory(prefix="steelyard-") as folder:
        yield open_dataset(path, name, cache=Path(folder) / "store", **options.given())


def inspect(argv: list[str]) -> int:
    """Print spec, counts, distributions, hash and an excerpt."""
    args = _parse(Inspect, "inspect", argv)
    console = Console()
    with opened(args.path, args.format, args.options) as store:
        if not 0 <= args.episode < store.num_episodes:
            raise DataError(f"{args.path}: no episode {args.episode}; it holds episodes 0..{store.num_episodes - 1}")
        table = Table("array", "shape of a step", "type", "bounds", "names", box=None)
        for key, item in store.spec.observations.items():
            table.add_row(f"observations {key!r}", *_described(item))
        table.add_row("actions", *_described(store.spec.actions))
        console.print(table)
        if store.spec.num_actions is not None:
            console.print(f"discrete actions: {store.spec.num_actions}")
        meaning = {key: value for key, value in dataclasses.asdict(store.spec.meaning).items() if value is not None}
        if meaning:
            console.print("action meaning: " + ", ".join(f"{key} {value}" for key, value in meaning.items()))
        console.print(f"episodes: {store.num_episodes} ({int(store.terminated.sum())} terminated, "
                      f"{int(store.truncated.sum())} truncated), steps: {store.num_steps}")  # fmt: skip
        for name, values in (("lengths", store.lengths), ("returns", store.episode_returns())):
            quantiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
            console.print(f"{name}: minimum, quartiles, maximum = " + ", ".join(f"{x:.6g}" for x in quantiles))
        console.print(f"content hash: {store.content_hash}")
        for note in store.notes:
            console.print(f"note: {note}", markup=False)
        _excerpt(console, store.episode(args.episode), args.episode)
    return 0


def _described(item: ArraySpec) -> tuple[str, str, str, str]:
    bounds = "not stated"
    if item.low is not None and item.high is not None:
        bounds = f"{min(item.low):g} to {max(item.high):g}"
    return str(item.shape), item.dtype, bounds, ", ".join(item.names or ())[:60]


def _excerpt(console: Console, episode: Episode, number: int) -> None:
    words = f", instruction {episode.instruction!r}" if episode.instruction else ""
    console.print(f"episode {number} ({episode.provenance or 'no provenance'}{words}): {len(episode)} steps, "
                  f"terminated {episode.terminated}, truncated {episode.truncated}", markup=False)  # fmt: skip
    with np.printoptions(precision=3, suppress=True, threshold=8, edgeitems=3, linewidth=200):
        for t in sorted({0, 1, len(episode) - 1} & set(range(len(episode)))):
            seen = ", ".join(f"{key} {values[t].ravel()}" for key, values in episode.observation_dict.items())
            console.print(f"  step {t}: {seen}; action {episode.actions[t]}; reward {episode.rewards[t]:g}",
                          markup=False, highlight=False)  # fmt: skip


def check(argv: list[str]) -> int:
    """Run the doctor; 1 if it finds faults."""
    args = _parse(Check, "check", argv)
    report: Report | TextReport
    if args.format == "text" or (args.format == "auto" and _is_text(args.path)):
        report = _text_report(args.path, args.text)
    else:
        with opened(args.path, args.format, args.options) as store:
            report = diagnose(store, _bounds(args, store))
    if args.json:
        print(report.to_json())
    else:
        report.print()
    return 1 if report.faults else 0


def _is_text(path: Path) -> bool:
    if path.is_dir() and any(item.detect(path) for item in FORMATS.values()):
        return False
    if not path.is_dir() and path.suffix not in (".jsonl", ".json", ".parquet", ".gz"):
        return False
    from steelyard.data.preferences import is_text_data  # loads torch

    return is_text_data(path)


def _text_report(path: Path, options: TextOptions) -> TextReport:
    from steelyard.data.preferences import read_text_data
    from steelyard.data.text_doctor import diagnose_text
    from steelyard.data.tokenizer import load_tokenizer

    unreadable: list[DataError] = []
    data = read_text_data(path, options.kind, options.split, on_error=unreadable.append)
    held_out = None if options.held_out is None else read_text_data(options.held_out, options.kind, options.split)
    return diagnose_text(data, load_tokenizer(options.tokenizer), options.context, held_out, unreadable)


def _bounds(args: Check, store: Store) -> ArraySpec | None:
    if args.low is None and args.high is None:
        return None
    if args.low is None or args.high is None or not args.low < args.high:
        raise ConfigError(f"--low and --high must be given together with low < high, found {args.low} and {args.high}")
    size = int(np.prod(store.spec.actions.shape))
    return dataclasses.replace(store.spec.actions, low=(args.low,) * size, high=(args.high,) * size)


def convert(argv: list[str]) -> int:
    """Read one format and write another."""
    args = _parse(Convert, "convert", argv)
    if args.dst.exists():
        raise DataError(f"{args.dst}: already exists; choose another path or remove it")
    name = detect(args.src) if args.from_ == "auto" else args.from_
    source = episodes_from(args.src, name, **args.options.given())
    notes = source.notes
    episodes: Iterable[Episode] = source
    if args.success_reward is not None:
        episodes = binary = BinaryEpisodes(source, args.success_reward)
        notes = binary.notes  # the source's speak of episodes that may be gone
    if args.to == "steelyard":
        store = Store.from_episodes(counted(episodes, "read"), args.dst, spec=source.spec, notes=notes)
    else:
        args.dst.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".steelyard-", dir=args.dst.parent) as folder:
            cache = Path(folder) / "store"  # writers need the totals first; on disk, so that memory stays bounded
            store = Store.from_episodes(counted(episodes, "read"), cache, spec=source.spec, notes=notes)
            write_dataset(store, args.dst, args.to)
    for note in store.notes:
        print(f"note: {note}")
    print(
        f"wrote {args.dst}: {store.num_episodes} episodes, {store.num_steps} steps, content hash {store.content_hash}"
    )
    return 0


def _concentrability(argv: list[str]) -> int:
    from steelyard.cli.concentrability import concentrability  # loads torch

    return concentrability(argv)


def _pairs(argv: list[str]) -> int:
    from steelyard.cli.pairs import pairs  # loads torch

    return pairs(argv)


def _pool(argv: list[str]) -> int:
    from steelyard.cli.sample_pool import pool  # loads torch

    return pool(argv)


def _point_maze() -> Generator:
    from steelyard.envs import behaviours

    return (
        behaviours.PointMazeDataConfig,
        behaviours.generate_point_maze,
        lambda config: behaviours.point_maze_spec(config.size),
    )


def _grid() -> Generator:
    from steelyard.envs import grid

    return grid.GridDataConfig, grid.generate_grid, lambda config: grid.grid_spec()


def _atari() -> Generator:
    from steelyard.envs import atari

    return atari.AtariDataConfig, atari.generate_atari, lambda config: atari.atari_spec(config.game)


def _ant_maze() -> Generator:
    from steelyard.envs import ant_maze

    return ant_maze.AntMazeDataConfig, ant_maze.generate_ant_maze, lambda config: ant_maze.ant_maze_spec(config.size)


def _ogbench() -> Generator:
    from steelyard.envs import ogbench

    return ogbench.OGBenchDataConfig, ogbench.generate_ogbench, lambda config: ogbench.ogbench_spec(config.task)


def _adroit_door() -> Generator:
    from steelyard.envs import adroit

    return adroit.AdroitDoorDataConfig, adroit.generate_adroit_door, lambda config: adroit.adroit_door_spec()


# the simulators are extras: imported for the kind that is asked for
GENERATORS: dict[str, Callable[[], Generator]] = {
    "point_maze": _point_maze,
    "ant_maze": _ant_maze,
    "ogbench": _ogbench,
    "adroit_door": _adroit_door,
    "grid": _grid,
    "atari": _atari,
}


def generate(argv: list[str]) -> int:
    """Make data with a scripted behaviour policy."""
    if not argv or argv[0] in ("-h", "--help"):
        kinds = "|".join(GENERATORS)
        print(f"usage: steelyard data generate {kinds} OUT [OPTIONS]; OUT is written as a native store")
        return 0 if argv else 2
    if argv[0] not in GENERATORS:
        raise ConfigError(f"unknown kind of data {argv[0]!r}, expected {', '.join(map(repr, GENERATORS))}")
    config_class, episodes_of, spec_of = GENERATORS[argv[0]]()
    arguments = dataclasses.make_dataclass(
        "Generate",
        [
            ("out", tyro.conf.Positional[Path]),
            ("config", config_class, field(default_factory=config_class)),
        ],
    )
    args: Any = _parse(arguments, f"generate {argv[0]}", argv[1:])
    episodes = episodes_of(args.config)
    notes: list[str] = getattr(episodes, "notes", [])  # how the behaviour did: written after the last episode
    store = Store.from_episodes(counted(episodes, "made"), args.out, spec=spec_of(args.config), notes=notes)
    for note in store.notes:
        print(f"note: {note}")
    print(
        f"wrote {args.out}: {store.num_episodes} episodes, {store.num_steps} steps, content hash {store.content_hash}"
    )
    return 0


def counted(episodes: Iterator[Episode] | Any, verb: str) -> Iterator[Episode]:
    """Pass episodes on and show progress: a live line on a terminal, else a plain line every few seconds."""
    console = Console(stderr=True)
    steps = number = 0
    if not console.is_terminal:
        last = time.monotonic()
        for number, episode in enumerate(episodes, 1):
            steps += len(episode)
            if time.monotonic() - last > PLAIN_INTERVAL:
                last = time.monotonic()
                print(f"{verb} {number} episodes, {steps} steps", file=sys.stderr, flush=True)
            yield episode
        return
    layout = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*layout, console=console) as progress:
        task = progress.add_task(f"{verb} 0 episodes", total=None)
        for number, episode in enumerate(episodes, 1):
            steps += len(episode)
            progress.update(task, description=f"{verb} {number} episodes, {steps} steps")
            yield episode
        progress.update(task, total=1, completed=1)
