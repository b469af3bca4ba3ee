"""Metadata, dependencies, extras and the two package roots. constraints.txt holds the versions that were tested."""

from setuptools import find_packages, setup

setup(
    name="mnclglf",
    version="0.1.0",
    description="Multi-network contrastive learning based on global and local features, on one consumer GPU",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],  # those that were run
    # The kernels lie one folder down: a top-level package `kernels` would shadow the one on PyPI.
    package_dir={"mnclglf_kernels": "kernels/mnclglf_kernels"},
    packages=find_packages(include=["mnclglf*"]) + find_packages("kernels"),
    package_data={
        "mnclglf": ["py.typed"],
        "mnclglf.reports": ["*.jinja"],
        "mnclglf_kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["mnclglf = mnclglf.cli:main"]},
    install_requires=[
        # The oldest that ran (torch 2.11 requires these two): docs/lab/performance.md, on an H200.
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=2.0",
        "pillow>=11",
        "scikit-learn>=1.6",
        "mlxtend>=0.24",
        "rich>=14",
        "tyro>=1.0",
        "tensorboard>=2.20",
        "matplotlib>=3.10",
        "jinja2>=3.1",
    ],
    extras_require={
        # Take the one of torch's own CUDA version. Both also run CPU pipelines without a GPU.
        "dali-cuda13": ["nvidia-dali-cuda130>=2.4; sys_platform == 'linux'"],
        "dali-cuda12": ["nvidia-dali-cuda120>=2.4; sys_platform == 'linux'"],
        "faiss-gpu": ["faiss-gpu>=1.15; sys_platform == 'linux'"],
        "faiss-cpu": ["faiss-cpu>=1.12"],
        "cudnn": [
            "nvidia-cudnn-frontend>=1.32; sys_platform == 'linux'"
        ],  # a choice of a run's start; bench.cudnn_plans
        "dev": [
            "pytest>=9",
            "pytest-benchmark>=5.2",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "coverage>=7.6",
            "ruff>=0.17",
            "basedpyright>=1.40",
        ],
        "docs": ["sphinx>=9", "myst-parser>=5", "pydata-sphinx-theme>=0.16"],
    },
)
