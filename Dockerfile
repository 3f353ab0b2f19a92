# Image of the steps, of MLflow's server and of served models. Targets: cpu, gpu; they differ in their build of torch and in
# what the server needs. `make images` builds both.
#
# Behind a mirror of PyPI: --secret id=pip.conf,src=FILE. Wheels of torch from elsewhere: --build-arg TORCH_CPU=INDEX, TORCH_GPU=INDEX.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS requirements
WORKDIR /requirements
COPY pyproject.toml constraints.txt ./
# Of kfp a step needs its executor only, none of what compiling and submitting need.
RUN python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
wanted = [name for name in project['dependencies'] if not name.startswith('kfp')]; \
open('gpu.txt', 'w').write('\n'.join(wanted)); \
open('cpu.txt', 'w').write('\n'.join(wanted + project['optional-dependencies']['server']))"

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PYTHON=/opt/ffn/bin/python
WORKDIR /build
RUN python3 -m venv --without-pip /opt/ffn

# torch comes first and alone: its own index has no say over the other packages.
FROM build AS cpu-dependencies
COPY --from=requirements /requirements/cpu.txt /requirements/constraints.txt ./
ARG TORCH_CPU=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --constraint constraints.txt --no-deps --index-url "${TORCH_CPU}" torch \
 && pip install --constraint constraints.txt --requirement cpu.txt \
 && pip install --constraint constraints.txt --no-deps kfp

FROM build AS gpu-dependencies
COPY --from=requirements /requirements/gpu.txt /requirements/constraints.txt ./
# PyPI's own build of torch is the one for CUDA.
ARG TORCH_GPU=https://pypi.org/simple
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --constraint constraints.txt --no-deps --index-url "${TORCH_GPU}" torch \
 && pip install --constraint constraints.txt --requirement gpu.txt \
 && pip install --constraint constraints.txt --no-deps kfp

FROM build AS application
COPY pyproject.toml README.md LICENSE ./
COPY ffn ffn
COPY components components
COPY pipeline pipeline
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-deps --prefix /application .

FROM ${BASE} AS runtime
# A step's user has no name in the image: what asks for one, and for a home, finds it here.
ENV PATH=/opt/ffn/bin:${PATH} HOME=/tmp USER=ffn \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true GIT_PYTHON_REFRESH=quiet
LABEL org.opencontainers.image.title="ffn" \
      org.opencontainers.image.description="Steps of the FFN pipeline: raw skeletons to a promoted action-recognition model" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 65532:65532
CMD ["ffn", "version"]
# A step is a job that ends by itself; what serves has a probe of its own.
HEALTHCHECK NONE

FROM runtime AS gpu
# Which GPUs a container sees is the engine's to say: an image that asks for all gets them in pods that asked for none, too.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-dependencies /opt/ffn /opt/ffn
COPY --from=application /application /opt/ffn
ARG COMMIT=unknown
ENV FFN_COMMIT=${COMMIT}
LABEL org.opencontainers.image.revision=${COMMIT}

FROM runtime AS cpu
COPY --from=cpu-dependencies /opt/ffn /opt/ffn
COPY --from=application /application /opt/ffn
ARG COMMIT=unknown
ENV FFN_COMMIT=${COMMIT}
LABEL org.opencontainers.image.revision=${COMMIT}
