# A small image that runs as nobody in particular, writes to one volume, and stops in good order.
ARG PYTHON=3.13
FROM python:${PYTHON}-slim AS build
WORKDIR /src
RUN python -m venv /opt/sidecar
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The locked packages first: they change less often than our own files.
COPY requirements/run.lock requirements/run.lock
RUN /opt/sidecar/bin/pip install --no-deps --require-hashes -r requirements/run.lock
COPY pyproject.toml README.md LICENSE ./
COPY sidecar sidecar
# What was needed to build is not needed to run.
RUN /opt/sidecar/bin/pip install --no-deps --no-build-isolation . \
 && /opt/sidecar/bin/pip uninstall --yes hatchling editables packaging pathspec pluggy tomlkit trove-classifiers pip \
 && /opt/sidecar/bin/python -m compileall -q /opt/sidecar/lib

FROM python:${PYTHON}-slim
RUN groupadd --gid 10001 sidecar \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin sidecar \
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
