"""``streamx``: parse, run one verb, print its result; every error in words, with an exit code for its kind.

Exit codes: 0 ok, 1 internal, 2 usage, 3 bad input, 4 partial, 5 storage, 6 integrity, 7 resources, 130 and
143 interrupted. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, TextIO

from streamx import __version__
from streamx.cli import (
    activity,
    annotate,
    convert,
    demo,
    export,
    fetch,
    info,
    integrate,
    map,
    metrics,
    plot,
    preprocess,
    project,
    publish,
    report,
    simulate,
    status,
    surgery,
    train,
    transfer,
    verify,
)
from streamx.cli.show import as_json, columns
from streamx.cli.verb import Result, Verb
from streamx.errors import StreamxWarning, named
from streamx.memory import peak_rss_bytes

VERBS: tuple[Verb, ...] = tuple(
    module.VERB
    for module in (
        convert,
        info,
        verify,
        annotate,
        activity,
        preprocess,
        train,
        project,
        surgery,
        transfer,
        metrics,
        plot,
        map,
        status,
        export,
        report,
        integrate,
        publish,
        fetch,
        simulate,
        demo,
    )
)

EPILOG = """\
the whole way, from files to labels:
  streamx convert a.h5ad b.h5ad c.h5ad -o atlas
  streamx preprocess atlas -o view
  streamx train view -o model
  streamx project model new.h5ad -o mapped
  streamx transfer model mapped --label-key cell_type
  streamx metrics model mapped --label-key cell_type
  streamx plot model mapped -o figures --color batch cell_type

Any of these places, and any input file, may be in a bucket: s3://bucket/prefix, gs://..., az://... (needs
pip install 'streamx[cloud]'). The environment says how to reach it:
  AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION; AWS_ENDPOINT_URL for a service that
  is not Amazon's; AWS_SKIP_SIGNATURE=true for a public bucket
  GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SKIP_SIGNATURE; AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY
  STREAMX_SCRATCH: a folder with room for what is being converted (default: ~/.cache/streamx)

`streamx demo` runs it on real cells in under two minutes.
"""


class Terminated(BaseException):
    """SIGTERM, raised where the work stands, so that files are closed and the work can be taken up again."""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 30, **kwargs})


class Parser(argparse.ArgumentParser):
    """Options in full only (no abbreviations), examples printed as they are written.

    An error shows what has to be given, not every option there is, and what a misspelt word may have meant.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Help)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:  # here the verb's own options are known; argparse leaves it to the parser of all verbs
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        needed = [action for action in self._actions if action.required or not action.option_strings]
        usage = self._get_formatter()
        usage.add_usage(None, needed, [])
        text = " ".join(usage.format_help().split()) + " [options]"
        close = _closest(message, list(self._option_string_actions))
        fix = f"did you mean {close}? " if close else ""
        self.exit(2, f"{text}\n{self.prog}: {message}\n  fix: {fix}{self.prog} --help\n")


def _closest(message: str, options: Sequence[str]) -> str | None:
    """The option or choice that a misspelt one resembles most, if any does."""
    choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
    if choice:
        word, known = choice[1], [name.strip("'") for name in choice[2].split(", ")]
    else:
        words = re.findall(r"(?<!\S)--[\w-]+", message) if message.startswith("unrecognized") else []
        word, known = (words[0].replace("_", "-") if words else ""), list(options)
    longer = [name for name in known if word and name.startswith(word)]
    by_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(by_case), n=1, cutoff=0.7)
    return longer[0] if longer else by_case[near[0]] if near else None


def make_parser() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    shared.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print one JSON object on stdout and nothing else",
    )
    shared.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = Parser(
        prog="streamx",
        description="Integrate and map single-cell atlases that don't fit in memory.",
        epilog=EPILOG,
        parents=[shared],
    )
    parser.add_argument("--version", action="version", version=f"streamx {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for verb in VERBS:
        sub = verbs.add_parser(
            verb.name,
            aliases=list(verb.aliases),
            help=verb.help,
            description=verb.help[0].upper() + verb.help[1:] + ".",
            epilog=f"example:\n{verb.example}",
            parents=[shared],
        )
        verb.add_arguments(sub)
        sub.set_defaults(chosen=verb)
    return parser


def run_verb(verb: Verb, args: argparse.Namespace) -> Result:
    """The verb's result; whatever a library prints meanwhile goes to stderr."""
    start = time.perf_counter()
    talks = verb.talks and not getattr(args, "json", False)
    with contextlib.nullcontext() if talks else contextlib.redirect_stdout(sys.stderr):
        result = verb.run(args)
    if verb.measured:
        result["seconds"] = round(time.perf_counter() - start, 3)
        result["peak_rss_bytes"] = peak_rss_bytes()
    return result


def invoke(argv: Sequence[str]) -> Result:
    """Run one command line from Python and return its result; errors are raised, nothing is printed."""
    args = make_parser().parse_args(argv)
    return run_verb(args.chosen, args)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, StreamxWarning):
        print(f"warning: {message}", file=sys.stderr)
    elif not issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
        print(f"warning: {message} ({category.__name__}, {os.path.basename(filename)})", file=sys.stderr)


@contextlib.contextmanager
def _terminal(debug: bool, script: bool) -> Iterator[None]:
    """Warnings and logs in the shape of our errors, and SIGTERM as an exception, as long as a verb runs.

    A `script` that Ctrl-C has ended is deaf to a second one: it would end in a traceback.
    """
    logger = logging.getLogger("streamx")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, main_thread = logger.level, threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _on_sigterm) if main_thread else None
    with warnings.catch_warnings():
        warnings.simplefilter("always", StreamxWarning)
        if not debug:
            warnings.showwarning = _show_warning
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if debug else logging.INFO)
        try:
            yield
        except KeyboardInterrupt:
            if script:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            if main_thread:
                signal.signal(signal.SIGTERM, previous)


def _report(error: BaseException, args: argparse.Namespace) -> int:
    if getattr(args, "debug", False):
        traceback.print_exception(error, file=sys.stderr)
    ours = named(error)
    print(f"streamx {args.verb}: {ours}", file=sys.stderr)
    if getattr(args, "json", False):
        record = {"error": ours.what, "kind": type(ours).__name__, "where": ours.where, "fix": ours.fix}
        print(as_json({**record, "exit_code": ours.exit_code}))
    return ours.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script: the exit code."""
    args = make_parser().parse_args(argv)
    verb: Verb = args.chosen
    try:
        with _terminal(getattr(args, "debug", False), script=argv is None):
            result = run_verb(verb, args)
        if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started, one speaks
            return verb.exit_code(result)
        if getattr(args, "json", False):
            print(as_json(result), flush=True)
        else:
            print((verb.show or columns)(result), flush=True)
        return verb.exit_code(result)
    except (KeyboardInterrupt, Terminated) as stopped:
        print(f"\nstreamx {args.verb}: stopped; the same command takes it up again", file=sys.stderr)
        return 130 if isinstance(stopped, KeyboardInterrupt) else 143
    except BrokenPipeError:  # `streamx info store | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _report(error, args)


if __name__ == "__main__":
    sys.exit(main())
