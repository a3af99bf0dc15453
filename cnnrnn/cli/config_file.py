"""Options from files: YAML whose size says what it takes to read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, get_loader, set_loader  # type: ignore[attr-defined]

from cnnrnn.data.dataset import DataError
from cnnrnn.data.files import read_text, reason

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 20

_load = get_loader("yaml")


def load_plain(text: str) -> Any:
    """Load YAML without aliases, as jsonargparse does.

    An alias stands for all that it names, which may have aliases again: a few lines of them make
    more than any memory holds.

    Raises:
        YAMLError: it is no YAML, has an alias, or is too long or too deep.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"options must have at most {MAX_CHARACTERS:,} characters, got more")
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1
            raise yaml.YAMLError(
                f"options must be without aliases, got *{event.anchor}, line {line}"
            )
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"options must be nested at most {MAX_DEPTH} deep, got more")
    return _load(text)


set_loader("yaml", load_plain, (yaml.YAMLError,))


class ConfigFile(ActionConfigFile):
    """`--config`: checked before jsonargparse reads it, which it does twice."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Read the options of a file; `values` is its name, or YAML itself."""
        if os.path.exists(values):
            _require_options(Path(values))
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]


def _require_options(file: Path) -> None:
    """Raise a TypeError, which jsonargparse prints, where a file is not one of options."""
    if file.is_file() and file.stat().st_size > 4 * MAX_CHARACTERS:
        raise TypeError(f"{file} must have at most {MAX_CHARACTERS:,} characters, got more")
    try:
        options = load_plain(read_text(file, "utf-8"))
    except DataError as error:
        raise TypeError(str(error)) from error
    except yaml.YAMLError as error:
        raise TypeError(f"{file} must hold options as YAML or JSON: {reason(error)}") from error
    if not isinstance(options, dict):
        raise TypeError(f"{file} must hold options, each with its name, found none")
