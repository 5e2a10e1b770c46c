# The REST server over checkpoints that are mounted read-only: dsl serve. Built from the repository's root:
#     docker build -f docker/model.Dockerfile -t dsl-model .
# It listens on all addresses of the container, so it wants a key: docker run --init -e DSL_API_KEY=... (or see
# compose.yaml; without --init, docker stop waits ten seconds while the model loads).
# TORCH_INDEX chooses the build of torch: .../whl/cpu (default) or .../whl/cu130.
# By tag: the machine of development reaches no registry to learn the digest from.
FROM python:3.11.14-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 DSL_HOME=/data
WORKDIR /app

COPY requirements.txt ./
# torch first, from its own index, in the pinned version; then what the server needs, in its pinned versions
RUN pip install "$(grep '^torch==' requirements.txt)" --index-url "$TORCH_INDEX"
COPY pyproject.toml LICENSE README.md ./
COPY dsl ./dsl
RUN pip install --constraint requirements.txt ".[serve]" && \
    useradd --create-home --uid 1000 dsl && mkdir -p /data/checkpoints

USER 1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["dsl"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--checkpoint", "demo"]
