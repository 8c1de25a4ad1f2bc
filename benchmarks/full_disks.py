"""Run commands on disks that are full after so many bytes or files, then with room, and compare.

sudo python benchmarks/full_disks.py [COMMAND ...]

The disks are tmpfs, mounted over the folder in which a command works (see ordered_kills.py), so Linux and root are
needed. A command must end with one line that says so, or be done; nothing half written may lie there; made again with
room, it must leave the files of a command that nobody disturbed. The last disk of each command is read-only. Exit code
1 if anything differs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import ordered_kills as ordered

COMMANDS = "generate generate-png relabel scan fuse audit report train compare".split()
ROOM = ["size=4k", "size=16k", "size=40k", "size=80k", "size=120k", "nr_inodes=2", "nr_inodes=4", "nr_inodes=8"]
ROOM += ["nr_inodes=14", "nr_inodes=20"]
LARGER = ["size=64k", "size=1m", "size=4m", "size=8m", "nr_inodes=3", "nr_inodes=5"]  # for a training
FULL, READ_ONLY = "No space left on device", "Read-only file system"


def mount(place: Path, *options: str) -> None:
    """Mount a disk, or change one."""
    subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(place)], check=True)


def shrink(place: Path, room: str) -> None:
    """Leave this much room on the disk, or none for writing at all."""
    kind, _, value = room.partition("=")
    if kind == "size":
        used = sum(-(-path.stat().st_size // 4096) * 4 for path in place.rglob("*") if path.is_file())
        room = f"size={used + int(value[:-1]) * (1024 if value[-1] == 'm' else 1)}k"
    elif kind == "nr_inodes":
        room = f"nr_inodes={int(value) + sum(1 for _ in place.rglob('*')) + 1}"
    mount(place, "-o", f"remount,{room}")


def fill(world: ordered.World, name: str) -> tuple[int, int, int, list[str]]:
    """The number of disks, of those that were full, of commands that finished afterwards with the same; faults."""
    case, place = world.cases()[name], world.place
    code, said, _ = ordered.begin(world, case)
    quiet = ordered.outcome(place)
    full = same = 0
    faults = [] if code == 0 else [f"{name}: {said}"]
    rooms = [*(LARGER if name == "train" else ROOM), "ro"]
    for room in rooms:
        mount(place)
        try:
            case.before(place)
            shrink(place, room)
            code, said, _ = ordered.call(case.command, world.log, place=place)
            lines = [line for line in said.splitlines() if line.startswith("autolabel: ")]
            full += code != 0
            if code and (code != 2 or len(lines) != 1 or (READ_ONLY if room == "ro" else FULL) not in lines[0]):
                faults.append(f"{name}, {room}: ended with {code}: {said[-300:]}")
            faults += [f"{name}, {room}: {path} is left" for path in place.rglob("*-tmp")]
            mount(place, "-o", "remount,rw,size=1g,nr_inodes=99999")
            code, said, _ = ordered.call(case.command, world.log, place=place)
            wrong = ordered.differences(ordered.outcome(place), quiet) if code == 0 else [said[-300:]]
            same += not wrong
            faults += [f"{name}, {room}, again: {what}" for what in wrong]
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
    return len(rooms), full, same, faults


def main() -> None:
    """Fill, compare, print."""
    with ExitStack() as stack:
        world = ordered.World(Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve())
        stack.callback(shutil.rmtree, world.place, ignore_errors=True)
        print("| command | disks | full | then finished with the same |\n|---|---:|---:|---:|")
        faults: list[str] = []
        for name in sys.argv[1:] or COMMANDS:
            disks, full, same, more = fill(world, name)
            print(f"| {name} | {disks} | {full} | {same} |", flush=True)
            faults += more
    print(f"\ndifferences: {len(faults)}", *faults, sep="\n  ", flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
