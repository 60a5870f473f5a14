"""Run an ablation study: train, evaluate and report many models that differ in named axes.

    python scripts/ablate.py configs/ablation/toy_f.yaml                     all of it; run again to go on
    python scripts/ablate.py configs/ablation/imagenet_f.yaml --dry-run      what would be trained
    python scripts/ablate.py STUDY --devices 0,1,2,3                         a training at a time on each GPU
    python scripts/ablate.py STUDY --task $SLURM_ARRAY_TASK_ID --of 6        one part of it, of a job array
    python scripts/ablate.py STUDY --report                                  the report of what is finished

Everything goes to outputs/ablation/<study>/: run folders, evaluations, and for each list of seeds a report.
"""

from ldm.cli.ablate import main

if __name__ == "__main__":
    main()
