"""Kill commands and disturb their requests while they label images of a bucket into a bucket; compare the outcome.

python benchmarks/chaos_buckets.py [--kills 225] [--faults 225] [--ray 50] [--seed 0] [--images 24] [--server weed]

Images, manifest, teacher and run lie in a bucket of a server on loopback (object_servers.py), behind a proxy that
disturbs requests (fault_proxy.py). Half of the kills come at random moments, half right before or right after the
server has done a write. After each, every committed label is read and compared with an undisturbed run on this
machine's disk; a run that is done must have the same bytes and rows. `--ray` kills and faults are dealt to runs with
Ray: the command, its workers and its machines. Then a server dies in several ways, and the command must end by itself;
and requests of an undisturbed run are counted. Exit code 1 if anything differs. Linux only.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked copy has no other thread

import pyarrow.parquet as pq
from chaos import NODE, TIMINGS, at_work, draw, label_bytes, processes, ray_cluster, raylet
from fault_proxy import (
    CUT_AFTER,
    CUT_BEFORE,
    CUT_WITHIN,
    DELAY,
    FAILED,
    FAILED_AFTER,
    HANG,
    KILL_AFTER,
    KILL_BEFORE,
    LOST_REPLY,
    OMIT,
    SLOW_DOWN,
    TWICE,
    WRITES,
    Deck,
    FaultProxy,
    Rule,
    s3_error,
)
from object_servers import SECRETS, SERVERS, Server, installed, surroundings

from autolabel.manifests import storage
from autolabel.manifests.locations import location
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import LABELS, zarr_folder
from autolabel.manifests.samples import save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.scenes import write_city
from autolabel.manifests.schemas import STATISTICS
from autolabel.pipeline.verify import verify

SHARD = 4  # images of a unit
OF_A_PLACE = ("image_mtime_ns", "image_version")  # columns that say when and where an image was stored
FAULTS = (DELAY, CUT_BEFORE, CUT_WITHIN, CUT_AFTER, LOST_REPLY, FAILED_AFTER, FAILED, SLOW_DOWN, TWICE, OMIT)
STORES = {"zarr": ["--store", "zarr"], "png": ["--store", "png"], "kept": ["--keep-confidence", "4"]}
PATIENCE = 300.0  # seconds after which a command counts as one that never ends
IMPORTED = (
    "autolabel.cli", "autolabel.pipeline.run", "autolabel.pipeline.source", "autolabel.pipeline.verify",
    "autolabel.teacher.checkpoints", "pyarrow.parquet", "zarr", "cv2",
)  # fmt: skip


# --- commands ---------------------------------------------------------------------------------------------------------


def command(words: list[str], variables: dict[str, str], log: Path) -> None:
    """Run a command of this program; the copy of a process that has imported everything calls this."""
    os.environ.clear()
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import autolabel.cli

    sys.argv = ["autolabel", *words]
    autolabel.cli.run()


class Commands:
    """Starts commands in copies of a process that has imported everything, with the variables of the proxy."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(IMPORTED))
        self.variables = variables

    def start(self, words: list[str], log: Path, **changes: str) -> Any:
        """A process that runs; `exitcode` is None until it has ended."""
        process = self._context.Process(target=command, args=(words, self.variables | changes, log))
        process.start()
        return process


def last_line(log: Path) -> str:
    return (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1] if log.exists() else ""


# --- what is compared -------------------------------------------------------------------------------------------------


def labels_of(run: Path) -> dict[str, bytes | None]:
    """`label_bytes` of a run that may not have begun."""
    return label_bytes(run) if storage.list(run / "units") else {}


def rows(path: Path, roots: tuple[str, ...]) -> list[str]:
    """The rows of a table in text, sorted, without times, and with these roots of paths replaced."""
    if not storage.exists(path):
        return []
    with storage.reading(path) as file:
        table = pq.read_table(io.BytesIO(file.read()))
    kept = table.drop_columns([name for name in (*TIMINGS, *OF_A_PLACE) if name in table.column_names])
    return sorted(_replaced(repr(row), roots) for row in kept.to_pylist())


