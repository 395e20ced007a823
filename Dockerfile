# The package with its CUDA operators, for NVIDIA GPUs of Ampere and later:
#   docker build -t vlmteacher .
#   docker run --gpus all -v "$PWD/runs:/runs" -v "$HOME/.cache/huggingface:/models" vlmteacher demo
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ cmake ninja-build \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/vlmteacher
WORKDIR /src
COPY constraints.txt .
# torch first: the operators are built against it, and PyPI's build is for CUDA
RUN /opt/vlmteacher/bin/pip install --no-cache-dir -c constraints.txt torch triton
COPY . .
RUN VLMTEACHER_CUDA=on /opt/vlmteacher/bin/pip install --no-cache-dir -c constraints.txt .

# torch brings the CUDA libraries that it uses: the driver comes from the host, the toolkit stays behind.
FROM ubuntu:24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 gcc python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/vlmteacher /opt/vlmteacher
ENV PATH=/opt/vlmteacher/bin:$PATH HF_HOME=/models NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /
ENTRYPOINT ["vlmteacher"]
