"""Hosts that are namespaces of this machine's kernel.

Each has an address, a process table, /dev/shm and a folder of Ray of its own. All other files are
those of the machine, as if they were on shared storage.

This needs root, iproute2 and util-linux. When the test's process ends, however it does, the kernel
removes everything.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.cluster import wait_until

SUBNET = "198.18.77"
"""First numbers of the addresses; the range is set aside for benchmarks (RFC 2544)."""
OUTSIDE = 254
"""Last number of this process's own address."""
SHM_BYTES = 400 * 2**20
CAN_MAKE_HOSTS = os.geteuid() == 0 and all(
    shutil.which(name) for name in ("ip", "nsenter", "setpriv", "unshare")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Namespaces:
    """Namespaces that live as long as a process that sleeps in them."""

    unshare: subprocess.Popen[bytes]
    first: int
    """The process that sleeps, as this machine numbers it; it is number 1 in there."""

    def end(self) -> None:
        """Everything in there dies at once, as when the power is cut."""
        self.unshare.kill()
        self.unshare.wait()
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(self.first).wait(timeout=30)


def make_namespaces(kinds: Sequence[str], set_up: str) -> Namespaces:
    """
    Args:
        kinds: options of `unshare`.
        set_up: commands for a shell in there.
    """
    # Ended children are nobody's zombies, as SIGCHLD is ignored.
    script = f"set -e; {set_up}; trap '' CHLD; echo; exec sleep infinity"
    line = ["setpriv", "--pdeathsig=KILL", "unshare", "--fork", "--kill-child", "--pid", *kinds]
    unshare = subprocess.Popen([*line, "sh", "-c", script], stdout=subprocess.PIPE)
    assert unshare.stdout is not None
    assert unshare.stdout.readline() == b"\n", "the namespaces could not be made"
    (first,) = psutil.Process(unshare.pid).children()
    return Namespaces(unshare=unshare, first=first.pid)


@dataclass(kw_only=True, slots=True)
class Host:
    """A machine of the network."""

    number: int
    namespaces: Namespaces
    switch: Namespaces
    folder: Path
    """What is at /tmp/ray on this host, and the logs of its units."""
    units: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{SUBNET}.{self.number}"

    def popen(
        self, line: Sequence[str], log: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on the host; its output goes to a file in the host's folder."""
        enter = ["nsenter", f"--target={self.namespaces.first}"]
        enter += ["--mount", "--uts", "--ipc", "--net", "--pid"]
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                [*enter, *line],
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # by which the kernel shares the cores: evenly among hosts
            )

    def start_unit(self, unit: Path, environment: Mapping[str, str], programs: Path) -> None:
        """Do what systemd does with a unit: run its command, and again whenever it ends.

        Args:
            environment: values for those of the unit's `EnvironmentFile`.
            programs: the folder to take the command from, in place of the unit's.
        """
        settings = dict(
            entry.split("=", 1) for entry in unit.read_text().splitlines() if "=" in entry
        )
        command = _command(settings["ExecStart"], environment)
        command[0] = str(programs / Path(command[0]).name)
        # What a command leaves behind dies with it. `kill -9 -1` spares its own shell and number 1.
        pause = f"kill -9 -1; sleep {settings['RestartSec']}"
        script = f"while true; do {shlex.join(command)}; {pause}; done"
        self.units.append(self.popen(["bash", "-c", script], f"{unit.stem}.log", environment))

    def crash(self) -> None:
        """Kill -9 all that units have started; the units start it again."""
        units = {child.pid for unit in self.units for child in psutil.Process(unit.pid).children()}
        table = os.readlink(f"/proc/{self.namespaces.first}/ns/pid")
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):  # it has ended
                if os.readlink(f"/proc/{process.pid}/ns/pid") == table:
                    if process.pid not in {self.namespaces.first, *units}:
                        process.kill()

    def drain(self, seconds: float) -> None:
        """Stop the units as systemd does with `KillMode=mixed`: their commands get SIGTERM.

        Args:
            seconds: time after which what is left is killed.
        """
        for unit in self.units:
            (shell,) = psutil.Process(unit.pid).children()
            commands = shell.children()
            shell.kill()  # it would start the command again
            for command in commands:
                command.terminate()
            psutil.wait_procs(commands, timeout=seconds)
        self.stop_units()

    def stop_units(self) -> None:
        """Kill -9 the units and all that they have started."""
        units, self.units = self.units, []
        for unit in units:
            for child in psutil.Process(unit.pid).children():
                child.kill()
            unit.wait()
        self.crash()

    def cut_off(self) -> None:
        """Unplug the host from the network."""
        _on(self.switch, "ip", "link", "set", f"h{self.number}", "down")

    def plug_in(self) -> None:
        _on(self.switch, "ip", "link", "set", f"h{self.number}", "up")

    def lose(self) -> None:
        """The host is gone, for good."""
        self.namespaces.end()
        for unit in self.units:
            unit.wait()


