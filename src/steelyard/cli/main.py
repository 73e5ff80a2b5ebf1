"""The command `steelyard`. Each subcommand is a module with `main(argv) -> exit status`, imported when it is used."""

from __future__ import annotations

import importlib
import os
import sys

COMMANDS = {
    "run": "reproduce a published system: prior data, pre-training, fine-tuning, report (steelyard run cal_ql)",
    "bench": "run a suite of cases and seeds: rows, table with intervals, report (steelyard bench offline_to_online)",
    "train": "pre-train (and fine-tune) on your data and environment; steelyard train preference for language models",
    "finetune": "continue a trained policy online",
    "adapt": "adapt with very little: a few labels (hyre), a few samples a prompt (best_of_n)",
    "serve": "answer HTTP requests: rewards (reward), a language model in OpenAI's form (lm)",
    "eval": "evaluate a policy, a reward model, or one text policy against another, with intervals",
    "export": "write a policy as ONNX with a spec and a model card",
    "data": "inspect, check, convert or generate prior data; make preference pairs",
    "advise": "which preference method fits your model, data and reward, and why",
    "report": "write the HTML and Markdown report of runs",
    "config": "show or compare configs",
    "info": "print versions, threads and hardware",
}

USAGE = """usage: steelyard COMMAND [OPTIONS]

Turn broad prior data into values, then adapt them with very little.

commands:
"""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; return the exit status (0 fine, 1 faults found, 2 error, 130 interrupted)."""
    # before torch is imported: threads that spin while they wait slow two processes on one machine down 100-fold
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE + "\n".join(f"  {name:9s} {text}" for name, text in COMMANDS.items()))
        print("\nsteelyard COMMAND --help describes one; steelyard --version prints the version.")
        return 0
    if arguments[0] == "--version":
        import steelyard

        print(steelyard.__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    from steelyard.errors import SteelyardError, near

    if name not in COMMANDS:
        print(f"steelyard: unknown command {name!r}; {near(name, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        status: int = importlib.import_module(f"steelyard.cli.{name}").main(rest)
    except SteelyardError as error:
        print(f"steelyard {name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, as with `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"steelyard {name}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"steelyard {name}: stopped", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
