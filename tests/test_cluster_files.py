"""The cluster files: each is what Ray's launcher, or the KubeRay operator, takes; and they agree with each other."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
LAUNCHER = [ROOT / "ray_cluster.yaml", ROOT / "clusters" / "gcp.yaml", ROOT / "clusters" / "on_premises.yaml"]
KUBERAY = [ROOT / "clusters" / "kuberay_cluster.yaml", ROOT / "clusters" / "kuberay_job.yaml"]
SHARED = "/mnt/polyprompt"
Table = dict[str, Any]


def launcher(path: Path) -> Table:
    config: Table = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    return config


def documents(kind: str) -> list[Table]:
    found = [d for path in KUBERAY for d in yaml.safe_load_all(path.read_text()) if d["kind"] == kind]
    assert found, f"no {kind} in {KUBERAY}"
    return found


def cluster_specs() -> list[Table]:
    clusters = [document["spec"] for document in documents("RayCluster")]
    return clusters + [document["spec"]["rayClusterSpec"] for document in documents("RayJob")]


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_ray_takes_the_launcher_file(path: Path) -> None:
    config = launcher(path)
    assert config["cluster_name"] == "polyprompt"
    assert 0 < config["idle_timeout_minutes"] <= 30


def test_ray_refuses_what_is_wrong() -> None:
    """Or the test above would say nothing."""
    config = yaml.safe_load(LAUNCHER[0].read_text())
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuets"):
        validate_config(prepare_config({**config, "idle_timeout_minuets": 3}))
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config({**config, "head_node_type": "haed"}))


@pytest.mark.parametrize("path", LAUNCHER[:2], ids=lambda path: path.stem)
def test_the_head_trains_nothing_and_idle_gpus_go(path: Path) -> None:
    config = launcher(path)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["resources"]["GPU"] >= 1
        assert worker["resources"]["CPU"] >= worker["resources"]["GPU"]


def test_the_head_of_ones_own_machines_trains_nothing() -> None:
    config = launcher(LAUNCHER[2])
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_nodes_get_the_pinned_dependencies_the_environment_and_the_token(path: Path) -> None:
    config = launcher(path)
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).is_file()  # `ray up` is run in the repository's folder
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for setup in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert any("install" in line and "constraints.txt" in line for line in setup)
        assert any("environment.sh" in line for line in setup)
        assert not any("#" in line for line in setup)  # Ray writes more behind a command on its line
    environment = (ROOT / "clusters" / "environment.sh").read_text()
    assert f"export POLYPROMPT_HOME={SHARED}" in environment
    assert "export RAY_AUTH_MODE=token" in environment


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_no_port_is_opened_to_the_world(path: Path) -> None:
    start = launcher(path)["head_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in start[-1]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start[-1]
    assert "MLFLOW_TRACKING_URI=http://$(hostname -I" in start[-1]
    assert not any("0.0.0.0" in line for line in start)


def test_kuberay_files_have_what_the_operator_requires() -> None:
    """The required fields of ray.io/v1 (KubeRay 1.6's custom resource definitions)."""
    for document in documents("RayCluster") + documents("RayJob"):
        assert document["apiVersion"] == "ray.io/v1"
        assert document["metadata"]["name"]
    for spec in cluster_specs():
        head = spec["headGroupSpec"]
        assert head["template"]["spec"]["containers"][0]["image"]
        for group in spec["workerGroupSpecs"]:
            assert {"groupName", "minReplicas", "maxReplicas", "template"} <= group.keys()
            assert group["template"]["spec"]["containers"][0]["image"]


def test_kuberay_clusters_mean_the_same() -> None:
    for spec in cluster_specs():
        head, groups = spec["headGroupSpec"], spec["workerGroupSpecs"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["enableInTreeAutoscaling"] is True
        assert {group["minReplicas"] for group in groups} == {0}
        assert f"ray=={spec['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
        for template in [head["template"], *(group["template"] for group in groups)]:
            container = template["spec"]["containers"][0]
            assert {"name": "POLYPROMPT_HOME", "value": SHARED} in container["env"]
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts["shared"] == SHARED
            [volume] = [volume for volume in template["spec"]["volumes"] if volume["name"] == "shared"]
            assert volume["persistentVolumeClaim"]["claimName"] == "polyprompt"
        for group in groups:
            assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    [first, second] = cluster_specs()
    assert first == second
    [claim] = documents("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_kuberay_job_ends_and_leaves_no_cluster() -> None:
    [job] = documents("RayJob")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"].endswith(".zip")
    _, script, recipe = spec["entrypoint"].split()
    assert (ROOT / script).is_file()
    assert (ROOT / recipe).is_file()


def test_the_image_has_the_versions_of_the_constraints() -> None:
    dockerfile = (ROOT / "clusters" / "Dockerfile").read_text()
    [version] = {spec["rayVersion"] for spec in cluster_specs()}
    assert f"FROM rayproject/ray:{version}-py311" in dockerfile
    assert "constraints.txt" in dockerfile


def test_a_job_brings_the_code_and_nothing_heavy(tmp_path: Path) -> None:
    """What `ray job submit --working-dir .` packs."""
    here = tmp_path / "here"
    for folder in ("platform", "jobs", "tuning"):
        shutil.copytree(ROOT / folder, here / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml"):
        shutil.copy(ROOT / name, here)
    left = [
        ".git/index",
        ".venv/bin/python",
        "tests/test_run.py",
        "docs/cluster.md",
        "runs/mine/bundles/step_00000001/state.json",
        "models/t5/model.safetensors",
        "mlflow.db",
        "mlartifacts/1/x",
    ]
    taken = ["platform/polyprompt/embedded/model.safetensors", "data/mine/train.jsonl"]
    for name in left + taken:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).touch()
    excludes = get_runtime_env_default_excludes()
    create_package(str(here), tmp_path / "job.zip", include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        packed = {info.filename for info in archive.infolist()}
        size = sum(info.file_size for info in archive.infolist())
    assert not packed & set(left)
    code = ["platform/polyprompt/ray_train.py", "jobs/multitask.py", "jobs/recipes/embedded.yaml", "tuning/search.py"]
    assert {*taken, *code} <= packed
    assert size < 50 * 2**20
