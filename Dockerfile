# A small image that runs as nobody in particular, writes to one volume, and stops in good order.
#
# The same image twice: name the base by its digest, and the time of the commit.
#   docker pull python:3.13-slim && docker inspect --format '{{index .RepoDigests 0}}' python:3.13-slim
#   docker buildx build --build-arg BASE=python:3.13-slim@sha256:… \
#     --build-arg SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) --output type=docker,rewrite-timestamp=true .
# A tag moves with each patch of its distribution, so a build without a digest takes what is newest, and is another image.
ARG PYTHON=3.13
ARG BASE=python:${PYTHON}-slim
FROM ${BASE} AS build
ARG SOURCE_DATE_EPOCH
WORKDIR /src
RUN python -m venv /opt/sidecar
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1
# The locked packages first: they change less often than our own files. With the drivers that a fleet needs.
COPY requirements/run.lock requirements/fleet.lock requirements/
RUN /opt/sidecar/bin/pip install --no-deps --require-hashes -r requirements/run.lock -r requirements/fleet.lock
COPY pyproject.toml hatch_build.py LICENSE *.md ./
COPY docs docs
COPY config config
COPY sidecar sidecar
# What was needed to build is not needed to run. Compiled files name the hash of their source, not the second of this build.
RUN /opt/sidecar/bin/pip install --no-deps --no-build-isolation . \
 && /opt/sidecar/bin/pip uninstall --yes hatchling editables packaging pathspec pluggy tomlkit trove-classifiers pip \
 && /opt/sidecar/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/sidecar/lib

FROM ${BASE}
ARG SOURCE_DATE_EPOCH
RUN groupadd --gid 10001 sidecar \
 && useradd --uid 10001 --gid 10001 --no-create-home --no-log-init --home-dir /data --shell /usr/sbin/nologin sidecar \
 && install --directory --owner 10001 --group 10001 --mode 0700 /data
COPY --from=build /opt/sidecar /opt/sidecar
ENV PATH=/opt/sidecar/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SIDECAR_DATA_DIR=/data
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080 9464
# Asks inside the container, so the admin port may stay on loopback. Nothing but the standard library, and no proxy
# of the environment in between.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s --retries=4 \
    CMD ["/opt/sidecar/bin/python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 9464, timeout=4); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["metering-sidecar"]
CMD ["serve"]
