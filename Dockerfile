# docker build -t antares .                                vLLM on CPU with a small model: the quickstart
# docker build -t antares:gpu --build-arg ENGINE=gpu .     vLLM for NVIDIA GPUs
# docker build -t antares:light --build-arg ENGINE=none .  the proxy and the predictor only, without torch
#
# docker run --rm --init --read-only --tmpfs /tmp -v antares-cache:/antares/cache -p 127.0.0.1:8100:8100 antares
#
# BASE: any Debian image with Python 3.11 or newer as `python`. deploy/check_image.sh makes one from Debian packages.
ARG PYTHON_VERSION=3.12
ARG BASE=python:${PYTHON_VERSION}-slim-bookworm

FROM ${BASE} AS build
ARG ENGINE=cpu
# Package index for torch only, such as PyTorch's CPU index. The default index has a CUDA build of several GB.
ARG TORCH_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /antares
RUN python -m venv venv
ENV PATH=/antares/venv/bin:$PATH

# Install the engine first: it is large and changes rarely, so that code changes reuse this layer.
COPY pyproject.toml ./
COPY deploy/install_engine.py deploy/
RUN case "$ENGINE" in \
      cpu | gpu) python deploy/install_engine.py "$ENGINE" --torch-index-url "$TORCH_INDEX_URL" ;; \
      none) ;; \
      *) echo "ENGINE must be cpu, gpu or none, not '$ENGINE'" >&2; exit 1 ;; \
    esac

COPY LICENSE README.md ./
COPY gateway gateway
COPY engine_adapter engine_adapter
COPY predictor_service predictor_service
COPY lab lab
RUN pip install . \
    && mkdir cache \
    && if [ "$ENGINE" = cpu ]; then XDG_CACHE_HOME=/antares/cache python -m engine_adapter.vllm.smollm2; fi


FROM ${BASE}
ARG ENGINE=cpu
# vLLM needs libnuma on CPU, and gcc on GPU, because Triton compiles its launchers at start.
# hadolint ignore=DL3008
RUN case "$ENGINE" in cpu) set -- libnuma1 ;; gpu) set -- gcc libc6-dev ;; *) set -- ;; esac \
    && if [ $# -gt 0 ]; then \
      apt-get update \
      && apt-get install --yes --no-install-recommends "$@" \
      && rm -rf /var/lib/apt/lists/*; \
    fi \
    && useradd --create-home --uid 10001 antares
WORKDIR /antares
COPY --from=build /antares/venv venv
COPY --from=build --chown=antares:antares /antares/cache cache
COPY configs configs
COPY deploy/gateway.yaml configs/container.yaml
# The root filesystem may be read-only: only /tmp and /antares/cache are written to.
ENV PATH=/antares/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp XDG_CACHE_HOME=/antares/cache
USER 10001
EXPOSE 8100
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["antares", "health"]
ENTRYPOINT ["antares"]
CMD ["serve", "--config", "configs/container.yaml", "--host", "0.0.0.0"]
