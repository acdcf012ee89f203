"""The package as installed: dependencies, data, commands, and users' own files next to where they run."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch import pod_steps

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS = PROJECT["project"]["scripts"]


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith(("#", "-r"))]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("file, declared", [("requirements.txt", PROJECT["project"]["dependencies"]),
                                            ("tests/requirements.txt", PROJECT["project"]["optional-dependencies"]["test"])])
def test_the_tested_versions_lie_within_the_declared_ranges(file, declared):
    ranges = {canonicalize_name(requirement.name): requirement.specifier for requirement in map(Requirement, declared)}
    versions = pinned(file)
    assert ranges.keys() == versions.keys()
    assert [name for name in versions if versions[name] not in ranges[name]] == []


def test_all_data_of_the_package_are_declared():
    package = ROOT / "dancegrpo_jax"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["dancegrpo_jax"]
    declared = {file for pattern in patterns for file in package.glob(pattern) if file.is_file()}
    data = {file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert data == declared and len(data) > 30


@pytest.mark.parametrize("command, target", SCRIPTS.items())
def test_an_installed_command_runs_its_script(command, target, monkeypatch):
    module, name = target.split(":")
    script = command.removeprefix("dancegrpo-").replace("-", "_")
    monkeypatch.setattr(f"launch.{script}.main", lambda argv: (script, argv))
    monkeypatch.setattr(sys, "argv", [command, "--option"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert getattr(importlib.import_module(module), name)() == (script, [command, "--option"])


@pytest.mark.parametrize("installed", [False, True])
def test_rewards_are_found_next_to_where_the_command_runs(installed, tmp_path):
    """In a folder that is not the repository's, with paths of the shipped config relative to the latter."""
    script, folder = ROOT / "launch/train.py", tmp_path / "folder"
    if installed:  # as pip writes it
        script = tmp_path / "dancegrpo-train"
        script.write_text("import sys\nfrom launch.commands import train\nsys.exit(train())\n")
    folder.mkdir()
    (folder / "my_rewards.py").write_text("raise ValueError('these are mine')\n")
    done = subprocess.run([sys.executable, script, "--config=configs/shapes_diffusion.py",
                           '--config.rewards={"mine": {"reward": "my_rewards:brightness"}}'], cwd=folder, timeout=300,
                          capture_output=True, text=True, env=os.environ | ({"PYTHONPATH": str(ROOT)} if installed else {}))
    assert done.returncode == 2 and "these are mine" in done.stderr, done.stderr
    assert {path.name for path in folder.iterdir()} <= {"my_rewards.py", "__pycache__"}


def test_pods_are_started_from_a_checkout_only(tmp_path, monkeypatch):
    monkeypatch.setattr(pod_steps, "ROOT", tmp_path)
    with pytest.raises(pod_steps.PodError, match="not a checkout"):
        pod_steps.requirements()
