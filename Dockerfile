# The artifact without a GPU: docker build -t djinn . && docker run --rm -it djinn make reproduce PROFILE=smoke_tiny
# With NVIDIA's container toolkit, --gpus all makes the GPU profiles available too.
FROM python:3.12.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libaio-dev make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /djinn
COPY . .
RUN make env
