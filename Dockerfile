# Two images from one file: `api` for the CPU, `gpu` for one NVIDIA card. They differ in the PyTorch build they carry and
# in nothing else. The PyTorch that pip finds by default on x86-64 carries CUDA; pass the index of the CPU builds as
# PIP_EXTRA_INDEX_URL to make a small `api` image.
# Python packages are those of deploy/constraints.txt, to the version. The tag below moves with Debian's and Python's fixes;
# to hold the base as well, name what it is today (`docker buildx imagetools inspect python:3.11-slim-bookworm` tells):
#   docker build --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS build
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /src
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY pyproject.toml deploy/constraints.txt ./
# Dependencies first and by themselves: this layer is rebuilt only when one of these files changes. Their tests and
# PyTorch's C++ headers stay out of the image.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install --quiet --constraint constraints.txt -r requirements.txt \
    && cd /opt/venv/lib/python3*/site-packages \
    && rm -rf torch/test torch/include \
    && find . -type d -name tests -not -path './torch/*' -prune -exec rm -rf {} +
COPY . .
# With the setuptools that PyTorch brought: a build of its own would fetch the newest.
RUN pip install --quiet --no-deps --no-build-isolation .

FROM base AS api
# `tesseract-ocr` here makes the service read scanned pages, in English.
ARG OCR_PACKAGES=""
# The CPU kernels are compiled at the first start, for the processor they will run on; Triton needs the compiler as well.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev $OCR_PACKAGES \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /cache --create-home jamba \
    && install -d -o jamba -g jamba -m 0700 /data
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/cache HF_HUB_OFFLINE=1 JAMBA_RAG_DATA_DIR=/data
WORKDIR /data
USER jamba
VOLUME ["/data", "/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["jamba-rag", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM api AS gpu
ENV JAMBA_RAG_MODEL__DEVICE=cuda
