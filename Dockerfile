# Image of the steps, of MLflow's server and of served models. Targets: cpu, gpu; they differ in their build of torch and in
# what the server needs. `make images` builds both.
#
# Behind a mirror of PyPI: --secret id=pip.conf,src=FILE. Wheels of torch from elsewhere: --build-arg TORCH_CPU=INDEX, TORCH_GPU=INDEX.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS requirements
WORKDIR /requirements
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
open('gpu.txt', 'w').write('\n'.join(project['dependencies'])); \
open('cpu.txt', 'w').write('\n'.join(project['dependencies'] + project['optional-dependencies']['server']))"

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
 && pip install --constraint constraints.txt --requirement cpu.txt

FROM build AS gpu-dependencies
COPY --from=requirements /requirements/gpu.txt /requirements/constraints.txt ./
# PyPI's own build of torch is the one for CUDA.
ARG TORCH_GPU=https://pypi.org/simple
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --constraint constraints.txt --no-deps --index-url "${TORCH_GPU}" torch \
 && pip install --constraint constraints.txt --requirement gpu.txt

FROM build AS application
COPY pyproject.toml README.md LICENSE ./
COPY ffn ffn
COPY components components
COPY pipeline pipeline
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-deps --prefix /application .

FROM ${BASE} AS runtime
ENV PATH=/opt/ffn/bin:${PATH} HOME=/tmp USER=ffn \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true GIT_PYTHON_REFRESH=quiet
LABEL org.opencontainers.image.title="ffn" \
      org.opencontainers.image.description="Steps of the FFN pipeline: raw skeletons to a promoted action-recognition model" \
      org.opencontainers.image.licenses="Apache-2.0"
# By name too: for what asks who it is, and where a pod names no group it is the one that is looked up here.
RUN echo 'ffn:x:65532:' >> /etc/group && echo 'ffn:x:65532:65532:ffn:/tmp:/usr/sbin/nologin' >> /etc/passwd
CMD ["ffn", "version"]
# A step is a job that ends by itself; what serves has a probe of its own.
HEALTHCHECK NONE

FROM runtime AS gpu
# torch.compile has what starts its kernels compiled where they run; inductor asks for C++ where something stays on the CPU.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/*
# Which GPUs a container sees is the engine's to say: an image that asks for all gets them in pods that asked for none, too.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-dependencies /opt/ffn /opt/ffn
COPY --from=application /application /opt/ffn
RUN --mount=type=tmpfs,target=/tmp --mount=type=bind,source=image,target=/image \
    sh /image/openmp.sh && python /image/compiler.py && python -m ffn.precompile
USER 65532:65532
ARG COMMIT=unknown
ENV FFN_COMMIT=${COMMIT}
LABEL org.opencontainers.image.revision=${COMMIT}

FROM runtime AS cpu
COPY --from=cpu-dependencies /opt/ffn /opt/ffn
COPY --from=application /application /opt/ffn
RUN --mount=type=tmpfs,target=/tmp --mount=type=bind,source=image/openmp.sh,target=/openmp.sh \
    sh /openmp.sh && python -m ffn.precompile
USER 65532:65532
ARG COMMIT=unknown
ENV FFN_COMMIT=${COMMIT}
LABEL org.opencontainers.image.revision=${COMMIT}
