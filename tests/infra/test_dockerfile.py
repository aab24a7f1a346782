"""The Dockerfile copies existing files, installs the versions of the lock file, and has a supported Python.

No test builds the image, because a build needs a daemon and the network.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ray._private.thirdparty.pathspec import PathSpec

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEEDED = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["eval"]


@pytest.fixture(scope="module")
def steps():
    """(instruction, value) of every step, in order."""
    parsed = DockerfileParser(path=str(DOCKERFILE), env_replace=False)
    return [(step["instruction"], step["value"]) for step in parsed.structure]


def copied(steps):
    """Paths of the repository that the image is made from."""
    return [word for kind, value in steps if kind == "COPY" and "--from" not in value
            for word in value.split()[:-1] if not word.startswith("--")]  # fmt: skip


def test_hadolint_and_the_shell_report_no_problem():
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_image_has_a_supported_python(steps):
    [version] = [value.removeprefix("PYTHON_VERSION=") for kind, value in steps if "PYTHON_VERSION=" in value]
    assert version in SpecifierSet(PROJECT["project"]["requires-python"])
    bases = [value for kind, value in steps if kind == "FROM"]
    assert all(base.startswith("python:${PYTHON_VERSION}-slim-") for base in bases)
    assert len({base.split()[0] for base in bases}) == 1  # a virtual environment moves only to the same Python


def test_copied_files_exist_in_the_build_context_and_installed_packages_are_copied(steps):
    ignored = PathSpec.from_lines("gitwildmatch", _as_git_reads((ROOT / ".dockerignore").read_text().splitlines()))
    for name in copied(steps):
        path = ROOT / name
        assert path.exists()
        files = (
            [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
        )
        assert not [f for f in files if ignored.match_file(f.relative_to(ROOT).as_posix())]
    found = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    installed = {pattern.removesuffix("*") for pattern in found}
    assert installed | {"pyproject.toml", "requirements.lock", "README.md", "infra"} <= {
        name.removeprefix("./") for name in copied(steps)
    }


def test_history_artefacts_and_tests_are_not_in_the_build_context():
    ignored = PathSpec.from_lines("gitwildmatch", _as_git_reads((ROOT / ".dockerignore").read_text().splitlines()))
    for name in (
        ".git/config",
        ".venv/bin/python",
        "workdir/x",
        "mlflow.db",
        "tests/support/tiny.py",
        "pipelines/__pycache__/x",
    ):
        assert ignored.match_file(name), name


def test_dependencies_come_from_pyproject_at_the_versions_of_the_lock_file(steps):
    pip = [value for kind, value in steps if kind == "RUN" and "pip install" in value]
    assert "--requirement requirements.txt --constraint requirements.lock" in pip[0]
    assert "--no-deps" in pip[1]  # the project itself, after its dependencies
    lines = (line.split("==") for line in (ROOT / "requirements.lock").read_text().split())
    locked = {canonicalize_name(name): version for name, version in lines}
    for line in NEEDED:
        wanted = Requirement(line)
        assert locked[canonicalize_name(wanted.name)] in wanted.specifier


@pytest.mark.parametrize(("torch", "code", "index"), [("cpu", 0, "https://a"), ("cuda", 0, ""), ("rocm", 2, "")])
def test_the_build_argument_chooses_the_index_of_torch(steps, tmp_path, torch, code, index):
    [script] = [value for kind, value in steps if kind == "RUN" and value.startswith("case")]
    (tmp_path / "pip").write_text('#!/bin/sh\necho "[$PIP_EXTRA_INDEX_URL] $@"\n')
    (tmp_path / "pip").chmod(0o755)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    env = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin", "TORCH": torch,
           "TORCH_CPU_INDEX": "https://a"}  # fmt: skip
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code
    if code == 0:
        assert done.stdout == f"[{index}] install --requirement requirements.txt --constraint requirements.lock\n"
        assert (tmp_path / "requirements.txt").read_text().split("\n")[:-1] == NEEDED
    else:
        assert done.stderr == "TORCH is rocm; give cpu or cuda\n"


def test_the_image_runs_without_root_and_has_its_revision(steps):
    assert [value for kind, value in steps if kind == "USER"] == ["1000"]
    assert "TIDAR_REVISION=$REVISION" in next(value for kind, value in reversed(steps) if kind == "ENV")
    last = steps[[kind for kind, _ in steps].index("USER") :]
    assert ("WORKDIR", "/home/tidar") in last  # relative paths such as `infra/jobs/...` start here
    assert ("COPY", "--chown=1000 infra /home/tidar/infra") in steps


def _as_git_reads(lines):
    """.dockerignore's `!name` brings a whole folder back; .gitignore needs a second line for its content."""
    return [line for given in lines for line in ((given, f"{given}/**") if given.startswith("!") else (given,))]
