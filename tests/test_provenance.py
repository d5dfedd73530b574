"""The record of a number's origin: the commit of a checkout alone, versions without metadata."""

import importlib.metadata
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

import pae_jax
from pae_jax.config import Config
from pae_jax.workdir import provenance

PACKAGE = Path(pae_jax.__file__).parent


def git(directory: Path, *words: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *words]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def make_repository(root: Path) -> str:
    """Commits all files below `root` to a new repository; returns the commit."""
    (root / "README.md").write_text("a repository\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message=one")
    return git(root, "rev-parse", "HEAD")


@pytest.fixture
def copy_package(monkeypatch):
    """Copies the package into a folder and lets provenance.py run from the copy."""

    def copy(folder: Path) -> None:
        shutil.copytree(PACKAGE, folder / "pae_jax", ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(provenance, "__file__", str(folder / "pae_jax/workdir/provenance.py"))

    return copy


def test_the_commit_of_a_checkout(tmp_path, copy_package):
    copy_package(tmp_path)
    commit = make_repository(tmp_path)
    assert provenance.commit() == commit
    (tmp_path / "untracked.txt").write_text("a result\n")
    assert provenance.commit() == commit
    # The index is not refreshed, for which git would lock it against the user's own commands.
    index = (tmp_path / ".git/index").read_bytes()
    os.utime(tmp_path / "README.md", (0, 0))
    assert provenance.commit() == commit
    assert (tmp_path / ".git/index").read_bytes() == index
    (tmp_path / "pae_jax/rng.py").write_text("# changed\n")
    assert provenance.commit() == f"{commit}+"


@pytest.mark.parametrize("tracked", [True, False])
def test_an_enclosing_repository_is_not_reported(tmp_path, copy_package, tracked):
    """Neither where the package is installed or unpacked below the top level of another one."""
    site_packages = tmp_path / "venv/lib/site-packages"
    if tracked:
        copy_package(site_packages)
        make_repository(tmp_path)
    else:
        make_repository(tmp_path)
        copy_package(site_packages)
    assert git(site_packages, "rev-parse", "HEAD")
    assert provenance.commit() is None


def test_a_repository_that_does_not_track_the_package_is_not_reported(tmp_path, copy_package):
    make_repository(tmp_path)
    copy_package(tmp_path)
    assert provenance.commit() is None


def test_no_commit_outside_a_repository_or_without_git(tmp_path, copy_package, monkeypatch):
    copy_package(tmp_path)
    assert provenance.commit() is None
    make_repository(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None


def test_packages_without_metadata(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    record = provenance.describe(Config(), step=3)
    versions = record["versions"]
    assert versions.pop("pae_jax") == pae_jax.__version__
    assert versions.pop("python")
    assert versions.keys() == {*provenance.PACKAGES} - {"pae_jax"}
    assert set(versions.values()) == {None}
    assert json.loads(json.dumps(record))["versions"]["jax"] is None
    assert ", jax unknown; commit " in provenance.line("jax")


def test_versions_of_installed_packages():
    assert provenance.version("jax") == jax.__version__
    assert f", jax {jax.__version__}; commit " in provenance.line("jax")
