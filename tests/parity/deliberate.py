"""Cases that record a defect of the reference, which the project repairs, or an interface that it shaped otherwise.

Keys are beginnings of case names. A listed case is expected to fail; when it passes, its entry is out of date.
"""

DELIBERATE: dict[str, str] = {}


def reason_for(name: str) -> str | None:
    """Say why a case is not met on purpose, or None."""
    return next((reason for prefix, reason in DELIBERATE.items() if name.startswith(prefix)), None)
