"""Every recorded case, run against the public classes of the project within its recorded tolerance."""

import pytest
import torch

from . import autoencoders, diffusion, functions, layouts, losses, networks, sampling, tiles, training
from .case import Case, compare
from .deliberate import reason_for

ADAPTERS = {
    op: adapter
    for module in (networks, functions, layouts, autoencoders, diffusion, sampling, tiles, training, losses)
    for op, adapter in module.ADAPTERS.items()
}


def test_parity(parity_case, tmp_path, request):
    case = Case(*parity_case)
    reason = reason_for(case.name)
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    torch.manual_seed(0)
    compare(case, ADAPTERS[case.op](case, tmp_path))