def _command(line: str, environment: Mapping[str, str]) -> list[str]:
    """The words of a unit's command: `${NAME}` is part of one, `$NAME` may be several."""
    words: list[str] = []
    for word in line.split():
        if word.startswith("$") and not word.startswith("${"):
            words += environment[word[1:]].split()
            continue
        for name, value in environment.items():
            word = word.replace(f"${{{name}}}", value)
        words.append(word)
    return words


@dataclass(kw_only=True, slots=True)
class Network:
    """A switch, to which hosts and this process are plugged in."""

    switch: Namespaces
    folder: Path
    hosts: list[Host] = field(default_factory=list)

    def add_host(self) -> Host:
        """Plug a new host in, on which nothing runs."""
        number = len(self.hosts) + 1
        folder = self.folder / f"h{number}"
        folder.mkdir()
        names = self.folder / "names"
        set_up = [
            "mount --make-rprivate /",
            f"mount -t tmpfs -o size={SHM_BYTES} tmpfs /dev/shm",
            "mkdir -p /tmp/ray",
            f"mount --bind {shlex.quote(str(folder))} /tmp/ray",
            f"mount --bind {shlex.quote(str(names))} /etc/hosts",
            f"hostname h{number}",
            "ip link set lo up",
        ]
        kinds = ["--mount", "--uts", "--ipc", "--net", "--mount-proc"]
        host = Host(
            number=number,
            namespaces=make_namespaces(kinds, "; ".join(set_up)),
            switch=self.switch,
            folder=folder,
        )
        with names.open("a") as file:
            file.write(f"{host.address} h{number}\n")
        port, first = f"h{number}", str(host.namespaces.first)
        _on(self.switch, *f"ip link add {port} type veth peer name eth0 netns {first}".split())
        _on(self.switch, *f"ip link set {port} master switch up".split())
        _on(host.namespaces, *f"ip address add {host.address}/24 dev eth0".split())
        _on(host.namespaces, *"ip link set eth0 up".split())
        _on(host.namespaces, *f"ip route add default via {SUBNET}.{OUTSIDE}".split())
        self.hosts.append(host)
        return host


def _on(namespaces: Namespaces, *line: str) -> None:
    """Run a command in the network of the namespaces."""
    enter = ["nsenter", f"--target={namespaces.first}", "--net"]
    subprocess.run([*enter, *line], check=True, timeout=30)


@contextlib.contextmanager
def make_network(folder: Path) -> Iterator[Network]:
    """A network without hosts, which this process can reach."""
    (folder / "names").write_text("127.0.0.1 localhost\n")
    set_up = "ip link set lo up; ip link add switch type bridge; ip link set switch up"
    switch = make_namespaces(["--net"], set_up)
    network = Network(switch=switch, folder=folder)
    port = f"fvl{os.getpid()}"
    link = f"ip link add {port} type veth peer name outside netns {switch.first}"
    try:
        subprocess.run(link.split(), check=True)
        address = f"ip address add {SUBNET}.{OUTSIDE}/24 dev {port}"
        subprocess.run(address.split(), check=True)
        subprocess.run(["ip", "link", "set", port, "up"], check=True)
        _on(switch, *"ip link set outside master switch up".split())
        yield network
    finally:
        for each in itertools.chain((host.namespaces for host in network.hosts), [switch]):
            each.end()
        wait_until(lambda: port not in psutil.net_if_addrs(), 30)
