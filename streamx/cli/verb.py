"""What a verb of the command line is, and how its options follow from ``streamx/config/``."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

Result = dict[str, Any]
METAVARS: dict[type, str] = {int: "N", float: "X", str: "TEXT"}


def _succeeded(result: Result) -> int:
    return 0


@dataclass(frozen=True)
class Verb:
    """One verb: its words in ``--help``, its arguments, what it runs, how the result reads on a terminal."""

    name: str
    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result]
    show: Callable[[Result], str] | None = None  # None: names and values in two columns
    exit_code: Callable[[Result], int] = _succeeded
    aliases: tuple[str, ...] = ()
    measured: bool = False  # add `seconds` and `peak_rss_bytes` to the result
    talks: bool = False  # prints on stdout while it runs (never with --json)


def value_type(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether there are many: ``tuple[str, ...]`` -> (str, True)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def default_text(setting: Field[Any]) -> str:
    value = setting.default
    if value is None or value is False or value is MISSING:
        return ""
    if isinstance(value, tuple):
        value = " ".join(str(item) if item else "''" for item in value)
    return f" (default: {value})"


def add_settings(
    parser: argparse._ActionsContainer,
    config: type,
    skip: tuple[str, ...] = (),
    defaults: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """One option per field of a config class; what is not given stays absent: the library's default holds.

    A field that is False by default is a flag; one that is True is switched off by ``--no-<name>``.
    ``defaults``: what the help says of them instead, by name.
    """
    hints = typing.get_type_hints(config)
    for setting in fields(config):
        if setting.name in skip:
            continue
        kind, many = value_type(hints[setting.name])
        words = setting.name.replace("_", "-")
        help = setting.metadata["help"].replace("%", "%%")
        common: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS}
        if kind is bool and setting.name in defaults:  # on for one model, off for another
            both = argparse.BooleanOptionalAction
            parser.add_argument(f"--{words}", action=both, help=help + defaults[setting.name], **common)
        elif kind is bool and setting.default is True:
            parser.add_argument(f"--no-{words}", action="store_false", help=f"switch off: {help}", **common)
        elif kind is bool:
            parser.add_argument(f"--{words}", action="store_true", help=help, **common)
        else:
            parser.add_argument(
                f"--{words}",
                type=kind,
                nargs="+" if many else None,
                choices=setting.metadata.get("choices"),
                metavar=None if setting.metadata.get("choices") else METAVARS[kind],
                help=help + defaults.get(setting.name, default_text(setting)),
                **common,
            )


def add_dask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="work on a dask cluster, which sees the same files: tcp://host:8786, or local:N to start one",
    )


def add_networks(parser: argparse.ArgumentParser, networks: Mapping[str, type]) -> None:
    """One option per setting of any network; of those that several have, in the group of the first.

    Where their defaults differ, the help says each.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, config in networks.items():
        for setting in fields(config):
            found.setdefault(setting.name, {})[name] = setting.default
    differ = {
        option: f" (default: {', '.join(f'{name} {value}' for name, value in values.items())})"
        for option, values in found.items()
        if len(set(values.values())) > 1
    }
    for name, config in networks.items():
        others = tuple(option for option, values in found.items() if next(iter(values)) != name)
        if len(others) < len(found):
            add_settings(parser.add_argument_group(f"network of {name}"), config, others, differ)


def given(args: argparse.Namespace, *configs: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of these config classes that the command line named."""
    names = [s.name for config in configs for s in fields(config) if s.name not in skip]
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
