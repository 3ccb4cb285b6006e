"""Images without Docker: a base made by debootstrap, buildah in chroot isolation, and a root of their own to run in.

Needs root and the Debian packages buildah and debootstrap.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import servers
from requirements.install import pip_find_links
from tests.service.confinement import is_possible as can_mount

RUN = """
root=$1 data=$2 adapters=$3 user=$4; shift 4
mount --bind "$root" "$root"
mount --bind "$data" "$root/data"
mount --bind -o ro "$adapters" "$root/adapters"
mount -t tmpfs -o size=3g,mode=1777,noexec,nosuid,nodev tmpfs "$root/tmp"
mount --rbind /proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o size=1g,mode=1777 tmpfs "$root/dev/shm"
mount --bind /etc/hosts "$root/etc/hosts"
mount -o remount,bind,ro "$root"
cd /
exec /usr/sbin/chroot "$root" setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups \
    --no-new-privs --bounding-set=-all --inh-caps=-all -- "$@"
"""
"""What a container engine does for `docker run --read-only --tmpfs /tmp --cap-drop ALL`, in mounts of its own."""


def missing() -> str:
    """What this machine lacks to build and run images, or nothing."""
    programs = [name for name in ("buildah", "debootstrap", "nsenter") if shutil.which(name) is None]
    if programs:
        return f"needs {', '.join(programs)}: apt-get install buildah debootstrap"
    return "" if os.getuid() == 0 and can_mount() else "needs root, and mounts"


@dataclass(frozen=True)
class Image:
    """A built image: its root folder, its configuration as Docker has it, and bytes of its files."""

    root: Path
    configuration: dict[str, Any]
    size: int

    @property
    def environment(self) -> dict[str, str]:
        pairs: list[str] = self.configuration["Env"]
        return dict(pair.split("=", 1) for pair in pairs)

    @property
    def user(self) -> str:
        user: str = self.configuration["User"]
        return user

    def programs(self) -> set[str]:
        """The names of all programs on the image's path."""
        folders = [self.root / folder.lstrip("/") for folder in self.environment["PATH"].split(":")]
        return {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}

    def run(
        self, data: Path, adapters: Path, log: Path, *arguments: str, **variables: str
    ) -> tuple[subprocess.Popen[bytes], str]:
        """Run the entry point as the image's user, with a root that is read-only; the process and its address."""
        folder = self.configuration["WorkingDir"]
        inside = ["sh", "-c", f'cd {shlex.quote(folder)} && exec "$@"', "-", *self.configuration["Entrypoint"]]
        outside = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", RUN, "run"]
        places = [str(self.root), str(data), str(adapters), self.user]
        environment = {**self.environment, "FUSION_HOST": "127.0.0.1", "FUSION_PORT": "{port}", **variables}
        environment["PATH"] += f":{os.defpath}"
        return servers.start([*outside, *places, *inside, *arguments], environment, Path("/"), log)


@dataclass(frozen=True)
class Builder:
    """Builds images in `folder`, which holds all that is kept of them."""

    folder: Path

    def buildah(self, *arguments: str | Path) -> str:
        places: list[str | Path] = [
            "--root",
            self.folder / "store",
            "--runroot",
            self.folder / "run",
            "--storage-driver",
            "vfs",
        ]
        environment = os.environ | {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}
        done = subprocess.run(["buildah", *places, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout.strip()

    def make_base(self, *names: str) -> None:
        """An image with Debian's Python 3.11, in the place of those that Dockerfiles call `names`."""
        root = self.folder / "base"
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, "bookworm", root], check=True, capture_output=True
        )
        for name in ("python", "python3"):
            (root / "usr/local/bin" / name).symlink_to("/usr/bin/python3")
        shutil.rmtree(root / "var/cache/apt")
        container = self.buildah("from", "scratch")
        self.buildah("copy", "--quiet", container, root, "/")
        for name in names:
            self.buildah("commit", "--quiet", container, f"docker.io/library/{name}")
        self.buildah("rm", container)
        shutil.rmtree(root)

    def build(self, dockerfile: Path, context: Path) -> Image:
        """Build an image; its name is not kept."""
        mounts = [part for mount in self._mounts() for part in ("--volume", f"{mount}:ro")]
        name = "localhost/built"
        flags: list[str | Path] = ["--format", "docker", "--pull-never", *mounts, "--file", dockerfile, "--tag", name]
        self.buildah("bud", *flags, context)
        root = Path(self.buildah("mount", self.buildah("from", "--pull-never", name)))
        (root / "etc/hosts").touch()
        configuration = json.loads(self.buildah("inspect", "--type", "image", name))["Docker"]["config"]
        sizes = (path.lstat() for path in root.rglob("*"))
        return Image(root, configuration, sum({(s.st_dev, s.st_ino): s.st_size for s in sizes}.values()))

    def _mounts(self) -> list[str]:
        """What lets a build find packages as this machine does: where pip looks, and whose certificates it trusts."""
        links = pip_find_links(Path(sys.executable))
        (self.folder / "pip.conf").write_text(f"[global]\nfind-links = {' '.join(links)}\n")
        (self.folder / "uv.toml").write_text("native-tls = true\n")
        mounts = [f"{link}:{link}" for link in links if Path(link).is_dir()]
        mounts += [f"{self.folder}/pip.conf:/root/.config/pip/pip.conf", f"{self.folder}/uv.toml:/etc/uv/uv.toml"]
        certificates = "/etc/ssl/certs/ca-certificates.crt"
        return [*mounts, *([f"{certificates}:{certificates}"] if Path(certificates).exists() else [])]
