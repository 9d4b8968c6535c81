"""The errors a user can cause: one line each, with an exit code."""

from __future__ import annotations


class UserError(Exception):
    """Something a user can put right: what is wrong and where, and what to do about it.

    Attributes:
        exit_code: what the command line exits with.
    """

    exit_code = 1

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = visible(problem)
        self.fix = visible(fix)
        super().__init__(f"{self.problem}: {self.fix}" if fix else self.problem)


class UsageError(UserError):
    """A flag, a configuration key or a value that the command cannot accept."""

    exit_code = 2


class LeakError(UserError):
    """An audit found that the requested split leaks."""

    exit_code = 3


class WriteError(UserError):
    """The system does not let a file be written.

    Attributes:
        read_only: whether it is not to be written at all, rather than that there is no room or a device fails.
    """

    def __init__(self, problem: str, fix: str = "", *, read_only: bool = False) -> None:
        super().__init__(problem, fix)
        self.read_only = read_only


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM) as politely as by Ctrl-C.

    Attributes:
        exit_code: what a shell says of a process that the signal ended.
    """

    exit_code = 143


def first_line(error: Exception, limit: int | None = None) -> str:
    """Return the first line of what an error says, cut to ``limit`` characters; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:limit]


def visible(text: str) -> str:
    """Return text on one line, with escapes for what a terminal would obey instead of show.

    File names may hold line ends, control sequences, marks that reverse the direction of writing, and bytes that are no
    UTF-8 (which Python keeps as surrogates).
    """
    return text if text.isprintable() else "".join(map(_visible_sign, text))


def _visible_sign(sign: str) -> str:
    return sign if sign.isprintable() else sign.encode("unicode_escape").decode()