def _replaced(text: str, roots: tuple[str, ...]) -> str:
    for root in roots:
        text = text.replace(root, "ROOT")
    return text


def differences(run: Path, quiet: Path, roots: tuple[str, ...]) -> list[str]:
    """What a finished run has otherwise than an undisturbed one on a disk."""
    found = [f"verify: {fault}" for fault in verify(run).faults]
    there, expected = ({_key(p, top): p for p in storage.list(top, recursive=True)} for top in (run, quiet))
    pixels = (f"{zarr_folder(LABELS)}/", f"{LABELS}/", "confidence")
    same = {name for name in there.keys() & expected.keys() if name.startswith(pixels)}
    found += [f"{name} is missing" for name in expected.keys() - there.keys() if not name.startswith("units/")]
    found += [f"{name} is left over" for name in there.keys() - expected.keys() if not name.startswith(("units/", "."))]
    found += [f"{name} has other bytes" for name in same if storage.read(there[name]) != storage.read(expected[name])]
    tables = ("manifest.parquet", "quarantine.parquet", *(f"stats/{name}.parquet" for name in STATISTICS))
    found += [f"the rows of {name} differ" for name in tables if rows(run / name, roots) != rows(quiet / name, roots)]
    records = [[row for path in storage.list(top / "units") for row in rows(path, roots)] for top in (run, quiet)]
    if sorted(records[0]) != sorted(records[1]):
        found.append(f"{len(records[0])} rows in the records: expected {len(records[1])}, and the same ones")
    ours, theirs = ((opened.accounts, opened.state) for opened in (Run.open(run), Run.open(quiet)))
    if ours != theirs:
        found.append(f"the accounts are {ours}: expected {theirs}")
    return [f"{run.name}: {what}" for what in found]


def _key(path: Path, top: Path) -> str:
    return path.relative_to(top).as_posix()


# --- killing and disturbing -------------------------------------------------------------------------------------------


@dataclass
class BucketRun:
    """One run folder of a bucket, and its command."""

    engine: str
    store: str
    folder: Path
    log: Path
    words: list[str]


@dataclass
class Account:
    """What happened to the runs of one engine."""

    kills: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    runs: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    longest: float = 0.0
    seconds: float = 0.0


class World:
    """The bucket, what lies in it, and what an undisturbed run makes of it."""

    def __init__(self, out: Path, server: Server, proxy: FaultProxy, images: int) -> None:
        self.out, self.server, self.proxy = out, server, proxy
        self.url = server.make_bucket("chaos")
        self.top = location(self.url)
        manifest, teacher = draw(out / "city", images)
        for path in (*sorted((out / "city").rglob("*")), teacher):
            if path.is_file():
                name = teacher.name if path == teacher else path.relative_to(out / "city").as_posix()
                storage.write(self.top / name, path.read_bytes())
        self.commands = Commands(dict(os.environ) | server.environment(proxy.url))
        self.inputs = {"here": [str(manifest), "--teacher", str(teacher)]}
        self.inputs["bucket"] = [f"{self.url}/{manifest.name}", "--teacher", f"{self.url}/{teacher.name}"]
        self.roots = (f"{self.url}", f"{out / 'city'}", str(out))
        self.quiet, self.typical, self.expected = dict[str, Path](), dict[str, float](), dict[str, bytes | None]()

    def make(self, name: str, engine: str, store: str, *more: str) -> BucketRun:
        """A run of the bucket, not started."""
        folder = f"{self.url}/{name}"
        words = ["generate", *self.inputs["bucket"], "--out", folder, "--engine", engine, *self.options(store), *more]
        return BucketRun(engine, store, location(folder), self.out / f"{name}.log", words)

    def options(self, store: str) -> list[str]:
        """Everything that a run is asked for beside its places."""
        return ["--unit-size", str(SHARD), "--scales", "1", "--max-quarantined", "1", *STORES[store]]

    def undisturbed(self) -> None:
        """Label once on the disk, and once in the bucket to see how long that takes."""
        for store in STORES:
            folder, log = self.out / f"quiet-{store}", self.out / f"quiet-{store}.log"
            words = ["generate", *self.inputs["here"], "--out", str(folder), "--engine", "local", *self.options(store)]
            self.finish(words, log)
            self.quiet[store] = folder
            started = time.monotonic()
            run = self.make(f"undisturbed-{store}", "local", store)
            self.finish(run.words, run.log)
            self.typical[store] = time.monotonic() - started
        self.expected = labels_of(self.quiet["zarr"])

    def finish(self, words: list[str], log: Path) -> None:
        """Run a command to its end, which must be a good one."""
        process = self.commands.start(words, log)
        process.join(PATIENCE)
        if process.exitcode != 0:
            raise RuntimeError(f"{' '.join(words)}: exit code {process.exitcode}: {log.read_text()[-2000:]}")

    def compare(self, run: BucketRun, account: Account, seen: set[str]) -> None:
        """Read all committed labels. seen: those that were committed before, to which the new ones are added."""
        found = labels_of(run.folder)
        wrong = [f"the label of {name} is another" for name, label in found.items() if label != self.expected.get(name)]
        wrong += [f"the label of {name} is lost" for name in seen - found.keys()]
        account.differences += [f"{run.folder.name}: {what}" for what in wrong]
        account.compared += len(found)
        seen |= found.keys()


