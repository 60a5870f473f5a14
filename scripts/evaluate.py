"""Measure what a run has learned, with everything that the figures depend on.

    python scripts/evaluate.py --run logs/RUN --n 1000 --metrics frechet precision_recall --out outputs/eval/run
    python scripts/evaluate.py --run logs/AUTOENCODER --metrics frechet psnr ssim lpips --out outputs/eval/first
    python scripts/evaluate.py --images IMAGES --reference PHOTOS --extractor inception --out outputs/eval/images
    torchrun --nproc_per_node 8 -- scripts/evaluate.py --run logs/RUN --n 50000 --extractor inception --out ...

It goes on where it was stopped. The features of the reference are cached next to OUT, by the content of its images.
Without the `--`, torchrun takes --run and --n for abbreviations of its own options.
"""

from ldm.cli.evaluate import main

if __name__ == "__main__":
    main()
