"""Text from files in messages: on one line, without control characters, no longer than its limit."""

import tracemalloc

import numpy as np
import pytest
import torch

from ldm.errors import lack_of_memory, shown

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


def test_a_long_name_costs_no_more_than_a_short_one() -> None:
    tracemalloc.start()
    shown("\x01" * 5_000_000, 300)
    assert tracemalloc.get_traced_memory()[1] < 6_000_000 + 100_000  # the name itself
    tracemalloc.stop()


@pytest.mark.parametrize("allocate", [lambda: np.empty(2**50), lambda: torch.empty(2**50)])
def test_a_lack_of_memory_is_told_in_one_line_with_what_was_asked_for(allocate: object) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    assert any(size in lack_of_memory(caught.value) for size in ("8.00 PiB", str(2**52)))


def test_what_cuda_says_of_it_and_what_is_no_lack_of_memory() -> None:
    said = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.12 GiB"
    assert "2.50 GiB" in lack_of_memory(torch.OutOfMemoryError(said))
    assert lack_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""
