"""How a person says yes to a federation's terms: by their hash beforehand, or at a prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from splitfl.console import note
from splitfl.errors import PrivacyError

if TYPE_CHECKING:
    from splitfl.federation.agreement import Terms  # imports torch


class Consent:
    """Shows the federation's terms, and takes a yes from --accept or, on a terminal, from the person."""

    def __init__(self, given: str, *, as_json: bool) -> None:
        self.given = given
        self.as_json = as_json

    def __call__(self, terms: Terms) -> bool:
        """Whether they are accepted. Raises PrivacyError for the hash of other terms."""
        for line in terms.lines():
            note(line)
        if self.given and not terms.named_by(self.given):
            short = terms.short
            raise PrivacyError(
                f"--accept {self.given} is not the hash of these terms ({short}...): they have changed, or it is "
                "mistyped or cut short; nothing computed from your data has left",
                f"Read them above; to accept, add --accept {short}.",
            )
        return bool(self.given) or (not self.as_json and sys.stdin.isatty() and asked())


def asked() -> bool:
    """The person's answer on the terminal; anything but yes, and no answer, is no."""
    sys.stderr.write("Do you accept these terms? [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer:
        note("")  # Ctrl-D leaves the question's line open
    return answer.strip().lower() in ("y", "yes")
