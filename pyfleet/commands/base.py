"""The contract of a command: `main(argv, prog) -> exit code`, and how it says that it was called wrongly."""
from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from pyfleet.config import nearest

USAGE_ERROR = 2


class Refused(Exception):
    """The command line makes no sense; the text is one line for the person who wrote it."""


class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error, the nearest option for an unknown one, and --a_b accepted for --a-b."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def add_argument(self, *names, **settings):
        twins = [name.replace("-", "_").replace("__", "--", 1) for name in names if name.startswith("--") and "-" in name[2:]]
        action = super().add_argument(*names, *twins, **settings)
        action.option_strings = [name for name in action.option_strings if name not in twins]     # for --help
        return action

    def error(self, message: str) -> NoReturn:
        raise Refused(message)

    def split(self, argv: list[str]) -> tuple[list[str], list[str]]:
        """The options, and from the first word on that is none (a script, which owns all that follows) the rest."""
        at = 0
        while at < len(argv):
            word, equals, _ = argv[at].partition("=")
            if argv[at] == "--":
                return argv[:at], argv[at + 1:]
            if not word.startswith("-") or word == "-":
                break
            action = self._option_string_actions.get(word)
            if action is None and not word.startswith("--") and word[:2] in self._option_string_actions:
                equals, action = word[2:], self._option_string_actions[word[:2]]     # -n4
            if action is None:
                self.refuse_unknown(word)
            at += 1 if equals or action.nargs == 0 else 2
        return argv[:at], argv[at:]

    def refuse_unknown(self, option: str) -> NoReturn:
        """Say that there is no such option."""
        raise Refused(f"unknown option {option}{nearest(option, self._option_string_actions)}")


def refuse(prog: str, message: object) -> int:
    """Print a one-line error; return the exit code for it."""
    print(f"{prog}: error: {message}", file=sys.stderr)
    return USAGE_ERROR
