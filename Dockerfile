# For NVIDIA GPUs: --build-arg TORCH=cu130 (CUDA 13.0, driver 580 or newer, RTX 20 to RTX 50). The wheels include CUDA's libraries.
FROM python:3.12-slim-bookworm

# training.torch_compile needs a C++ compiler. Debian keeps only one version per release, so a pinned version would disappear.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /workshop
COPY requirements.txt ./
ARG TORCH=cpu
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/$TORCH" --constraint requirements.txt torch
COPY requirements-extras.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-extras.txt

# Mounted folders are writable if the user has the ids of the host's user. The group id may exist in the image (macOS: 20).
ARG UID=1000
ARG GID=1000
RUN groupadd --gid "$GID" --non-unique workshop \
    && useradd --uid "$UID" --gid "$GID" --create-home --no-log-init workshop \
    && install --directory --owner="$UID" --group="$GID" . data out /home/workshop/.cache
COPY --chown=$UID:$GID . .
USER $UID:$GID

# The default command starts the server, which HEALTHCHECK queries without the proxy of the environment.
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m CMD ["python", "-c", \
    "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8000/health')"]
CMD ["python", "INFER.py", "--serve", "--model", "out", "--host", "0.0.0.0"]
