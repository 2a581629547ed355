"""P5: whether this machine's clock is plausible, and agrees with the others'."""
from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pyfleet.checks.base import OK, SKIPPED, WARN, Finding, Subject
from pyfleet.identity.keys import short_id

SLACK_S = 86_400                # time zones and copies of files
LARGEST_SKEW_S = 1.0            # logs of several machines cannot be put in order beyond that
ADVICE = "let NTP set it (timedatectl set-ntp true; on macOS sntp -sS time.apple.com). Deadlines do not depend on it, logs do"


def check(subject: Subject) -> Iterator[Finding]:
    """The clock against the time of installation, then against those of peers."""
    now, installed = time.time(), Path(__file__).stat().st_mtime
    seen = f"it is {datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC"
    if now < installed - SLACK_S:
        since = datetime.fromtimestamp(installed, UTC)
        yield Finding("clock", WARN, f"{seen}, before pyfleet was installed ({since:%Y-%m-%d})", ADVICE)
    else:
        yield Finding("clock", OK, seen)
    if subject.skews_s is None:
        yield Finding("clock of others", SKIPPED, "no peer was asked")
    elif far := {peer: skew for peer, skew in subject.skews_s.items() if abs(skew) > LARGEST_SKEW_S}:
        told = ", ".join(f"{short_id(peer)} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
                         for peer, skew in far.items())
        yield Finding("clock of others", WARN, told, ADVICE)
    else:
        most = max(map(abs, subject.skews_s.values()), default=0.0)
        yield Finding("clock of others", OK, f"{len(subject.skews_s)} peers, at most {most:.2f} s apart")
