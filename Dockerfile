# NVIDIA GPUs: --build-arg TORCH=cu130 (CUDA 13.0, driver 580 or newer, RTX 20 to RTX 50). The wheels include CUDA's libraries.
FROM python:3.12-slim-bookworm

# training.torch_compile needs a C++ compiler. Debian keeps one version per release, so a pinned version would stop to exist.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /workshop
COPY requirements.txt ./
ARG TORCH=cpu
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/$TORCH" --constraint requirements.txt torch
COPY requirements-extras.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-extras.txt

# The ids of the host's user make mounted folders writable. The group id may already exist in the image (macOS: 20).
ARG UID=1000
ARG GID=1000
RUN groupadd --gid "$GID" --non-unique workshop \
    && useradd --uid "$UID" --gid "$GID" --create-home --no-log-init workshop \
    && install --directory --owner="$UID" --group="$GID" . data out /home/workshop/.cache
COPY --chown=$UID:$GID . .
USER $UID:$GID

# The default command is the server: HEALTHCHECK queries it (without a proxy from the environment), and a container without
# arguments is a service.
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m CMD ["python", "-c", \
    "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8000/health')"]
CMD ["python", "INFER.py", "--serve", "--model", "out", "--host", "0.0.0.0"]
