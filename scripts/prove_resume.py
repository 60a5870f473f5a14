"""Prove that a killed run ends where the uninterrupted one does: real trainings, real SIGKILLs at random moments.

    python scripts/prove_resume.py --kills 40 --seed 0 --faults --out FILE.json

Both stages learn from a folder and from shards, in tiny models with validation, best checkpoints, averages, warm-up
and a discriminator. Each is trained once in peace; then the same training is killed at random moments and resumed with
`--resume auto` until it ends. Weights, averages, optimisers, schedulers, counters, position in the data and metrics.csv
must be the same to the last bit. `--faults` breaks saving in four ways instead of the process, for all four trainings.
"""

from ldm.cli.prove_resume import main

if __name__ == "__main__":
    raise SystemExit(main())
