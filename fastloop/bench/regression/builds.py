# SPDX-License-Identifier: Apache-2.0
"""Builds of two revisions of a project, each in a folder of its own, kept by what went into them."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

BUILD_SECONDS = 1800.0
TAIL = 3000


class BuildError(Exception):
    """A revision that is not there, or that does not build."""


@dataclass(frozen=True)
class Build:
    """One revision, ready to be imported.

    Args:
        name: what was asked for, "working tree" for the checkout as it is.
        commit: short hash, with "-dirty" where the checkout differs from it.
        tree: git's hash of the content.
        source: folder of the sources.
        path: folders that come first on sys.path.
    """

    name: str
    commit: str
    tree: str
    source: Path
    path: tuple[str, ...]


def _git(repository: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    run = subprocess.run(
        ["git", "-C", str(repository), *arguments],
        capture_output=True, text=True, check=False, env=None if environment is None else dict(environment),
    )  # fmt: skip
    if run.returncode:
        raise BuildError(f"[bench] git {' '.join(arguments)}: {run.stderr.strip() or run.returncode}")
    return run.stdout.strip("\n")


def repository_of(folder: Path) -> Path:
    """The top of the checkout that a folder is in. Raises BuildError outside of one."""
    if shutil.which("git") is None:
        raise BuildError("[bench] comparing revisions needs git; install it")
    return Path(_git(folder, "rev-parse", "--show-toplevel"))


def revision(repository: Path, name: str | None) -> tuple[str, str]:
    """(commit, tree) of a revision; of the checkout as it is, untracked files included, for None.

    Raises:
        BuildError: no such revision.
    """
    if name is not None:
        try:
            commit = _git(repository, "rev-parse", "--verify", "--quiet", "--short=12", f"{name}^{{commit}}")
        except BuildError:
            raise BuildError(
                f"[bench] there is no revision {name!r} here; in a shallow clone fetch it first: git fetch --unshallow"
            ) from None
        return commit, _git(repository, "rev-parse", f"{commit}^{{tree}}")
    with tempfile.TemporaryDirectory() as folder:  # an index of our own: the user's stays as it is
        environment = {**os.environ, "GIT_INDEX_FILE": str(Path(folder) / "index")}
        users = repository / _git(repository, "rev-parse", "--git-path", "index")
        if users.exists():  # it knows which files are as they were: these are not read again
            shutil.copy2(users, environment["GIT_INDEX_FILE"])
        else:
            _git(repository, "read-tree", "HEAD", environment=environment)
        _git(repository, "add", "--all", environment=environment)
        tree = _git(repository, "write-tree", environment=environment)
    commit = _git(repository, "rev-parse", "--short=12", "HEAD")
    clean = tree == _git(repository, "rev-parse", "HEAD^{tree}")
    return (commit if clean else f"{commit}-dirty"), tree


def checkout(repository: Path) -> str:
    """The commit of the checkout, with "-dirty" where it differs from it; unlike `revision` this writes nothing."""
    commit = _git(repository, "rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if _git(repository, "status", "--porcelain") else commit


def changed_files(repository: Path, base: str, head: str) -> list[str]:
    """Paths that differ between two trees; of a file that was moved both."""
    paths = _git(repository, "diff", "--name-only", "--no-renames", "-z", base, head)
    return [path for path in paths.split("\0") if path]


def hide(cache: Path) -> None:
    """Make the folder of builds, unseen by git where it is under `.fastloop`."""
    cache.mkdir(parents=True, exist_ok=True)
    ignore = cache.parent / ".gitignore"
    if cache.parent.name == ".fastloop" and not ignore.exists():
        ignore.write_text("*\n", encoding="utf-8")


def _environment() -> dict[str, str]:
    """For pip: this interpreter's tools, and no CUDA kernels where nothing could run them; they take two minutes."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cuda = "AUTO" if torch.cuda.is_available() else "OFF"
    return {"FASTLOOP_CUDA": cuda, **os.environ, "PATH": tools}


def _key(tree: str, install: bool) -> str:
    """What decides how a build comes out: sources, interpreter, torch, compiler switches."""
    switches = sorted(
        f"{name}={value}" for name, value in _environment().items() if name.startswith(("FASTLOOP_", "CXX"))
    )
    parts = (tree, str(install), sys.version, platform.machine(), torch.__version__, *switches)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _export(repository: Path, tree: str, folder: Path) -> None:
    """The files of a tree, without its history."""
    folder.mkdir(parents=True)
    archive = subprocess.Popen(["git", "-C", str(repository), "archive", tree], stdout=subprocess.PIPE)
    unpack = subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=False)
    assert archive.stdout is not None
    archive.stdout.close()
    if archive.wait() or unpack.returncode:
        raise BuildError(f"[bench] cannot unpack tree {tree} into {folder}")


def _is_package(source: Path) -> bool:
    """Whether pip can install it: many a pyproject.toml only configures tools."""
    project = source / "pyproject.toml"
    text = project.read_text(encoding="utf-8", errors="replace") if project.exists() else ""
    table = re.search(r"^\s*\[\s*(project|build-system)\s*\]", text, re.MULTILINE)
    return table is not None or (source / "setup.py").exists()


def _install(source: Path, site: Path) -> None:
    """`pip install` into a folder, with the tools and the dependencies of this environment."""
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--no-build-isolation", "--no-compile", "--target", str(site), str(source),
    ]  # fmt: skip
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS,
            env=_environment(), cwd=source,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BuildError(f"[bench] the build did not end within {BUILD_SECONDS:.0f} s: {source}") from None
    if run.returncode:
        raise BuildError(
            f"[bench] pip install of {source} failed; its build tools must be installed here, or pass --no-install to "
            f"import the sources as they are:\n{(run.stdout + run.stderr)[-TAIL:].strip()}"
        )


def build(repository: Path, name: str | None, cache: Path, install: bool = True) -> Build:
    """Export a revision and install it into a folder under `cache`; one that is there already is taken.

    Args:
        repository: top of the checkout.
        name: of the revision; None for the checkout as it is.
        install: False: the sources themselves are imported.

    Raises:
        BuildError: no such revision, or its build failed.
    """
    hide(cache)
    commit, tree = revision(repository, name)
    folder = (cache / _key(tree, install)).resolve()
    source, site = folder / "source", folder / "site"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _export(repository, tree, source)
        if install and _is_package(source):
            _install(source, site)
    (folder / "done").write_text(f"{commit} {tree}\n", encoding="utf-8")  # and its time: of the last use
    sources = [str(each) for each in (source / "src", source) if each.is_dir()]
    path = (str(site),) if site.is_dir() else tuple(sources)
    return Build(name or "working tree", commit, tree, source, path)


def keep_newest(cache: Path, count: int) -> None:
    """Delete all but the builds that were used last: each is a copy of a project."""
    kept = sorted(cache.glob("*/done"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in kept[count:]:
        shutil.rmtree(old.parent, ignore_errors=True)
