"""Machines with an sshd on one machine: each has a network, processes and files of its own, by Linux's namespaces.

What one writes, the others and the host do not see, and its ``ray stop`` ends nobody else's Ray. A user ``ubuntu``, who
is not root, comes in by key, and finds this test's own Python environment at ``~/avray-env``, as if it had been made
there, since the machines reach no package index; ``/shared`` is the same folder on all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.commands import BIN, ROOT

USER = "ubuntu"
PYTHON = (Path(sys.prefix), Path(sys.base_prefix))
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "rsync", "ssh", "openssl", "/usr/sbin/sshd", "useradd")
UNSHARE = ("unshare", "--pid", "--net", "--mount", "--uts", "--fork", "--kill-child")

TRY = """
mount --make-rprivate /
mount -t tmpfs none /mnt
mkdir /mnt/{a,b,c}
mount -t overlay -o lowerdir=/,upperdir=/mnt/a,workdir=/mnt/b none /mnt/c
ip link add br0 type bridge
ip link add v0 type veth peer name v1
"""
OUTER = r"""
set -euo pipefail
folder=$1 shared=$2
mount --make-rprivate /
mount -t tmpfs -o size=4g none "$folder"
mkdir "$folder"/{changes,work,root}
mount -t overlay -o "lowerdir=/,upperdir=$folder/changes,workdir=$folder/work" none "$folder/root"
cd "$folder/root"
mount --rbind /sys sys
mount --rbind /dev dev
mount -t proc none proc
mkdir -p tmp/ray shared
mount -t tmpfs -o size=1g none dev/shm
mount -t tmpfs -o mode=1777 none tmp/ray
mount --bind "$shared" shared
exec chroot . bash -c "$INNER" inner "${@:3}"
"""
INNER = r"""
set -euo pipefail
name=$1 user=$2 venv=$3 packages=$4 key=$5 sees=${*:6}
hostname "$name"
ip link set lo up
id "$user" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash "$user"
usermod -p '*' "$user"
home=$(getent passwd "$user" | cut -d: -f6)
ln -s "$venv" "$home/avray-env"
install -d -m 700 -o "$user" "$home/.ssh"
install -m 600 -o "$user" "$key" "$home/.ssh/id_ed25519"
install -m 600 -o "$user" "$key.pub" "$home/.ssh/authorized_keys"
printf '[global]\nno-index = true\nno-build-isolation = false\ndisable-pip-version-check = true\n' >/etc/pip.conf
# It may see its Python wherever that lies, and pip may put avray there once more.
for one in $sees; do
    while [ "$one" != / ]; do chmod a+rx "$one"; one=$(dirname "$one"); done
done
chmod a+w "$packages" "$venv/bin"
chown -R "$user" "$packages"/*avray*
echo 'export RAY_enable_worker_prestart=0' >>"$home/.bashrc"
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/throw_away
mkdir -p /run/sshd
/usr/sbin/sshd -D -f /dev/null -h /etc/ssh/throw_away -o UsePAM=no -o PasswordAuthentication=no &
echo ready
wait
"""


def cannot() -> str | None:
    """Why there can be no such machines here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)} (Debian: apt-get install openssh-server rsync iproute2)"
    if any(os.stat(path).st_dev != os.stat("/").st_dev for path in (ROOT, *PYTHON)):
        return "needs the checkout and Python on the file system of /"
    tried = subprocess.run([*UNSHARE, "bash", "-ec", TRY], capture_output=True, text=True, check=False)
    return f"needs namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Machine:
    pid: int
    """Of its first process, as the host sees it."""

    def command(self, words: Sequence[str], folder: str = "/", **environment: str) -> list[str]:
        """``words`` as the user, with the test's Python on the path, in ``folder`` of this machine."""
        given = {"HOME": f"/home/{USER}", "USER": USER, "LOGNAME": USER, "LANG": "C.UTF-8", "TERM": "dumb",
                 "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin", **environment}
        return ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--uts", "--root", "--wd",
                "setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups",
                "env", "-i", *(f"{name}={value}" for name, value in given.items()),
                "bash", "-c", 'cd "$0" && exec "$@"', folder, *words]

    def run(self, *words: str) -> str:
        """What it says. CalledProcessError where it fails."""
        return subprocess.run(self.command(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                              timeout=60, check=True).stdout


@contextmanager
def machines(folder: Path, addresses: Mapping[str, str]) -> Iterator[dict[str, Machine]]:
    """One for each name, at its address of a /24, until the block ends; the first is the gateway of the others."""
    shared = folder / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    folder.chmod(0o755)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    with ExitStack() as stack:
        found = {name: stack.enter_context(_machine(folder, name)) for name in addresses}
        gateway, *others = found
        inside = f"nsenter -t {found[gateway].pid} -n ip"
        network = [f"{inside} link add br0 type bridge", f"{inside} address add {addresses[gateway]}/24 dev br0",
                   f"{inside} link set br0 up"]
        for index, name in enumerate(others):
            there = f"nsenter -t {found[name].pid} -n ip"
            network += [f"{inside} link add v{index} type veth peer name eth0 netns {found[name].pid}",
                        f"{inside} link set v{index} master br0 up",
                        f"{there} address add {addresses[name]}/24 dev eth0", f"{there} link set eth0 up",
                        f"{there} route add default via {addresses[gateway]}"]
        subprocess.run(["bash", "-ec", "\n".join(network)], check=True)
        yield found


@contextmanager
def _machine(folder: Path, name: str) -> Iterator[Machine]:
    place = folder / name
    place.mkdir()
    inner = [name, USER, sys.prefix, sysconfig.get_path("purelib"), str(folder / "key"), *map(str, (ROOT, *PYTHON))]
    command = [*UNSHARE, "bash", "-c", OUTER, "outer", str(place), str(folder / "shared"), *inner]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "INNER": INNER})
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", f"{name} did not start"
        yield Machine(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]))
    finally:
        process.kill()
        process.communicate()
