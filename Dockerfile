# The environment of a GPU cluster: docs/environment.md. Not run: no machine of this project had a GPU and Docker.
#
#   docker build --build-arg BASE_IMAGE=... -t megatron-opsd .
#   enroot import -o megatron-opsd.sqsh dockerd://megatron-opsd        # then CONTAINER_IMAGE=$PWD/megatron-opsd.sqsh
#
# BASE_IMAGE: an NGC PyTorch image of CUDA 13 with Python 3.12. It gives nvcc, cuDNN's headers, NCCL's plug-ins and the
# network's libraries. Its torch, Transformer Engine and Apex stay out of sight, for vLLM's wheel wants its own torch.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}

ENV VIRTUAL_ENV=/opt/opsd PATH=/opt/opsd/bin:${PATH} PIP_DISABLE_PIP_VERSION_CHECK=1
# An NGC image holds pip to its own versions through this file.
ENV PIP_CONSTRAINT=
RUN python3 -c 'import sys; sys.version_info[:2] == (3, 12) or sys.exit("BASE_IMAGE needs Python 3.12")' \
    && python3 -m venv "${VIRTUAL_ENV}"

WORKDIR /opt/megatron_opsd
COPY requirements/gpu.txt requirements/gpu-build.txt requirements/
RUN pip install --no-cache-dir -r requirements/gpu.txt
# The architectures to compile for: 80 A100, 90 H100, 100 B200.
ARG NVTE_CUDA_ARCHS=80;90;100
ARG MAX_JOBS=8
RUN pip install --no-cache-dir wheel ninja pybind11 \
    && NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="${NVTE_CUDA_ARCHS}" MAX_JOBS="${MAX_JOBS}" \
       pip install --no-cache-dir --no-build-isolation -r requirements/gpu-build.txt

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . && opsd --help >/dev/null