class Victims:
    """The processes that a kill may hit: the command, and with Ray its workers and its nodes."""

    def __init__(self, dice: random.Random, cluster: Any = None) -> None:
        self.dice, self.cluster, self.account = dice, cluster, Account()
        self.process: Any = None
        self.turn = threading.Lock()

    def kill(self, kinds: tuple[str, ...] = ("command", "worker")) -> None:
        """Kill one of them."""
        with self.turn:
            self._kill(self.dice.choice(kinds) if self.cluster else "command")

    def _kill(self, kind: str) -> None:
        actors = processes({raylet(node) for node in self.cluster.worker_nodes}) if self.cluster else {}
        if kind == "worker" and not actors:
            kind = "command"
        if kind == "command":
            self.process.kill()
        elif kind == "worker":
            os.kill(self.dice.choice(sorted(at_work(actors) or actors)), signal.SIGKILL)
        else:
            self.cluster.remove_node(
                self.dice.choice(sorted(self.cluster.worker_nodes, key=raylet)), allow_graceful=False
            )
            self.cluster.add_node(**NODE)
        self.account.kills[kind] += 1


def disturb(world: World, run: BucketRun, victims: Victims, kills: int) -> int:
    """Make a run, and kill at `kills` random moments on the way; the proxy does the rest.

    Returns when the run is done: how many of the kills are left.
    """
    account, dice, seen = victims.account, victims.dice, set[str]()
    span = world.typical[run.store] * (6 if victims.cluster else 1)
    victims.process = process = world.commands.start(run.words, run.log)
    begun = now = time.monotonic()
    due = now + dice.uniform(0, span)
    while True:
        process.join(min(0.05, max(0.0, due - now)) if kills else 0.05)
        now = time.monotonic()
        if process.exitcode is None:
            if kills and now >= due:
                victims.kill(("command", "worker", "worker", "node"))
                kills -= 1
                due = now + dice.uniform(0, span)
            elif now - begun > PATIENCE:
                account.differences.append(f"{run.folder.name}: a command had not ended after {PATIENCE:.0f} s")
                process.kill()
                process.join()
            continue
        account.longest = max(account.longest, now - begun)
        if process.exitcode == 0:
            break
        if process.exitcode != -signal.SIGKILL:
            account.ends[f"exit code {process.exitcode}: {last_line(run.log)}"] += 1
            if account.ends.total() > 200:
                raise RuntimeError(f"commands keep ending by themselves: {account.ends}")
        world.compare(run, account, seen)
        victims.process = process = world.commands.start(run.words, run.log)
        begun = now = time.monotonic()
        due = now + dice.uniform(0, span)
    world.compare(run, account, seen)
    account.differences += differences(run.folder, world.quiet[run.store], world.roots)
    account.differences += once_more(world, run)
    account.runs[run.store] += 1
    return kills


