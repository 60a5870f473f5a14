"""Packaging: dependencies with the ranges that the code supports; `constraints.txt` pins what was tested."""

from setuptools import find_packages, setup

setup(
    name="latent-diffusion",
    version="0.1.0",
    description="Train, sample and measure latent diffusion models (arXiv 2112.10752)",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["ldm", "ldm.*"]),
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "pytorch-lightning>=2.5,<3",
        "omegaconf>=2.3",
        "einops>=0.8",
        "numpy>=1.26",
        "pillow>=10",
        "tqdm>=4.66",
        "safetensors>=0.4",
        "transformers>=4.46",
        "tokenizers>=0.20",
        "lpips>=0.1.4,<0.2",
        "taming-transformers-rom1504==0.0.6",
        "webdataset>=0.2.86",
        "wandb>=0.17",
    ],
    extras_require={
        "demo": ["matplotlib>=3.8", "mlxtend>=0.23"],
        "data": ["lmdb>=1.4", "pyarrow>=15", "tifffile>=2023.7"],
        "eval": ["torchmetrics>=1.4", "torch-fidelity>=0.3"],
        "superres": ["opencv-python-headless>=4.9", "scipy>=1.11"],
        "dev": [
            "pytest>=8",
            "ruff>=0.6",
            "build>=1.2",
            "setuptools>=70.1",
            "matplotlib>=3.8",
            "mlxtend>=0.23",
            "lmdb>=1.4",
            "pyarrow>=15",
            "tifffile>=2023.7",
            "tensorboard>=2.16",
            "opencv-python-headless>=4.9",
            "scipy>=1.11",
        ],
    },
)
