"""``python -m campaigns [NAME ...]``: run campaigns, print their reports, and exit with 1 after a failure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from campaigns import correct, differential, exports, faults, fuzz, hostile, kills, limits, mutate, planted
from campaigns.runner import Campaign, State, UnusableStateError, run_all
from campaigns.table import markdown

#: Name → what runs it, and its share of the time.
CAMPAIGNS: Mapping[str, Campaign] = {
    "correct": Campaign(correct.run, weight=4),
    "differential": Campaign(differential.run, weight=3),
    "exports": Campaign(exports.run, weight=2),
    "faults": Campaign(faults.run, weight=3),
    "fuzz": Campaign(fuzz.run, weight=3),
    "hostile": Campaign(hostile.run, weight=2),
    "kills": Campaign(kills.run, weight=3),
    "limits": Campaign(limits.run, weight=1),
    "mutate": Campaign(mutate.run, weight=3),
    "planted": Campaign(planted.run, weight=3),
}
#: Seconds of all campaigns together, in full and with ``--quick``; imports and the last case come on top.
FULL, QUICK = 6900.0, 235.0


def main(arguments: Sequence[str] | None = None, campaigns: Mapping[str, Campaign] = CAMPAIGNS) -> int:
    """Run the campaigns; 1 if any found a failure, 130 if interrupted."""
    parser = _parser(campaigns)
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{name:13} {campaign.summary}" for name, campaign in campaigns.items()))
        return 0
    if unknown := [name for name in given.names if name not in campaigns]:
        parser.error(f"no such campaign: {', '.join(unknown)}")
    chosen = {name: campaigns[name] for name in given.names or campaigns}
    if given.only is not None:
        if len(chosen) != 1:
            parser.error("--only needs the name of one campaign")
        (campaign,) = chosen.values()
        report = campaign.run(given.seed or 0, 0.0, given.only, given.only)
        print(report)
        return int(bool(report.failures))
    try:
        state = State.load(given.state, given.seed)
    except UnusableStateError as error:
        parser.error(str(error))
    try:
        run_all(chosen, state, QUICK if given.quick else FULL, each=given.seconds, jobs=given.jobs)
    except KeyboardInterrupt:
        print(
            f"interrupted{'' if given.state is None else f'; continue with --state {given.state}'}", file=sys.stderr
        )
        return 130
    finally:
        if given.report:
            Path(given.report).write_text(markdown([r for name, r in state.reports.items() if name in chosen]))
    return int(any(state.reports[name].failures for name in chosen if name in state.reports))


def _parser(campaigns: Mapping[str, Campaign]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m campaigns",
        description="Search for faults with damaged and hostile files. Case N of a seed is always the same.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(campaigns)}")
    parser.add_argument("--list", action="store_true", help="describe each campaign in a line, and exit")
    parser.add_argument("--quick", action="store_true", help=f"take {QUICK:.0f} seconds in total, not {FULL:.0f}")
    parser.add_argument("--seconds", type=float, help="seconds for each campaign, instead of its share of the total")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="campaigns to run at a time (default: 1)")
    parser.add_argument("--seed", type=int, help="seed of the cases (default: that of --state, or 0)")
    parser.add_argument("--only", type=int, metavar="CASE", help="run one case, with the traceback of its error")
    parser.add_argument(
        "--state", metavar="FILE", help="keep the progress in FILE, and continue from it if it exists"
    )
    parser.add_argument("--report", metavar="FILE", help="write the results as a Markdown table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