def once_more(world: World, run: BucketRun) -> list[str]:
    """What the same command does to a run that is done; it should do nothing."""
    live = ("progress.json", ".lock")
    before = {path: storage.stat(path) for path in storage.list(run.folder, recursive=True)}
    rules, world.proxy.deck, deck = world.proxy.rules, None, world.proxy.deck
    again = run.log.with_suffix(".again")
    world.finish(run.words, again)
    world.proxy.rules, world.proxy.deck = rules, deck
    after = {path: storage.stat(path) for path in storage.list(run.folder, recursive=True)}
    found = [] if "nothing was to be done" in again.read_text() else [f"once more: {again.read_text()}"]
    found += [
        f"once more changed {_key(path, run.folder)}"
        for path in before.keys() | after.keys()
        if before.get(path) != after.get(path) and not path.name.startswith(live)
    ]
    return [f"{run.folder.name}: {what}" for what in found]


def deal(
    world: World, engine: str, kills: int, faults: int, seed: int, *, seconds: float, cluster: Any = None
) -> Account:
    """Deal so many kills and faults to one run after another. After so many seconds no other run is begun."""
    dice = random.Random(seed)
    victims = Victims(dice, cluster)
    at_writes = kills // 2
    counts = Counter(kind for kind, _ in zip(cycle(FAULTS), range(faults), strict=False))
    counts.update(kind for kind, _ in zip(cycle((KILL_BEFORE, KILL_AFTER)), range(at_writes), strict=False))
    proxy, left, started = world.proxy, kills - at_writes, time.monotonic()
    proxy.kill, proxy.deck = victims.kill, Deck.of(counts, share=0.12, seed=seed)
    more = () if cluster is None else ("--address", cluster.address, "--workers", "2")
    for number, store in enumerate(cycle(STORES)):
        some = min(left, dice.randint(4, 10))
        run = world.make(f"run-{engine}-{number:03d}-{store}", engine, store, *more)
        left -= some - disturb(world, run, victims, some)
        killed, faulty = victims.account.kills.total(), sum(proxy.done[fault] for fault in FAULTS)
        print(f"{time.monotonic() - started:5.0f} s  {run.folder.name}: {killed} kills, {faulty} faults", flush=True)
        done = not left and not [card for card in proxy.deck.cards if card != OMIT]
        if done or time.monotonic() - started > seconds:
            break
    victims.account.seconds = time.monotonic() - started
    return victims.account


# --- a server that dies -----------------------------------------------------------------------------------------------

EXPIRED = s3_error(400, "ExpiredToken", "The provided token has expired.")
DENIED = s3_error(403, "AccessDenied", "Access Denied")
DEATHS: dict[str, list[Rule]] = {
    "is gone": [],
    "accepts and never answers": [Rule(HANG)],
    "cuts every connection": [Rule(CUT_BEFORE)],
    "answers 503 to everything": [Rule(SLOW_DOWN)],
    "refuses all writes": [Rule(DENIED, WRITES)],
    "takes credentials for expired": [Rule(EXPIRED)],
}


