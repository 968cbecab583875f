"""cluster.yaml and configs/cluster: what the launcher and KubeRay take, safe as shipped, of one shape and versions."""

import copy
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import raytorch

ROOT = Path(__file__).parents[2]
LAUNCHER = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
MANIFESTS = list(yaml.safe_load_all((ROOT / "configs/cluster/raycluster.yaml").read_text(encoding="utf-8")))
CLUSTER, POLICY, CLAIM = MANIFESTS
DOCKERFILE = (ROOT / "configs/cluster/Dockerfile").read_text(encoding="utf-8")
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
assert RAY
RAY_VERSION = RAY[1]


# -- cluster.yaml ------------------------------------------------------------------------------------------------------


def test_the_launcher_takes_cluster_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray up` reads it, with its defaults for AWS. Ray's functions for it are internal: Ray 2.60."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(tmp_path)
    prepared = prepare_config(copy.deepcopy(LAUNCHER))
    validate_config(prepared)
    assert prepared["head_setup_commands"][: len(LAUNCHER["setup_commands"])] == LAUNCHER["setup_commands"]
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    assert not prepared["docker"]

    with pytest.raises(jsonschema.ValidationError, match="'idle_timeout' was unexpected"):
        validate_config(prepare_config(LAUNCHER | {"idle_timeout": 10}))


def commands(key: str) -> str:
    return "\n".join(LAUNCHER[key])


def test_nodes_start_with_token_authentication_only() -> None:
    mounts = LAUNCHER["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in LAUNCHER[key] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token ray start" in starts[0]
    assert not re.search(r"RAY_AUTH_TOKEN\b", (ROOT / "cluster.yaml").read_text(encoding="utf-8")), (
        "a token has no place in the file"
    )


def test_the_dashboard_is_on_the_heads_loopback() -> None:
    assert re.findall(r"--dashboard-host=(\S+)", commands("head_start_ray_commands")) == ["127.0.0.1"]
    assert "security_group" not in LAUNCHER["provider"], "ports beyond SSH would be opened here"


def test_what_is_mounted_can_be_installed() -> None:
    there = {remote: local for remote, local in LAUNCHER["file_mounts"].items() if remote.startswith("~/raytorch/")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {
        "pyproject.toml",
        "constraints.txt",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
    }
    assert set(there.values()) == needed
    for remote, local in there.items():
        assert remote == f"~/raytorch/{local}"
        assert (ROOT / local).exists()
    assert '--constraint ~/raytorch/constraints.txt "$HOME/raytorch[onnx]"' in commands("setup_commands")


@pytest.mark.parametrize("key", [key for key in LAUNCHER if key.endswith("_commands")])
def test_commands_are_shell(key: str) -> None:
    for command in LAUNCHER[key]:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


# -- configs/cluster ---------------------------------------------------------------------------------------------------


def closed(schema: Any) -> Any:
    """The schema with unknown keys refused, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        result.setdefault("additionalProperties", False)
    return result


def crd_schema() -> Any:
    definition = yaml.safe_load((Path(__file__).parent / "raycluster_crd.yaml").read_text(encoding="utf-8"))
    assert definition["spec"]["group"] == "ray.io"
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    return closed(version["schema"]["openAPIV3Schema"])


def test_kuberay_takes_the_manifest() -> None:
    schema = crd_schema()
    assert (CLUSTER["apiVersion"], CLUSTER["kind"]) == ("ray.io/v1", "RayCluster")
    jsonschema.validate(CLUSTER, schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "authOptions", "mode"], "tokens"),
        (["spec", "authOption"], {"mode": "token"}),
        (["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "workerGroupSpecs", 0, "maxReplicas"], "4"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "cpu"], "four"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "container"], []),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else "",
)
def test_the_check_of_the_manifest_can_fail(path: list[Any], value: object) -> None:
    manifest = copy.deepcopy(CLUSTER)
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, crd_schema())


def test_the_manifest_exposes_nothing_beyond_the_cluster() -> None:
    spec = CLUSTER["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "raytorch-token"}
    assert all(manifest["kind"] != "Secret" for manifest in MANIFESTS), "the token has no place in the file"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not spec["headGroupSpec"].get("enableIngress")

    pods = {"matchLabels": {"ray.io/cluster": CLUSTER["metadata"]["name"]}}
    assert POLICY["spec"] == {
        "podSelector": pods,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": pods}]}],
    }
    for template in templates():
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        (container,) = template["spec"]["containers"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]


def templates() -> list[Any]:
    spec = CLUSTER["spec"]
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def test_every_pod_mounts_the_storage() -> None:
    for template in templates():
        (volume,) = template["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
        (container,) = template["spec"]["containers"]
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]


# -- all of them together ----------------------------------------------------------------------------------------------


def test_both_clusters_have_one_shape() -> None:
    head, gpu = (LAUNCHER["available_node_types"][name] for name in ("head", "gpu"))
    assert LAUNCHER["head_node_type"] == "head"
    assert head["resources"]["CPU"] == int(CLUSTER["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"]) == 0

    (group,) = CLUSTER["spec"]["workerGroupSpecs"]
    assert CLUSTER["spec"]["enableInTreeAutoscaling"]
    assert (group["minReplicas"], group["maxReplicas"]) == (gpu["min_workers"], gpu["max_workers"]) == (0, 4)
    assert LAUNCHER["max_workers"] == 4
    assert CLUSTER["spec"]["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * LAUNCHER["idle_timeout_minutes"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_ray_and_python_are_the_tested_ones() -> None:
    python = "3.11"
    assert f"FROM rayproject/ray:{RAY_VERSION}-py{python.replace('.', '')}\n" in DOCKERFILE
    assert CLUSTER["spec"]["rayVersion"] == RAY_VERSION
    assert f"--python {python} " in commands("setup_commands")
    assert "pip install --no-cache-dir --constraint constraints.txt ." in DOCKERFILE


def test_images_are_one() -> None:
    images = {container["image"] for template in templates() for container in template["spec"]["containers"]}
    version = raytorch.__version__
    assert len(images) == 1
    assert images.pop().endswith(f"/raytorch:{version}")


@pytest.mark.parametrize("file", ["cluster.yaml", "configs/cluster/raycluster.yaml"])
def test_what_users_must_change_is_marked_and_few(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert "Change the three lines that say" in text
    assert len(re.findall(r"\S  # CHANGE", text)) == 3


def test_the_page_names_what_is_there() -> None:
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(\.\./([^)]+)\)", page):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"(?<![\w/.])(?:configs|docs|jobs)/[\w./-]+", page):
        assert (ROOT / name).exists(), name
    roles = {node["node_config"]["IamInstanceProfile"]["Name"] for node in LAUNCHER["available_node_types"].values()}
    assert f"for ROLE in {' '.join(sorted(roles))}; do" in page
    assert f"secret generic {CLUSTER['spec']['authOptions']['secretName']} --from-file=auth_token=" in page
    assert f"service/{CLUSTER['metadata']['name']}-head-svc 8265:8265" in page

    shell = re.sub(r"^\$ ", "", "\n".join(re.findall(r"```console\n(.*?)```", page, re.DOTALL)), flags=re.MULTILINE)
    checked = subprocess.run(["bash", "-n"], input=shell, capture_output=True, encoding="utf-8")
    assert checked.returncode == 0, checked.stderr
