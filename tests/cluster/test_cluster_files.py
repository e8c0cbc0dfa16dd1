"""The files of `cluster/`, checked without a cloud: by Ray's own checks, and by closed schemas of Kubernetes' kinds."""

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from ray_dfml.cli import cli
from tests.cluster import schema

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
RAY_UP = ("aws.yaml", "gcp.yaml", "machines.yaml")
KUBERAY = ("kuberay-base.yaml", "kuberay-cluster.yaml", "kuberay-job.yaml", "kuberay-sweep.yaml")
LOCK = (CLUSTER / "requirements.lock").read_text()


class NoDoubles(yaml.SafeLoader):
    """YAML whose mappings hold no key twice; PyYAML would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"{node.start_mark}: a key twice"
        return super().construct_mapping(node, deep)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.load_all((CLUSTER / name).read_text(), NoDoubles))


def resources() -> list[dict[str, Any]]:
    return [document for name in KUBERAY for document in documents(name)]


def clusters() -> list[dict[str, Any]]:
    """The spec of each RayCluster, also that within a RayJob."""
    specs = [document["spec"] for document in resources() if document["apiVersion"] == "ray.io/v1"]
    return [spec.get("rayClusterSpec", spec) for spec in specs]


def pods() -> Iterator[dict[str, Any]]:
    """The template of every pod."""
    for document in resources():
        if "submitterPodTemplate" in document["spec"]:
            yield document["spec"]["submitterPodTemplate"]
    for spec in clusters():
        yield spec["headGroupSpec"]["template"]
        yield from (group["template"] for group in spec["workerGroupSpecs"])


def test_nothing_else_is_here() -> None:
    other = {"Dockerfile", "README.md", "requirements.lock", "submit.py", "grafana.json"}
    assert {path.name for path in CLUSTER.iterdir() if path.suffix != ".pyc"} - {"__pycache__"} == {
        *RAY_UP, *KUBERAY, *other,
    }  # fmt: skip


@pytest.mark.parametrize("name", [*RAY_UP, *KUBERAY])
def test_a_file_is_tidy(name: str) -> None:
    text = (CLUSTER / name).read_text()
    assert documents(name)
    assert text.startswith("# ")
    assert text.endswith("\n")
    assert [line for line in text.splitlines() if len(line) > 120 or line != line.rstrip() or "\t" in line] == []


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_takes_the_file(name: str) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    (config,) = documents(name)
    util.validate_config(util.prepare_config(deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError):
        util.validate_config(util.prepare_config(deepcopy(config) | {"max_worker": 2}))


@pytest.mark.parametrize("name", RAY_UP)
def test_a_cluster_of_ray_up_is_guarded_and_whole(name: str) -> None:
    (config,) = documents(name)
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert any("shared" in option for option in config["docker"]["run_options"])
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    head, workers = " ".join(config["head_start_ray_commands"]), " ".join(config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "--metrics-export-port=8080" in head
    assert "--metrics-export-port=8080" in workers
    kinds = config.get("available_node_types", {"machines": config})
    assert sum(kind.get("min_workers", 0) for kind in kinds.values()) == config["max_workers"]
    assert "--num-cpus=0" in head or kinds["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize(
    "document", resources(), ids=lambda document: f"{document['kind']} {document['metadata']['name']}"
)
def test_kubernetes_takes_the_resource(document: dict[str, Any]) -> None:
    jsonschema.validate(document, schema.of(document))


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("spec", "entrypont"),
        ("spec.rayClusterSpec", "authOption"),
        ("spec.rayClusterSpec.headGroupSpec", "rayStartParam"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec", "container"),
        ("spec.rayClusterSpec.workerGroupSpecs.0", "replica"),
        ("spec.submitterPodTemplate.spec.containers.0.resources", "limit"),
    ],
)
def test_a_misspelt_key_is_found(path: str, key: str) -> None:
    (document,) = documents("kuberay-job.yaml")
    place: Any = document
    for word in path.split("."):
        place = place[int(word)] if word.isdigit() else place[word]
    place[key] = "x"
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(document, schema.of(document))


def test_every_cluster_has_a_token_and_every_pod_its_bounds() -> None:
    assert [spec["authOptions"] for spec in clusters()] == [{"mode": "token"}] * 3
    found = list(pods())
    assert len(found) == 8
    (policy,) = [document for document in resources() if document["kind"] == "NetworkPolicy"]
    for pod in found:
        assert pod["metadata"]["labels"].items() >= policy["spec"]["podSelector"]["matchLabels"].items()
        for container in pod["spec"]["containers"]:
            assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
            assert container["resources"]["limits"].get("memory") == container["resources"]["requests"]["memory"] or (
                container["name"] == "submitter"
            )


def test_nobody_from_outside_reaches_the_port_of_jobs() -> None:
    """Only pods of our own and the operator do: every other rule names a port that is not 8265."""
    (policy,) = [document["spec"] for document in resources() if document["kind"] == "NetworkPolicy"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    for rule in policy["ingress"]:
        (peer,) = rule["from"]
        own = peer == {"podSelector": policy["podSelector"]}
        operator = peer.get("podSelector") == {"matchLabels": {"app.kubernetes.io/name": "kuberay"}}
        assert own or operator or {port["port"] for port in rule["ports"]} == {8080}


@pytest.mark.parametrize("name", ["kuberay-job.yaml", "kuberay-sweep.yaml"])
def test_a_job_is_made_to_be_repeated(name: str) -> None:
    (document,) = documents(name)
    job, words = document["spec"], document["spec"]["entrypoint"].split()
    assert job["jobId"] == document["metadata"]["name"]
    assert job["backoffLimit"] > 0
    assert job["activeDeadlineSeconds"] > 0
    assert int(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    command = " ".join(words[words.index("ray-dfml") + 1 :]).replace("$again'", "--resume")
    found = cli.get_command(click.Context(cli), command.split()[0])
    assert found is not None
    found.make_context(found.name, command.split()[1:])  # its options exist
    assert "--resume" in command, "a retry goes on with what is there"
    if words[1] == "train":
        assert "--resume-or-start" in words
        (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        shards = group["replicas"] * int(container["resources"]["limits"]["cpu"])
        assert int(words[words.index("--workers") + 1]) == shards, "every processor of the workers has a shard"


def locked() -> dict[str, Version]:
    pairs = re.findall(r"^([\w.-]+)==(\S+)$", LOCK, flags=re.M)
    assert len(pairs) == len([line for line in LOCK.splitlines() if not line.startswith("#")])
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


def test_the_lock_has_every_dependency() -> None:
    needed = [
        Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    found = locked()
    wrong = [
        str(one) for one in needed if one.name.lower() not in found or found[one.name.lower()] not in one.specifier
    ]
    assert wrong == [], "make cluster/requirements.lock again; its first lines say how"


def test_rays_version_is_the_same_everywhere() -> None:
    version = str(locked()["ray"])
    files = [*CLUSTER.glob("*.yaml"), CLUSTER / "Dockerfile", CLUSTER / "README.md"]
    named = {
        path.name: re.findall(r"(?:ray:|ray|rayVersion: \"|Ray )(\d+\.\d+\.\d+)", path.read_text()) for path in files
    }
    assert {name: set(found) for name, found in named.items() if name != "kuberay-base.yaml"} == {
        path.name: {version} for path in files if path.name != "kuberay-base.yaml"
    }


PANELS = json.loads((CLUSTER / "grafana.json").read_text())["panels"]
EXPRESSIONS = {panel["title"]: target["expr"] for panel in PANELS for target in panel["targets"]}


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    source = (ROOT / "ray_dfml" / "runtime" / "ray_metrics.py").read_text()
    published = {f"ray_{name}" for name in re.findall(r'Gauge\(\s*"(\w+)"', source)}
    shown = {name for expression in EXPRESSIONS.values() for name in re.findall(r"ray_dfml_\w+", expression)}
    assert len(published) == 7
    assert shown == published


def test_promtool_takes_every_expression(tmp_path: Path) -> None:
    """Each panel's expression becomes a recording rule, with Grafana's variables filled in."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: put Prometheus on the PATH, such as Debian's package")
    filled = [expression.replace("$run", ".*") for expression in EXPRESSIONS.values()]
    rules = [{"record": f"panel:{i}", "expr": expression} for i, expression in enumerate(filled)]
    for name, wrong, code in (("good", [], 0), ("bad", [{"record": "panel:bad", "expr": "sum by ("}], 1)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules + wrong}]}))
        done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr


def test_the_image_has_what_is_copied_into_it() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY --chown=\S+ (.*) \S+$", text, flags=re.M) for word in line.split()]
    assert "ray_dfml" in sources
    assert [name for name in sources if not (ROOT / name).exists()] == []
    assert "ENV RAY_AUTH_MODE=token" in text