def deaths(world: World, after: int, seconds: float) -> list[str]:
    """Let a server die in the middle of a run, in all ways at once; print a table, return what is wrong."""
    print("\n| the server | exit code | s until the command ended | its words |\n|---|---:|---:|---|")
    found, waiting = [], []
    with ExitStack() as stack:
        for number, (how, rules) in enumerate(DEATHS.items()):
            proxy = stack.enter_context(FaultProxy(world.server.endpoint, one_by_one=not world.server.atomic))
            run = world.make(f"dead-{number}", "local", "zarr")
            process = world.commands.start(run.words, run.log, **world.server.environment(proxy.url))
            while sum(one.operation in WRITES for one in proxy.passed) < after and process.exitcode is None:
                time.sleep(0.002)
            proxy.rules = rules
            if not rules:
                proxy.close()
            waiting.append((how, run, process, time.monotonic()))
        ended, last_call = dict[str, float](), time.monotonic() + seconds
        while len(ended) < len(waiting) and time.monotonic() < last_call:
            time.sleep(0.1)
            ended |= {
                how: time.monotonic() for how, _, one, _ in waiting if one.exitcode is not None and how not in ended
            }
        for how, run, process, since in waiting:
            took, last = ended.get(how, time.monotonic()) - since, last_line(run.log)
            text = run.log.read_text(errors="replace")
            if process.exitcode is None:
                found.append(f"{how}: the command had not ended after {seconds:.0f} s")
                process.kill()
            elif process.exitcode not in (1, 2) or "Traceback" in text or not last.startswith("autolabel: "):
                found.append(f"{how}: exit code {process.exitcode}: {last}")
            if any(secret in text for secret in SECRETS):
                found.append(f"{how}: a secret is printed")
            print(f"| {how} | {process.exitcode} | {took:.0f} | {last.removeprefix('autolabel: ')} |", flush=True)
        for _, run, _, _ in waiting:  # the server is back, and the same command does what is left
            world.finish(run.words, run.log)
            found += differences(run.folder, world.quiet["zarr"], world.roots)
    return found


