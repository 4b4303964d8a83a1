# kvray's image, for KubeRay and by itself: docs/DEPLOY.md. Targets: cpu, cuda.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS build
# Where Python is Debian's: "g++ python3-dev python3-venv".
ARG BUILD_PACKAGES="g++"
# hadolint ignore=SC2086
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ${BUILD_PACKAGES} \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/kvray
WORKDIR /src

# The wheel, with kernels, checksum and block index compiled for each instruction set, of which a machine takes the best.
FROM build AS wheel
COPY . .
RUN /opt/kvray/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel . \
    && /opt/kvray/bin/python -m zipfile --list /wheel/*.whl > contents \
    && grep transport/prebuilt/ contents

# What it stands on: changes seldom, and so does the layer of it.
FROM build AS cpu-packages
COPY pyproject.toml constraints.txt ./
COPY tools/requirements.py tools/
# Empty: torch from where all else is from.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/kvray/bin/python tools/requirements.py > requirements.txt \
    && /opt/kvray/bin/pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt \
        ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"}

FROM build AS cuda-packages
COPY pyproject.toml constraints.txt ./
COPY tools/requirements.py tools/
RUN /opt/kvray/bin/python tools/requirements.py ucx-cu12 triton > requirements.txt \
    && /opt/kvray/bin/pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

# What both targets have: a user, and bash and wget, by which KubeRay asks pods how they are.
FROM ${BASE} AS run
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash ca-certificates wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home kvray \
    && echo "export PATH=/opt/kvray/bin:\$PATH" > /etc/profile.d/kvray.sh
# A login shell reads the profile. PYTHONSAFEPATH: a folder that is named like a package of ours is not taken for it.
ENV PATH=/opt/kvray/bin:$PATH PYTHONSAFEPATH=1 RAY_USAGE_STATS_ENABLED=0

FROM run AS cuda
COPY --from=cuda-packages /opt/kvray /opt/kvray
COPY --from=wheel /wheel /wheel
# Our packages have plain names: no other distribution may have one of them.
RUN pip install --no-cache-dir --no-deps /wheel/*.whl \
    && python -c 'from importlib.metadata import packages_distributions as owners; \
       wrong = {name: whose for name, whose in owners().items() if "kvray" in whose and len(set(whose)) > 1}; \
       assert not wrong, wrong' \
    && kvray dashboard install
USER 1000:1000
WORKDIR /home/kvray
CMD ["kvray", "serve", "--host", "0.0.0.0"]

FROM run AS cpu
COPY --from=cpu-packages /opt/kvray /opt/kvray
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir --no-deps /wheel/*.whl \
    && python -c 'from importlib.metadata import packages_distributions as owners; \
       wrong = {name: whose for name, whose in owners().items() if "kvray" in whose and len(set(whose)) > 1}; \
       assert not wrong, wrong' \
    && kvray dashboard install
USER 1000:1000
WORKDIR /home/kvray
CMD ["kvray", "serve", "--host", "0.0.0.0"]
