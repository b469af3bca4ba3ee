# The image of a run, on an NVIDIA GPU or on the CPU; docs/howto/docker.md shows both. TORCH_INDEX chooses torch's build:
# none is PyPI's, for CUDA 13 and a driver of 580 or newer. Every version is that of constraints.txt.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# Triton and torch.compile compile C and C++ when a run starts. Python's headers are in the base image.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
ARG TORCH_INDEX=
# torch comes first: its gigabytes stay in a layer of their own when the code changes.
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} $(grep -E '^torch(vision)?==' constraints.txt)

ARG EXTRAS=mnist5k
COPY setup.py pyproject.toml README.md LICENSE ./
COPY mnclglf mnclglf
COPY kernels kernels
RUN pip install -c constraints.txt ".[$EXTRAS]"

# `docker run --user` brings a number that the image's passwd does not know. So the home is a place that all may write,
# and USER has a name: torch asks for one, for the folder of what it compiles.
ENV HOME=/tmp USER=mnclglf
WORKDIR /work
ENTRYPOINT ["mnclglf"]
CMD ["doctor"]
