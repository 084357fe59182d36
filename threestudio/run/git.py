"""Questions to git about a folder, asked such that nothing of that folder is run.

A repository's own configuration can name programs: a file system monitor, hooks, filters, a pager,
the command of a remote. A folder from somebody else must not run code because its files are
listed, so these are switched off here, and only commands that need none of them are used: none
that compares or writes working files.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

_SAFE = (
    *("--no-pager", "--no-optional-locks", "--literal-pathspecs"),
    *("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"),
    *("-c", "core.attributesFile=/dev/null", "-c", "diff.external="),
    *("-c", "protocol.allow=never", "-c", "safe.bareRepository=explicit"),
)
# objects that a partial clone lacks are not fetched; no protocol has this name
_ENVIRONMENT = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none", "GIT_TERMINAL_PROMPT": "0"}
_KEPT = ("GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM")  # which only limit


class NoGit(Exception):
    """git is not installed, or has no answer; the text is one line."""


def git(*arguments: str, folder) -> str:
    """What ``git arguments`` prints in `folder`. Variables ``GIT_...`` of the environment, which
    could mean another repository, do not count. Raises :class:`NoGit`."""
    program = shutil.which("git")
    if program is None or not os.path.isabs(program):  # not one of the current folder
        raise NoGit("git is not installed")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k in _KEPT}
    try:
        done = subprocess.run(
            [program, *_SAFE, *arguments],
            cwd=folder,
            env=kept | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    except OSError as error:
        raise NoGit(f"git cannot be run: {error.strerror}") from None
    if done.returncode:
        said = os.fsdecode(done.stderr).strip().splitlines() or ["git failed"]
        raise NoGit(said[0])
    return os.fsdecode(done.stdout)


def tracked_files(folder) -> list[str]:
    """The files in `folder`, and in the folders in it, that git tracks: sorted paths, relative to
    it. Some may be missing, or be something else by now. Raises :class:`NoGit`."""
    return sorted(set(git("ls-files", "-z", "--cached", folder=folder).split("\0")) - {""})


def untracked_files(folder) -> list[str]:
    """The files that git neither tracks nor was told to ignore, likewise."""
    listed = git("ls-files", "-z", "--others", "--exclude-standard", folder=folder)
    return sorted(set(listed.split("\0")) - {""})


def staged(folder) -> dict[str, str]:
    """Path -> hash of the content that git has of each tracked file in `folder`."""
    lines = git("ls-files", "-z", "--stage", folder=folder).split("\0")
    parts = (line.split("\t", 1) for line in lines if line)
    return {path: about.split()[1] for about, path in parts}


def changed_files(folder) -> list[str]:
    """The files in `folder` of which git has another content now than in the last commit."""
    flags = ("--cached", "--relative", "--name-only", "--no-renames", "--no-ext-diff", "-z")
    return git("diff-index", *flags, "HEAD", "--", ".", folder=folder).split("\0")[:-1]


def head(folder) -> str:
    """The short hash of the commit that is checked out."""
    return git("rev-parse", "--short", "HEAD", folder=folder).strip()


def blob_hash(path: Path, like: str) -> str:
    """What git would call the content of a file, as long as the hash `like`; "" if it cannot be
    read."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    kind = hashlib.sha256 if len(like) == 64 else hashlib.sha1
    return kind(b"blob %d\0" % len(data) + data).hexdigest()
