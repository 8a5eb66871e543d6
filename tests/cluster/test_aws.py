"""cluster.yaml: what `ray up` makes of it before anything is launched, and what it would launch, against a mock AWS."""

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("ray")
boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto")

ROOT = Path(__file__).parent.parent.parent
REGION = "us-west-2"
MINE = "192.0.2.7/32"
GPU = {"CPU": 4, "GPU": 1, "accelerator_type:A10G": 1}


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """A new account: default network, no key, no role; and a security group as docs/CLUSTERS.md has it made."""
    from ray.autoscaler._private.aws import config, node_provider

    with pytest.MonkeyPatch.context() as patch, moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.delenv("AWS_PROFILE", raising=False)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes the ssh key that it makes to ~/.ssh
        patch.setattr(config, "time", SimpleNamespace(sleep=lambda seconds: None))  # for IAM to spread
        patch.setattr(node_provider, "list_ec2_instances", cache(lambda *_: instance_types()))
        account = boto3.resource("ec2", region_name=REGION)
        group = account.create_security_group(GroupName="raygrec", Description="raygrec")
        group.authorize_ingress(
            IpPermissions=[
                {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]},
                {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": MINE}]},
            ]
        )
        yield account


def instance_types() -> list[dict]:
    """Of the types that the file names: the whole list takes the mock ten seconds."""
    names = re.findall(r"InstanceType: (\S+)", (ROOT / "cluster.yaml").read_text())
    client = boto3.client("ec2", region_name=REGION)
    return client.describe_instance_types(InstanceTypes=sorted(set(names)))["InstanceTypes"]


def resolved(aws, **provider: object) -> dict:
    """What `ray up` works with, once the account's own facts are in place as docs/CLUSTERS.md puts them there."""
    from ray.autoscaler._private.commands import _bootstrap_config

    image = next(iter(aws.images.filter(Owners=["amazon"]))).id
    text = (ROOT / "cluster.yaml").read_text()
    config = yaml.safe_load(text.replace("ami-REPLACE", image).replace("fs-REPLACE", "fs-0123456789abcdef0"))
    config["provider"] |= provider
    return _bootstrap_config(config, no_config_cache=True)


@pytest.fixture(scope="module")
def config(aws):
    return resolved(aws)


def inbound(group) -> list[tuple]:
    """(protocol, first port, addresses, whether from the group itself) of every rule."""
    return sorted(
        (
            rule["IpProtocol"],
            rule.get("FromPort", -1),
            tuple(addresses["CidrIp"] for addresses in rule["IpRanges"]),
            [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [group.id],
        )
        for rule in group.ip_permissions
    )


def group_of(aws, config: dict):
    ids = {one for kind in config["available_node_types"].values() for one in kind["node_config"]["SecurityGroupIds"]}
    assert len(ids) == 1
    return aws.SecurityGroup(ids.pop())


def test_ray_up_accepts_it(config):
    kinds = config["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0, "train_driver": 16}
    assert kinds["head"]["max_workers"] == 0
    found = {name: dict(kind["resources"]) for name, kind in kinds.items() if name != "head"}
    assert all(resources.pop("memory") > 2**33 for resources in found.values())
    assert found == {
        "spot-1-gpu": GPU,
        "spot-4-gpu": {"CPU": 48, "GPU": 4, "accelerator_type:A10G": 1},
        "on-demand-1-gpu": GPU,
    }


def test_the_security_group_stays_as_it_was_made(aws, config):
    group = group_of(aws, config)
    assert group.group_name == "raygrec"
    assert inbound(group) == [("-1", -1, (), True), ("tcp", 22, (MINE,), False)]


def test_a_security_group_that_ray_makes_opens_ssh_only(aws):
    group = group_of(aws, resolved(aws, security_group={"GroupName": "another"}))
    assert group.group_name == "another"
    assert inbound(group) == [("-1", -1, (), True), ("tcp", 22, ("0.0.0.0/0",), False)]


def test_what_would_be_launched(aws, config):
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    launched = {}
    for name, kind in config["available_node_types"].items():
        [number] = provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)
        launched[name] = aws.Instance(number)
    assert {name: (node.instance_type, node.instance_lifecycle) for name, node in launched.items()} == {
        "head": ("m6i.2xlarge", None),
        "spot-1-gpu": ("g5.xlarge", "spot"),
        "spot-4-gpu": ("g5.12xlarge", "spot"),
        "on-demand-1-gpu": ("g5.xlarge", None),
    }
    for node in launched.values():
        assert node.metadata_options["HttpTokens"] == "required"
        assert node.placement["AvailabilityZone"] in ("us-west-2a", "us-west-2b")


@pytest.mark.parametrize(
    ("bundles", "failed", "expected"),
    [
        ([{"CPU": 1, "GPU": 1}], {}, {"spot-1-gpu": 1}),
        ([{"CPU": 1, "GPU": 1}] * 4, {}, {"spot-4-gpu": 1}),
        ([{"CPU": 1, "GPU": 1}], {"spot-1-gpu": 0.0}, {"on-demand-1-gpu": 1}),
        ([{"CPU": 1, "GPU": 1}], {"spot-1-gpu": 1.0}, {"spot-1-gpu": 1}),  # and again once it has recovered
    ],
)
def test_what_the_autoscaler_asks_for(config, bundles, failed, expected):
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    wanted = AutoscalingConfig({key: value for key, value in config.items() if key != "head_node"}, True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=wanted.get_node_type_configs(),
        max_num_nodes=wanted.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(bundle) for bundle in bundles]),
        recoverable_resource_availabilities=failed,
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == expected


def test_every_node_has_the_token_and_no_file_has_it():
    text = (ROOT / "cluster.yaml").read_text()
    config = yaml.safe_load(text)
    options = config["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options
    [path] = [option.partition("=")[2] for option in options if "RAY_AUTH_TOKEN_PATH" in option]
    assert config["file_mounts"][os.path.dirname(path)].startswith("~/")
    assert "RAY_AUTH_TOKEN=" not in text
    dashboard = [part for part in config["head_start_ray_commands"][-1].split() if "dashboard-host" in part]
    assert dashboard == ["--dashboard-host=127.0.0.1"]


def test_images_have_the_ray_that_the_constraints_name():
    [version] = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    text = (ROOT / "cluster.yaml").read_text() + (ROOT / "Dockerfile").read_text()
    images = re.findall(r"rayproject/ray:(\S+)", text)
    assert set(images) == {f"{version}-py311", f"{version}-py311-gpu"}


def test_commands_are_shell():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for key in (key for key in config if key.endswith("_commands")):
        for command in config[key]:
            subprocess.run(["bash", "-n", "-c", command], check=True)
