"""Exceptions for mistakes of the user; a leaf module that every layer may import."""


class UserError(Exception):
    """Report a mistake of the user in one line that names the place and the remedy.

    The command line prints the message without a traceback and exits with status 1.
    """


class ConfigError(UserError):
    """Report a mistake in a configuration as `FILE: dotted.path: problem`; file and path may be unknown (empty)."""

    def __init__(self, problem: str, path: str = "", source: str = "") -> None:
        self.problem, self.path, self.source = problem, path, source
        super().__init__(": ".join(part for part in (source, path, problem) if part))
