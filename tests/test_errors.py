"""Text from files in messages: on one line, without control characters, no longer than its limit."""

import pytest

from ldm.errors import shown

HOSTILE = ["a\nb", "\x1b[1mbold", "\u202eright to left", "\udc80", "\x00", "n" * 1_000_000, "\x07" * 500, "\u2028"]


@pytest.mark.parametrize("limit", [8, 9, 60, 300])
@pytest.mark.parametrize("text", HOSTILE)
def test_is_printable_and_short(text: str, limit: int) -> None:
    written = shown(text, limit)
    assert written.isprintable() and 0 < len(written) <= limit


def test_plain_text_stays_as_it_is() -> None:
    assert shown("model.params.größe 模型") == "model.params.größe 模型"


def test_both_ends_of_a_long_name_are_kept() -> None:
    assert shown("first" + "x" * 100 + "last", limit=20) == "firstxxxx...xxxxlast"
