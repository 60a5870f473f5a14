"""Codes in use over an interval, and the two ways to keep a codebook alive."""

from pathlib import Path

import pytest
import torch
from fitting import fit, largest_difference
from tiny import autoencoder, autoencoder_training, vq_training

from ldm.errors import UserError
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.codebook import CodebookUpkeep, CodeCounts
from ldm.training.lightning_fixes.checkpoints import Checkpoints


def positions(codes: torch.Tensor) -> torch.Tensor:
    """Give latents (2, 2, 1, N / 2) that are (code, code + 0.5) at each position of codes (N,)."""
    latents = torch.stack([codes.float(), codes + 0.5], dim=1)  # (N, 2)
    return latents.view(2, 1, -1, 2).permute(0, 3, 1, 2)


def test_codes_are_counted_over_the_interval_and_not_averaged_over_batches() -> None:
    counts = CodeCounts(8)
    for first in (0, 4):  # each batch uses half of the codes
        counts.add(torch.arange(first, first + 4))
    logs = counts.logs(torch.device("cpu"))
    assert logs["codebook_usage"] == 1 and logs["perplexity"].item() == pytest.approx(8, rel=1e-4)
    counts.add(torch.tensor([3, 3]))
    logs = counts.logs(torch.device("cpu"))
    assert logs["codebook_usage"] == 1 / 8 and logs["perplexity"].item() == pytest.approx(1, rel=1e-4)


def test_use_of_the_codebook_is_logged(tmp_path: Path) -> None:
    trainer = fit(vq_training(ema_decay=0.5), tmp_path, 2, with_validation=True, val_check_interval=2)
    for name in ("train/{}", "val/{}", "val/{}_ema"):
        usage, perplexity = (trainer.callback_metrics[name.format(kind)] for kind in ("codebook_usage", "perplexity"))
        assert 1 <= perplexity <= usage * 16 + 1e-3 and 1 / 16 <= usage <= 1


def test_codes_follow_the_average_of_their_latents() -> None:
    codebook, codes = torch.randn(5, 2), torch.tensor([0, 0, 0, 2])
    before, z = codebook.clone(), positions(torch.tensor([0, 0, 3, 2]))
    upkeep = CodebookUpkeep(decay=0.9)
    upkeep.observe(z, codes)
    upkeep.update(codebook, seed=0, step=1)
    sums = torch.tensor([[3.0, 4.5], [2.0, 2.5]])  # of 0, 0, 3 and of 2
    weights = torch.tensor([[0.9 + 0.1 * 3], [0.9 + 0.1]])
    torch.testing.assert_close(codebook[[0, 2]], (0.9 * before[[0, 2]] + 0.1 * sums) / weights)
    torch.testing.assert_close(codebook[[1, 3, 4]], before[[1, 3, 4]])


def test_a_code_that_is_never_chosen_stays_where_it_is() -> None:
    codebook, upkeep = torch.ones(2, 2), CodebookUpkeep(decay=0.1)
    for step in range(1, 60):  # 0.1^59 is no float32 any more
        upkeep.observe(torch.zeros(1, 2, 1, 1), torch.tensor([0]))
        upkeep.update(codebook, 0, step)
    torch.testing.assert_close(codebook, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


def test_a_broken_batch_leaves_no_trace() -> None:
    codebook, upkeep = torch.randn(4, 2), CodebookUpkeep(decay=0.5, restart_every=1)
    before = codebook.clone()
    upkeep.observe(torch.full((2, 2, 1, 2), float("nan")), torch.zeros(4, dtype=torch.long))
    upkeep.update(codebook, 0, 1)
    assert torch.equal(codebook, before)
    upkeep.observe(positions(torch.arange(4)), torch.zeros(4, dtype=torch.long))
    upkeep.update(codebook, 0, 2)
    assert codebook.isfinite().all() and not torch.equal(codebook, before)


def test_unused_codes_restart_at_latents_of_the_batch() -> None:
    ends = []
    for seed in (0, 0, 1):
        codebook, upkeep = torch.full((6, 2), -1.0), CodebookUpkeep(restart_every=2)
        for step, codes in ((1, [0, 0, 1, 1]), (2, [5, 5, 5, 5])):
            assert (codebook == -1).all()
            upkeep.observe(positions(torch.tensor([2, 3, 4, 5])), torch.tensor(codes))
            upkeep.update(codebook, seed, step)
        assert (codebook[[0, 1, 5]] == -1).all()  # chosen in either of the two steps
        new = codebook[2:5]
        assert len(set(new[:, 0].tolist())) == 3 and set(new[:, 0].tolist()) <= {2, 3, 4, 5}
        torch.testing.assert_close(new[:, 1], new[:, 0] + 0.5)
        ends.append(codebook)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_accumulated_batches_move_the_codebook_as_one_large_batch() -> None:
    z, codes = torch.randn(4, 2, 3, 3), torch.randint(3, (4 * 9,))
    ends = []
    for parts in (1, 2):
        codebook, upkeep = torch.ones(8, 2), CodebookUpkeep(decay=0.5, restart_every=1)
        for latents, chosen in zip(z.chunk(parts), codes.chunk(parts), strict=True):
            upkeep.observe(latents, chosen)
        upkeep.update(codebook, 0, 1)
        ends.append(codebook)
    torch.testing.assert_close(*ends)


def test_only_the_average_moves_codes_that_follow_it(tmp_path: Path) -> None:
    model = vq_training(codebook=CodebookUpkeep(decay=0.9), ema_decay=0.5)
    codes = model.model.quantize.embedding.weight
    before = codes.detach().clone()
    trainer = fit(model, tmp_path, 3)
    assert not codes.requires_grad and codes not in trainer.optimizers[0].state
    assert not torch.equal(codes, before)
    plain = vq_training(ema_decay=0.5)
    assert model.state_dict().keys() == plain.state_dict().keys()  # names as published


def test_resumed_upkeep_equals_uninterrupted_upkeep(tmp_path: Path) -> None:
    def model(seed: int) -> AutoencoderTraining:
        return vq_training(seed, codebook=CodebookUpkeep(decay=0.9, restart_every=3))

    whole, first, resumed = model(0), model(0), model(1)
    trainer = fit(whole, tmp_path, 8)
    fit(first, tmp_path, 4, callbacks=[Checkpoints(tmp_path)])
    again = fit(resumed, tmp_path, 8, callbacks=[Checkpoints(tmp_path)], ckpt_path=tmp_path / "last.ckpt")
    assert largest_difference(whole.state_dict(), resumed.state_dict()) == 0
    assert trainer.callback_metrics["train/perplexity"] == again.callback_metrics["train/perplexity"]


def test_impossible_upkeep_is_refused() -> None:
    for options, name in (({}, "restart_every"), ({"decay": 1.0}, "decay"), ({"restart_every": 0}, "restart_every")):
        with pytest.raises(UserError, match=f"CodebookUpkeep.*{name}"):
            CodebookUpkeep(**options)
    with pytest.raises(UserError, match="KL .*codebook"):
        AutoencoderTraining(autoencoder(), autoencoder_training().loss, codebook=CodebookUpkeep(decay=0.9))
