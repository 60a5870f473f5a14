from prove_configs import verdicts


def test_mutated_configs_are_refused_in_one_line_or_rightly_accepted() -> None:
    found = verdicts(mutations=60, seed=1)
    assert [verdict for verdict in found if not verdict.right] == []
    assert {"refused", "accepted"} == {verdict.outcome for verdict in found}
