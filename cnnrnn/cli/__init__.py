"""The `cnnrnn` command: train, compare, evaluate, predict, suggest, export, data check and others.

Options are made from the config dataclasses. Every command takes `--config FILE.yaml` with
overrides on the command line; dashes and underscores in option names mean the same.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from cnnrnn.cli.commands import RUN
from cnnrnn.cli.options import RECIPES, make_parser
from cnnrnn.cli.output import STANDARD_OUTPUT
from cnnrnn.machine.devices import use_usable_cores
from cnnrnn.machine.files import writing
from cnnrnn.machine.memory import keep_freed_memory


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: as with Ctrl-C, what is half written is removed, and the rest is kept."""


def main(arguments: Sequence[str] | None = None, *, ends_at_once: bool = False) -> int:
    """Run the command line; return the exit status.

    Args:
        arguments: the words; those of the process by default.
        ends_at_once: after Ctrl-C or SIGTERM the process ends here, whatever its threads still
            compute.
    """
    words = _underscored(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _options(words)
    except KeyboardInterrupt:
        print("cnnrnn: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if options is None:
        return 0
    command = options.command
    try:
        with warnings.catch_warnings(), _terminated_like_ctrl_c():
            warnings.showwarning = _show_warning
            status = RUN[command](options[command])
            with writing(STANDARD_OUTPUT):
                sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader of our output has ended, as with `| head`
        _forget_output()
        return 0
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        how = "terminated" if terminated else "interrupted"
        again = "; the same command with --resume goes on" if _can_resume(options) else ""
        print(f"cnnrnn: {how}{again}", file=sys.stderr)
        status = 128 + (signal.SIGTERM if terminated else signal.SIGINT)
        if ends_at_once:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(status)
        return status
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if not _is_meant_for_people(error):
            raise
        from cnnrnn.deployment.labelling import has_parts
        from cnnrnn.machine.distributed import process_prefix

        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            name = "" if error.filename is None else f"{error.filename}: "
            text = f"{name}{error.strerror}"
            if error.filename == STANDARD_OUTPUT:
                _forget_output()
        print(f"cnnrnn: error: {process_prefix()}{text}", file=sys.stderr)
        if command == "predict" and _can_resume(options) and has_parts(Path(options.predict.out)):
            print("cnnrnn: what is labelled is kept: --resume goes on from there", file=sys.stderr)
        return 1


def _options(words: Sequence[str]) -> Namespace | None:
    """Return the options that words name; None, and print the help, where there is no command."""
    parser = make_parser("ours")
    # --print_config ends the parse: it must wait until the preset is known.
    quiet = [word for word in words if not word.startswith("--print_config")]
    options = _parsed(parser, quiet)
    command = options.command
    if command is None:
        parser.print_help()
        return None
    if command in RECIPES and options[command].preset == "paper":  # named here or in a config file
        parser = make_parser("paper")
    return _parsed(parser, words)


def run() -> NoReturn:
    """Run the command line of this process, whose threads and memory are then for it alone."""
    use_usable_cores()
    keep_freed_memory()
    sys.exit(main(ends_at_once=True))


def _can_resume(options: Namespace) -> bool:
    """Tell whether what a command had done when it was stopped is kept."""
    from cnnrnn.deployment.rows import FORMS, form_of

    if options.command == "train":
        return True
    one = options[options.command]
    if options.command != "predict" or one.out is None or one.html is not None:
        return False
    return (one.format or form_of(one.out, default="table")) in FORMS


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in a command that runs alone in its process."""
    from cnnrnn.machine.distributed import started_by_torchrun

    in_main = threading.current_thread() is threading.main_thread()
    # One of several processes must end at once where torchrun stops it: it may wait for the others.
    if not in_main or started_by_torchrun() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _forget_output() -> None:
    """Let what is left to write to standard output vanish: its file takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
