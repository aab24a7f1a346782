"""The manifests follow the schemas of KubeRay, Kubernetes and Prometheus' operator, and fit their job files."""

import importlib
import tomllib
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError, validators
from pydantic import ValidationError as FieldError

from pipelines.evaluation.job import EvaluateJob
from pipelines.jobs import PackJob, TrainJob, read_job
from serve_apps import shared_cluster
from serve_apps.deployment import read_settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra/k8s"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
SCHEMA = yaml.safe_load((Path(__file__).parent / "schemas/kuberay-1.6.2.yaml").read_text())
KUBERNETES = "cloudcoil.models.kubernetes"
CORE = (
    "Pod", "PodTemplateSpec", "Service", "PersistentVolumeClaim", "EnvVar", "EnvVarSource", "EnvFromSource",
    "VolumeMount", "SecurityContext", "ResourceRequirements",
)  # fmt: skip
HOMES = {
    **dict.fromkeys(CORE, f"{KUBERNETES}.core.v1"),
    "Deployment": f"{KUBERNETES}.apps.v1",
    "ObjectMeta": "cloudcoil.apimachinery",
    "PodMonitor": "cloudcoil.models.prometheus_operator.v1",
}
"""Modules with the models of Kubernetes 1.32 and Prometheus' operator 0.80, made from their schemas."""
S3 = [{"secretRef": {"name": "tidar-s3"}}]
JOBS = {"pack": PackJob, "train": TrainJob, "evaluate": EvaluateJob}


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


def only(name):
    [document] = documents(FOLDER / name)
    return document


def check_kubernetes(name, value):
    """Raise FieldError if a value has the wrong type, AssertionError if a field does not exist."""
    parsed = getattr(importlib.import_module(HOMES[name]), name).model_validate(value)
    known = parsed.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert known == value


def check_ray(manifest):
    """Raise ValidationError if it is no RayJob or RayService. `check_kubernetes` checks Kubernetes' own parts."""

    def kubernetes(_validator, name, value, _schema):
        check_kubernetes(name, value)
        return ()

    Draft202012Validator.check_schema(SCHEMA)
    branch = {"$ref": f"#/$defs/{manifest['kind']}", "$defs": SCHEMA["$defs"]}
    validators.extend(Draft202012Validator, {"x-kubernetes": kubernetes})(branch).validate(manifest)


def cluster(manifest):
    return manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]


def pods(manifest):
    """Pods of a manifest: of every group of a Ray cluster, of a deployment, or a pod by itself."""
    if manifest["apiVersion"] == "ray.io/v1":
        groups = [cluster(manifest)["headGroupSpec"], *cluster(manifest)["workerGroupSpecs"]]
        return [group["template"]["spec"] for group in groups]
    return {"Deployment": lambda spec: [spec["template"]["spec"]], "Pod": lambda spec: [spec]}.get(
        manifest["kind"], lambda spec: []
    )(manifest["spec"])


def containers(manifest):
    return [container for pod in pods(manifest) for container in pod["containers"]]


def most(manifest, resource):
    """Amount of a resource that all workers have together."""
    groups = cluster(manifest)["workerGroupSpecs"]
    limits = [(g["maxReplicas"], g["template"]["spec"]["containers"][0]["resources"]["limits"]) for g in groups]
    return sum(replicas * float(limit.get(resource, 0)) for replicas, limit in limits)


ALL = [pytest.param(m, id=f"{path.name}-{m['kind']}") for path in MANIFESTS for m in documents(path)]
RAY = [p for p in ALL if p.values[0]["apiVersion"] == "ray.io/v1"]


@pytest.mark.parametrize("manifest", ALL)
def test_every_manifest_follows_its_schema(manifest):
    if manifest["apiVersion"] == "ray.io/v1":
        check_ray(manifest)
    else:
        check_kubernetes(manifest["kind"], manifest)


