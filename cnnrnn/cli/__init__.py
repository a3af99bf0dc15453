"""The `cnnrnn` command: train, compare, evaluate, predict, suggest, export, data check and others.

Options are made from the config dataclasses. Every command takes `--config FILE.yaml` with
overrides on the command line; dashes and underscores in option names mean the same.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cnnrnn.cli.commands import RUN
from cnnrnn.cli.options import RECIPES, make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    words = _underscored(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser("ours")
    # --print_config ends the parse: it must wait until the preset is known.
    quiet = [word for word in words if not word.startswith("--print_config")]
    options = _parsed(parser, quiet)
    command = options.command
    if command is None:
        parser.print_help()
        return 0
    if command in RECIPES and options[command].preset == "paper":  # named here or in a config file
        parser = make_parser("paper")
    options = _parsed(parser, words)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = RUN[command](options[command])
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader of our output has ended, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("cnnrnn: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if not _is_meant_for_people(error):
            raise
        from cnnrnn.machine.distributed import process_prefix

        print(f"cnnrnn: error: {process_prefix()}{error}", file=sys.stderr)
        return 1


def _parsed(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Return the options; exit with a message where they are wrong."""
    try:
        return parser.parse_args(words)
    except UnicodeDecodeError as error:  # of a file of options for a part, such as `--model FILE`
        parser.error(f"files of options must be UTF-8, got byte 0x{error.object[error.start]:02x}")


def _is_meant_for_people(error: Exception) -> bool:
    """Tell our errors from torch's: those are bugs or out of memory, and keep their traceback."""
    from cnnrnn.export import ProviderError
    from cnnrnn.machine.distributed import LostProcessError
    from cnnrnn.training.loop import NonFiniteLossError

    ours = (NonFiniteLossError, LostProcessError, ProviderError)
    return not isinstance(error, RuntimeError) or isinstance(error, ours)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    from cnnrnn.data.images import BadImageWarning
    from cnnrnn.machine.distributed import process_prefix

    if process_prefix() and not issubclass(category, BadImageWarning):
        return  # the first process says it
    print(f"cnnrnn: warning: {process_prefix()}{message}", file=sys.stderr)


def _underscored(words: Sequence[str]) -> list[str]:
    """Write option names with underscores; what follows a bare `--` is left as it is."""
    result = list(words)
    for position, word in enumerate(result):
        if word == "--":
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            result[position] = f"--{name[2:].replace('-', '_')}{equals}{value}"
    return result