# --- what a run costs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Requests and bytes of a whole run, without those for images and labels that were given.

    of_images: requests for one label alone, as a PNG has them.
    """

    units: int
    labels: int
    requests: Counter[str]
    of_images: int
    sent: int
    received: int


def costs(world: World, images: int, unit: int) -> None:
    """Label `images` images and half of them, and print what a unit and a thousand labels cost."""
    write_city(world.out / "cost" / "data", seed=2, fine=0, coarse=images, val=0, height=48, width=96)
    manifest = world.out / "cost" / "coarse.parquet"
    save_manifest(manifest, scan(world.out / "cost" / "data", layout="cityscapes", splits=["train_extra"])[0])
    for path in (world.out / "cost").rglob("*"):
        if path.is_file():
            storage.write(world.top / path.relative_to(world.out).as_posix(), path.read_bytes())
    print(f"\n96 x 48 pixels, units of {unit}; without the images and labels that were given:\n")
    names = ["store", *(f"{kind} a unit" for kind in ("writes", "reads", "listings", "removals"))]
    names += ["requests for 1,000 labels in units of 64", "MB sent for 1,000 labels", "MB received", "of any run"]
    print(f"| {' | '.join(names)} |\n|---|{'---:|' * (len(names) - 1)}")
    for store in STORES:
        half, whole = (cost(world, store, limit, unit) for limit in (images // 2, images))
        units, labels = whole.units - half.units, whole.labels - half.labels
        each = {
            kind: (whole.requests[kind] - half.requests[kind]) / units for kind in ("write", "read", "list", "delete")
        }
        fixed = whole.requests.total() - sum(each.values()) * whole.units
        words = [f"{number:.1f}" for number in each.values()]
        alone = (whole.of_images - half.of_images) / labels  # requests of every image, in whatever unit
        words.append(f"{1000 * alone + (sum(each.values()) - alone * unit) * 1000 / 64:.0f}")
        words += [
            f"{(b - a) / labels / 1000:.2f}" for a, b in ((half.sent, whole.sent), (half.received, whole.received))
        ]
        print(f"| {store} | {' | '.join(words)} | {fixed:.0f} |", flush=True)


def cost(world: World, store: str, limit: int, unit: int) -> Cost:
    """Count the requests of an undisturbed run of so many images."""
    proxy, name = world.proxy, f"cost-{store}-{limit}"
    proxy.passed.clear()
    teacher = world.inputs["bucket"][2]
    words = ["generate", f"{world.url}/cost/coarse.parquet", "--teacher", teacher, "--out", f"{world.url}/{name}"]
    words += ["--engine", "local", "--limit", str(limit), "--scales", "1", "--unit-size", str(unit), *STORES[store]]
    world.finish(words, world.out / f"{name}.log")
    others = [one for one in proxy.passed if not one.key.startswith("cost/data/")]
    kinds = {"get": "read", "head": "read", "list": "list", "delete": "delete"}
    return Cost(
        units=-(-limit // unit),
        labels=limit,
        requests=Counter(kinds.get(one.operation, "write") for one in others),
        of_images=sum(one.key.endswith(".png") for one in others),
        sent=sum(one.sent for one in others),
        received=sum(one.received for one in others),
    )


# --- all of it --------------------------------------------------------------------------------------------------------


def show(title: str, account: Account, done: Counter[str]) -> None:
    print(f"\n{title}: {sum(account.runs.values())} runs, {account.kills.total()} kills", end="")
    print(f", {sum(done[fault] for fault in FAULTS)} faults, {account.compared:,} labels compared")
    print("\n| done | times |\n|---|---:|")
    for kind, times in account.kills.items():
        print(f"| SIGKILL of a {kind} | {times} |")
    for fault in FAULTS:
        print(f"| {fault} | {done[fault]} |")
    print(f"\ncommands that ended by themselves: {account.ends.total()}")
    for why, times in account.ends.items():
        print(f"  {times} x {why}")
    print(f"longest command: {account.longest:.0f} s; differences: {len(account.differences)}")
    for what in account.differences[:40]:
        print(f"  {what}")
    print(f"seconds: {account.seconds:.0f}", flush=True)


def leftovers(world: World) -> list[str]:
    """Files under temporary names, and uploads that were begun and never ended."""
    found = [str(path) for path in storage.list(world.top, recursive=True) if storage.TEMPORARY in path.name]
    return found + [f"an upload of {name} that never ended" for name in world.server.unfinished_uploads("chaos")]


def main() -> None:
    """Kill, disturb, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=225)
    parser.add_argument("--faults", type=int, default=225)
    parser.add_argument("--ray", type=int, default=50, help="kills and faults of runs with Ray, half of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600, help="after so many no other run is begun")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--server", choices=list(SERVERS), help="default: weed where it is installed, else moto")
    parser.add_argument("--only", choices=("local", "ray", "deaths", "costs"), nargs="*", help="parts of it")
    parser.add_argument("--out", type=Path, help="a new folder for images and logs; without it nothing is kept")
    parser.add_argument("--smallest", action="store_true")
    asked = parser.parse_args()
    if asked.smallest:
        print("--smallest: these numbers mean nothing\n")
        asked.kills, asked.faults, asked.ray, asked.images = 4, 10, 0, 12
    parts = asked.only or (["local", "costs"] if asked.smallest else ["local", "ray", "deaths", "costs"])
    kind = asked.server or ("weed" if "weed" in installed() and not asked.smallest else "moto")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        server = stack.enter_context(SERVERS[kind]())
        stack.enter_context(surroundings(server.environment()))
        proxy = stack.enter_context(FaultProxy(server.endpoint, one_by_one=not server.atomic))
        world = World(asked.out or scratch / "out", server, proxy, asked.images)
        world.undisturbed()
        wrong: list[str] = []
        if "local" in parts:
            account = deal(world, "local", asked.kills, asked.faults, asked.seed, seconds=asked.seconds)
            show("this process", account, proxy.done)
            wrong += account.differences
        if "ray" in parts:
            proxy.done.clear()
            os.environ.update(server.environment(proxy.url))  # the nodes inherit them
            cluster = stack.enter_context(ray_cluster(scratch / "ray"))
            world.commands.variables = dict(os.environ)
            os.environ.update(server.environment())
            account = deal(
                world,
                "ray",
                asked.ray // 2,
                asked.ray - asked.ray // 2,
                asked.seed + 1,
                seconds=asked.seconds,
                cluster=cluster,
            )
            show("Ray", account, proxy.done)
            wrong += account.differences
        proxy.deck = None
        if "deaths" in parts:
            wrong += deaths(world, 12, PATIENCE)
        if "costs" in parts:
            costs(world, *((8, 2) if asked.smallest else (64, 8)))
        wrong += leftovers(world)
        print(f"\n{server.kind}: {len(wrong)} differences")
        for what in wrong:
            print(f"  {what}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
