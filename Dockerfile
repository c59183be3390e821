# merge-cli in a container: small, without root, for CPUs or CUDA (docs/running.md).
#
#   docker build -t merge-cli .                                           CPU build of torch
#   docker build -t merge-cli:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   docker build -t merge-cli:slim --build-arg TORCH= .                   merges only, without torch

ARG PYTHON=3.12

# A stage with compilers' worth of files that the image does not keep.
FROM python:${PYTHON}-slim AS build
ARG TORCH=torch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/merge-cli
ENV PATH=/opt/merge-cli/bin:$PATH
# torch first: it is most of the image, and its layer stays when only the sources change.
RUN if [ -n "$TORCH" ]; then pip install "$TORCH" --index-url "$TORCH_INDEX"; fi
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY merge_cli merge_cli
RUN if [ -n "$TORCH" ]; then pip install .; \
    else pip install --no-deps . && pip install \
      "cma>=4.0" "huggingface_hub>=1.0" "jinja2>=3.1.5" "numba>=0.60" "numpy>=1.26" "pyyaml>=6.0" \
      "regex>=2024.5" "rich>=13.7" "safetensors>=0.5" "typer>=0.15"; fi

FROM python:${PYTHON}-slim
COPY --from=build /opt/merge-cli /opt/merge-cli
# Any user may run it (docker run --user): nothing is written but /cache, /work and /tmp.
RUN useradd --create-home --uid 1000 merge \
 && install -d -m 1777 /cache /work
ENV PATH=/opt/merge-cli/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    MERGE_CLI_CACHE=/cache/merge-cli \
    NUMBA_CACHE_DIR=/cache/numba
USER merge
WORKDIR /work
# SIGTERM (docker stop) stops a merge after its journal is closed; the same command resumes.
STOPSIGNAL SIGTERM
ENTRYPOINT ["merge-cli"]
CMD ["--help"]
