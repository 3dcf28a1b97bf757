"""The `flexft` command: one sub-command a module function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_flexft.cli import jobs, plan


def build_parser() -> argparse.ArgumentParser:
    """The parser; every sub-command sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="flexft", description="Finetune LoRA adapters inside a serving vLLM."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="check that vLLM finds the plugin")
    doctor.set_defaults(run=run_doctor)
    plan.add_command(commands)
    jobs.add_commands(commands)
    return parser


def run_doctor(args: argparse.Namespace) -> int:
    """Print the findings; 1 if something is wrong."""
    from vllm_flexft.doctor import check

    findings = check()
    for finding in findings:
        print(f"{'ok' if finding.ok else 'FAIL':4}  {finding.name}: {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args)
    except (ValueError, OSError) as error:  # what the user gave; anything else is our bug
        print(f"flexft {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