def test_a_misspelt_or_mistyped_field_is_refused_at_every_level():
    job = only("rayjob.train.yaml")
    cluster(job)["workerGroupSpecs"][0]["maxReplica"] = 1
    with pytest.raises(ValidationError, match="maxReplica"):
        check_ray(job)
    job = only("rayjob.train.yaml")
    cluster(job)["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(ValidationError, match="not of type 'string'"):
        check_ray(job)
    job = only("rayjob.train.yaml")
    containers(job)[0]["envForm"] = []
    with pytest.raises(AssertionError):
        check_ray(job)
    job = only("rayjob.train.yaml")
    containers(job)[0]["ports"][0]["containerPort"] = "gcs"
    with pytest.raises(FieldError, match="containerPort"):
        check_ray(job)
    service = only("rayservice.yaml")
    service["spec"]["upgradeStrategy"] = {"clusterUpgradeOptions": {"gatewayClassName": "istio"}}
    with pytest.raises(ValidationError, match="'intervalSeconds' is a required property"):
        check_ray(service)
    del service["spec"]["upgradeStrategy"], service["spec"]["rayClusterConfig"]
    with pytest.raises(ValidationError, match="'rayClusterConfig' is a required property"):
        check_ray(service)
    monitor = documents(FOLDER / "podmonitor.yaml")[0]
    monitor["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    with pytest.raises(AssertionError):
        check_kubernetes("PodMonitor", monitor)


SUCCEEDED = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED"}}


@pytest.mark.parametrize(
    ("strategy", "taken"),
    [
        ({"deletionRules": [SUCCEEDED]}, True),
        ({"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteNone"}}, True),
        ({"onSuccess": {"policy": "DeleteSelf"}}, False),
        ({"onSuccess": {"policy": "DeleteSelf"}, "deletionRules": [SUCCEEDED]}, False),
        ({"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 1}}]}, False),
        (
            {"deletionRules": [SUCCEEDED | {"condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}]},
            False,
        ),
        ({"deletionRules": [SUCCEEDED | {"condition": {"jobStatus": "STOPPED"}}]}, False),
        ({}, False),
    ],
)
def test_a_job_is_cleaned_up_by_rules_or_by_both_policies_and_a_rule_waits_for_one_state(strategy, taken):
    job = only("rayjob.train.yaml")
    job["spec"]["deletionStrategy"] = strategy
    if taken:
        check_ray(job)
    else:
        with pytest.raises(ValidationError):
            check_ray(job)


@pytest.mark.parametrize("stage", JOBS)
def test_a_rayjob_may_be_submitted_again(stage):
    assert only(f"rayjob.{stage}.yaml")["spec"]["backoffLimit"] >= 1


@pytest.mark.parametrize("stage", JOBS)
def test_a_rayjob_runs_its_stage_and_its_workers_have_the_resources_of_the_job_file(stage):
    manifest = only(f"rayjob.{stage}.yaml")
    assert manifest["spec"]["entrypoint"] == f"python -m tidar {stage} infra/jobs/{stage}.full.yaml"
    job = read_job(JOBS[stage], ROOT / f"infra/jobs/{stage}.full.yaml")
    cpus, gpus = {
        "pack": lambda: (job.workers, 0),
        "train": lambda: (job.workers * job.cpus_per_worker, job.workers * job.gpus_per_worker),
        "evaluate": lambda: (job.cpus, job.gpus),
    }[stage]()
    assert most(manifest, "cpu") >= cpus
    assert most(manifest, "nvidia.com/gpu") >= gpus


def test_the_service_s_workers_have_room_for_every_replica():
    settings, manifest = read_settings(ROOT / "infra/serve.settings.yaml"), only("rayservice.yaml")
    assert most(manifest, "nvidia.com/gpu") >= settings.max_replicas * settings.num_gpus > 0
    assert most(manifest, "cpu") > settings.max_replicas * settings.num_cpus
    ports = {port["name"]: port["containerPort"] for port in containers(manifest)[0]["ports"]}
    assert ports["serve"] == settings.port


def test_a_node_that_is_removed_lets_its_replicas_finish_first():
    [pod] = [group["template"]["spec"] for group in cluster(only("rayservice.yaml"))["workerGroupSpecs"]]
    env = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    settings = read_settings(ROOT / "infra/serve.settings.yaml")
    assert settings.drain_seconds < drain < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("manifest", RAY)
def test_workers_scale_between_their_bounds_and_need_a_token(manifest):
    spec = cluster(manifest)
    assert spec["enableInTreeAutoscaling"] is True
    assert all(group["minReplicas"] < group["maxReplicas"] for group in spec["workerGroupSpecs"])
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


@pytest.mark.parametrize("manifest", [p for p in ALL if containers(p.values[0])])
def test_credentials_are_references_and_nothing_runs_as_root(manifest):
    for container in containers(manifest):
        assert container.get("envFrom", S3) == S3
        assert not any(variable["name"].startswith("AWS_") for variable in container.get("env", []))
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["limits"]["memory"]
    for pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000


def test_every_pod_that_uses_s3_has_the_credentials():
    s3 = [containers(p.values[0]) for p in RAY] + [
        containers(m) for m in documents(FOLDER / "mlflow.yaml") if m["kind"] == "Deployment"
    ]
    assert all(container["envFrom"] == S3 for group in s3 for container in group)


def test_every_volume_has_a_claim_and_models_are_at_the_path_of_the_job_files():
    everything = [m for path in MANIFESTS for m in documents(path)]
    claims = {m["metadata"]["name"] for m in everything if m["kind"] == "PersistentVolumeClaim"}
    mounts = {}
    for manifest in everything:
        for pod in pods(manifest):
            wanted = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod.get("volumes", [])}
            assert set(wanted.values()) <= claims
            mounts[manifest["metadata"].get("generateName", "")] = {
                m["mountPath"]: wanted[m["name"]] for c in pod["containers"] for m in c.get("volumeMounts", [])
            }
    for stage, key in (("pack", "tokenizer"), ("train", "init_from")):
        job = read_job(JOBS[stage], ROOT / f"infra/jobs/{stage}.full.yaml")
        assert str(getattr(job, key)).startswith("/models/")
        assert mounts[f"tidar-{stage}-"] == {"/models": "tidar-models"}


def test_images_and_ray_have_the_tested_versions():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    [ray] = [x[len("ray==") :] for x in (ROOT / "requirements.lock").read_text().split() if x.startswith("ray==")]
    for path in MANIFESTS:
        for manifest in documents(path):
            for container in containers(manifest):
                assert container["image"] in {
                    f"registry.example.com/tidar:{version}-{kind}" for kind in ("cpu", "cuda")
                }
                gpus = container["resources"]["limits"].get("nvidia.com/gpu")
                assert not gpus or container["image"].endswith("-cuda")
            if manifest["apiVersion"] == "ray.io/v1":
                assert cluster(manifest)["rayVersion"] == ray


def test_every_tracking_uri_is_the_address_of_the_mlflow_service():
    [service] = [m for m in documents(FOLDER / "mlflow.yaml") if m["kind"] == "Service"]
    [deployment] = [m for m in documents(FOLDER / "mlflow.yaml") if m["kind"] == "Deployment"]
    host, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    for path in [*(ROOT / "infra/jobs").glob("*.full.yaml"), ROOT / "infra/serve.settings.yaml"]:
        assert yaml.safe_load(path.read_text()).get("tracking_uri", f"http://{host}:{port}") == f"http://{host}:{port}"
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    [container] = containers(deployment)
    allowed = next(word for word in container["command"] if word.startswith("--allowed-hosts="))
    assert f"{host}:{port}" in allowed.removeprefix("--allowed-hosts=").split(",")
    assert f"--port={port}" in container["command"]


def test_nodes_of_the_service_have_the_environment_of_a_local_service():
    cluster = only("rayservice.yaml")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert (
            environment.items()
            >= (
                shared_cluster.RAY_FAST_PATH_ENV
                | shared_cluster.UNBOUNDED_HEADERS_ENV
                | shared_cluster.KILL_HUNG_REPLICAS_ENV
                | shared_cluster.PATIENT_START_ENV
            ).items()
        )


def test_tidar_metrics_are_read_from_the_head_s_proxy_alone():
    ours, rays = documents(FOLDER / "podmonitor.yaml")
    spec = cluster(only("rayservice.yaml"))
    wanted = ours["spec"]["selector"]["matchLabels"].items()
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    read = [g for g in groups if wanted <= g["template"]["metadata"]["labels"].items()]
    assert read == [spec["headGroupSpec"]]
    [endpoint] = ours["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["port"] in {p["name"] for p in containers(only("rayservice.yaml"))[0]["ports"]}
    [endpoint] = rays["spec"]["podMetricsEndpoints"]
    for manifest in (p.values[0] for p in RAY):
        for container in containers(manifest):
            assert endpoint["port"] in {port["name"] for port in container["ports"]}
