"""Measure chatserver side by side with Express and FastAPI twins: `scripts/bench`.

    scripts/bench                                    A to G three times, and H once: about 50 minutes
    scripts/bench --workloads A,C --rounds 5         some of them
    scripts/bench --workloads A --sides ours         ours only, while working on it
    scripts/bench --json out.json                    also write the results of every run
    scripts/bench --before ../old --sides ours --workloads A --rounds 15
                                                     also the code of another checkout, as the side `before`
    scripts/bench --sides ours,users --workloads D,E --rounds 15
                                                     the cost of users: ours with AUTH=jwt against AUTH=none

The bench compares the whole product, `python -m chatserver` with the simulated source and a private `mongod`, with two
minimal servers: `express.js` (the same design in Node: a Map of Sets, `res.write` per client) and `fastapi_twin.py`
(sse-starlette, uvicorn, uvloop; with Motor where turns are stored). All of them send the same tokens at the same pace,
with positions of the same form. The twins have no database in A to D, and no resume. F to H measure chatserver only;
the columns of F are lengths of conversations.

The server under test runs on one core, `load.c` (compiled at run time) and `mongod` on another. `load.c` checks every
token of every subscriber; its head defines latency. CPU time is that of the server process with all its threads; the
time of `mongod` has its own row. The sides take turns, so that noise affects all of them. The output is a table of
medians with minimum and maximum, then the targets. The exit code is 1 if a target is missed.

With `--before`, the code of the other checkout runs with the same settings, in its own process and database. The side
`users` of A, C, D and E is our code with AUTH=jwt: it fetches the key of an issuer that runs in the bench
(`issuer.py`), and each request has a token of some 700 bytes, signed with RS256. The limits per owner are off there.

Rounds alternate the order of the sides, and the main figures of ours and `before`, and of `users` and ours, are
compared in pairs, round by round: the median of the ratios ours / before and users / ours, with an interval that
contains the true median with a probability of at least 95 % for any distribution of the noise (`paired.py`). The
interval needs six rounds. Each ratio is printed with the load of the machine.

Needs two cores, `cc`, Node with npm, and the requirements of the server. Compiled and installed tools are in `.bench/`.

The files: `workloads.py`, `targets.py`, `paired.py`, `processes.py` (servers, cores), `issuer.py` (tokens),
`generator.py` and `load.c`, `tools.py` (compiles and installs), the twins.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from tests.bench import paired, tools
from tests.bench.generator import Result
from tests.bench.issuer import Issuer
from tests.bench.processes import Database, bind, cores
from tests.bench.targets import table, verdicts
from tests.bench.workloads import BEFORE, LENGTHS, REPLIES, SIDES, USERS, WORKLOADS, Bench


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="of A to H; default: all")
    parser.add_argument(
        "--sides",
        default=",".join(SIDES),
        help=f"of {', '.join(SIDES)}; default: all. {USERS}: ours with AUTH=jwt and RS256 tokens",
    )
    parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help=f"another checkout: its code is the side {BEFORE}"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of loads and times, to try the bench")
    parser.add_argument("--json", type=Path, help="file for the results of every run")
    return parser.parse_args()


def _machine() -> Result:
    """Return the machine and the versions that the figures depend on."""
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    model = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "node": node,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def _cpuinfo() -> list[str]:
    return Path("/proc/cpuinfo").read_text().splitlines()


def main() -> int:
    """Measure, print, write; return 1 if a target is missed."""
    arguments = _arguments()
    names = [name.strip().upper() for name in arguments.workloads.split(",") if name.strip()]
    sides = arguments.sides.split(",")
    before = arguments.before.resolve() if arguments.before else None
    if before and BEFORE not in sides:
        sides.append(BEFORE)
    if unknown := [*({*names} - {*WORKLOADS}), *({*sides} - {*SIDES, *LENGTHS, *REPLIES, BEFORE})]:
        print(f"bench: unknown: {', '.join(unknown)}", file=sys.stderr)
        return 2
    if BEFORE in sides and not (before and (before / "chatserver" / "__main__.py").is_file()):
        print(f"bench: the side {BEFORE} needs --before CHECKOUT, a folder with chatserver/ in it", file=sys.stderr)
        return 2
    machine = _machine()
    tools.load_generator()
    if any(side.startswith("express") for side in sides):
        tools.express_modules()
    if any(side.startswith("fastapi") for side in sides):
        tools.twin_python()
    server_core, other_core = cores()
    bind(other_core)
    results: dict[str, dict[str, list[Result]]] = {}
    with Database() as database, Issuer() as issuer:
        bench = Bench(database, issuer, server_core, arguments.scale, before)
        for number in range(arguments.rounds):
            for name in names:
                taking_part = WORKLOADS[name].taking_part(sides)
                if WORKLOADS[name].once and number:
                    continue
                # Alternate the order, so that each side comes first in every other round.
                for side in taking_part[:: -1 if number % 2 else 1]:
                    print(f"round {number + 1}: {name} {side}", file=sys.stderr, flush=True)
                    load = os.getloadavg()[0]
                    run = {**WORKLOADS[name].run(bench, side), "load": load}
                    runs = results.setdefault(name, {each: [] for each in taking_part})
                    runs[side].append(run)
    print(" · ".join(f"{key} {value}" for key, value in machine.items()))
    print(table(results, lambda name: WORKLOADS[name].title))
    judged = verdicts(results)
    for name, runs in results.items():
        lines, compared = paired.compare(name, runs)
        if lines:
            print("\n".join(["", *lines]))
        judged += compared
    print()
    for met, text in judged:
        print(f"{'pass' if met else 'FAIL'}  {text}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results, "verdicts": judged}, indent=1))
    return 0 if all(met for met, _ in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
