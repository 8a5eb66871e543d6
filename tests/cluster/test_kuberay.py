"""jobs/rayjob.yaml against the fields of the KubeRay resource that it uses.

The schema is written by hand after the types of KubeRay's ray.io/v1 API as of v1.7: of each section its required
fields, and the names, as far as the file uses them; the API server drops names that it does not know.
"""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from raygrec.config import apply_overrides, read_yaml
from raygrec.train.settings import run_config

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "jobs" / "rayjob.yaml").read_text()
JOB = yaml.safe_load(TEXT)
CLUSTER = JOB["spec"]["rayClusterSpec"]


def section(required: str = "", optional: str = "", **inside: dict) -> dict:
    names = [*required.split(), *optional.split(), *inside]
    properties = {name: inside.get(name, {}) for name in names}
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


START = {"type": "object", "additionalProperties": {"type": "string"}}
CONTAINER = section("name", "image resources volumeMounts env command args ports")
POD = section(
    "containers",
    "restartPolicy volumes tolerations nodeSelector terminationGracePeriodSeconds",
    containers={"type": "array", "minItems": 1, "items": CONTAINER},
)
TEMPLATE = section("spec", "metadata", spec=POD)
HEAD = section("template", "serviceType", template=TEMPLATE, rayStartParams=START)
WORKERS = section(
    "groupName minReplicas maxReplicas template",
    "replicas numOfHosts idleTimeoutSeconds",
    template=TEMPLATE,
    rayStartParams=START,
)
SCHEMA = section(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    spec=section(
        "",
        "activeDeadlineSeconds suspend metadata",
        entrypoint={"type": "string"},
        entrypointResources={"type": "string"},
        runtimeEnvYAML={"type": "string"},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        backoffLimit={"type": "integer"},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished={"type": "integer"},
        rayClusterSpec=section(
            "headGroupSpec",
            rayVersion={"type": "string"},
            enableInTreeAutoscaling={"type": "boolean"},
            authOptions=section(mode={"enum": ["disabled", "token"]}, secretName={"type": "string"}),
            autoscalerOptions=section(
                version={"enum": ["v1", "v2"]},
                idleTimeoutSeconds={"type": "integer"},
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            ),
            headGroupSpec=HEAD,
            workerGroupSpecs={"type": "array", "items": WORKERS},
        ),
    ),
)


def test_the_fields_are_those_of_the_resource():
    jsonschema.validate(JOB, SCHEMA)


def test_the_schema_finds_what_is_wrong():
    for key, value in (("headGroupSpec", None), ("authOptions", {"mode": "tokens"}), ("autoscaler", {})):
        spec = {name: part for name, part in {**CLUSTER, key: value}.items() if part is not None}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**JOB, "spec": {**JOB["spec"], "rayClusterSpec": spec}}, SCHEMA)


def test_the_entrypoint_is_a_valid_run_that_fits_the_pods():
    program, script, config, *arguments = shlex.split(JOB["spec"]["entrypoint"])
    assert program == "python"
    files = [ROOT / Path(one).relative_to("/home/ray/raygrec") for one in (script, config)]
    assert all(file.is_file() for file in files)
    overrides = [argument for argument in arguments if not argument.startswith("--")]
    cluster = run_config(apply_overrides(read_yaml(files[1]), overrides), "rayjob").cluster
    [group] = CLUSTER["workerGroupSpecs"]
    pod = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert cluster.gpus_per_worker <= int(pod["nvidia.com/gpu"])
    assert cluster.cpus_per_worker <= int(pod["cpu"])
    assert cluster.workers <= group["maxReplicas"]
    assert group["minReplicas"] == group["replicas"] == 0
    environment = yaml.safe_load(JOB["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment["RAYGREC_AUTOSCALING"] == "1"


def test_drivers_have_their_place_on_the_head_alone():
    wanted = json.loads(JOB["spec"]["entrypointResources"])
    head = CLUSTER["headGroupSpec"]["rayStartParams"]
    [resources] = shlex.split(head["resources"])  # through a shell, it reaches `ray start`
    there = json.loads(resources.replace("\\", ""))
    assert there.items() >= {name: 16 for name in wanted}.items()
    assert head["num-cpus"] == "0"


def test_the_token_comes_from_a_secret():
    assert CLUSTER["authOptions"] == {"mode": "token", "secretName": "raygrec-token"}
    assert "RAY_AUTH_TOKEN" not in TEXT


def test_ray_is_the_images_ray():
    assert f"rayproject/ray:{CLUSTER['rayVersion']}-py311-gpu" in (ROOT / "Dockerfile").read_text()
