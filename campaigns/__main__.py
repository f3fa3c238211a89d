"""``python -m campaigns [NAME ...] --seed N --seconds S``: run campaigns and print their reports."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping

from campaigns import faults, hostile, kills, limits, mutate
from campaigns.report import Report

#: Name → function of a seed, the seconds to take, the first case, and a single case to run instead.
CAMPAIGNS: Mapping[str, Callable[[int, float, int, int | None], Report]] = {
    "faults": faults.run,
    "hostile": hostile.run,
    "kills": kills.run,
    "limits": limits.run,
    "mutate": mutate.run,
}
#: Seconds of all campaigns together, in full and with ``--quick``.
FULL, QUICK = 7200, 240


def main() -> int:
    """Run the campaigns; 1 if any found a failure."""
    parser = argparse.ArgumentParser(prog="python -m campaigns", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"campaigns to run (default: all): {', '.join(CAMPAIGNS)}"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases")
    parser.add_argument("--seconds", type=float, help="seconds for each campaign")
    parser.add_argument(
        "--quick", action="store_true", help=f"take {QUICK} seconds for all campaigns instead of {FULL}"
    )
    parser.add_argument("--start", type=int, default=0, help="number of the first case, to continue a run")
    parser.add_argument("--only", type=int, help="run this case alone, and show the traceback of its error")
    parser.add_argument("--json", metavar="FILE", help="also write the reports to a file")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in CAMPAIGNS]
    if unknown:
        parser.error(f"no such campaign: {', '.join(unknown)}")
    names = given.names or list(CAMPAIGNS)
    seconds = given.seconds or (QUICK if given.quick else FULL) / len(names)
    reports = []
    for name in names:
        reports.append(CAMPAIGNS[name](given.seed, seconds, given.start, given.only))
        print(reports[-1], flush=True)
    if given.json:
        with open(given.json, "w") as file:
            json.dump([report.as_dict() for report in reports], file, indent=2)
    return int(any(report.failures for report in reports))


if __name__ == "__main__":
    sys.exit(main())
