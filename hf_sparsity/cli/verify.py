"""The command `hf-sparsity verify`: checks a folder against its plan and report; exit code 1 if they do not match."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_model_class, add_text, parse_source

HELP = "check a sparse model's folder against its plan, its report and the dense model"
LINES = 20  # most problems, and most notes, that are printed


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    command.add_argument("folder", help="a sparse model's folder, dense or packed")
    command.add_argument(
        "--against",
        metavar="DENSE",
        help="the dense model, a folder or Hub id or 'demo': the kept weights must equal its weights, unless the pruner "
        "updates them or they were trained",
    )
    command.add_argument("--revision", help="of a Hub model to compare with")
    command.add_argument(
        "--certificate",
        action="store_true",
        help="score the plan's certificate again, on the calibration text that it was made with: give that again",
    )
    add_model_class(command)
    add_text(command)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the verdict and the findings; returns all of them, with `ok` for the exit code."""
    from .. import demo
    from ..publish.verify.verify import verify

    against = demo.resolve(options.against)
    location = {"revision": options.revision} if options.revision else {}
    result = verify(options.folder, against, auto_class=options.model_class, **location)
    findings = result.to_dict()
    certificate = _certificate(options) if options.certificate else None
    if certificate is not None:
        findings |= {"ok": findings["ok"] and certificate["holds"], "certificate": certificate}
    if not options.json:
        print(_text(result))
        if certificate is not None:
            print(_scored_again(certificate))
    return findings


def _certificate(options: argparse.Namespace) -> dict[str, Any]:
    from .. import demo
    from ..calibration.mixture import SELF
    from ..evaluation.certificate import check
    from ..model.loading import find_tokenizer, load_model
    from ..plan import Plan
    from ..planning.checks import plan_config
    from .loading import calibration

    model = load_model(options.folder, auto_class=options.model_class)
    against = demo.resolve(options.against)
    dense = load_model(against, auto_class=options.model_class) if against else None
    options.model = options.against
    config = plan_config(Plan.load(options.folder))
    if dense is None and any(parse_source(text)["data"] == SELF for text in options.calibration or ()):
        raise ValueError("--calibration self: these are samples of the dense model; give it with --against")
    writer = dense if dense is not None else model
    texts = calibration(options, config, writer, find_tokenizer(options.folder), planning=True, always=True)
    return check(options.folder, texts, model=model, dense=dense)


def _scored_again(certificate: dict[str, Any]) -> str:
    """Returns the line that compares the certificate's scores of today with the recorded ones."""
    pairs = [
        f"{name} {certificate['now'][name]:.4f} (recorded {recorded:.4f})"
        for name, recorded in certificate["recorded"].items()
        if certificate["now"][name] is not None
    ]
    text = "the same text" if certificate["same_text"] else "ANOTHER text than the certificate's"
    return f"  {'ok' if certificate['holds'] else 'FAILED':<6}  certificate   {', '.join(pairs)}; {text}"


def _text(result: Any) -> str:
    """Returns the verdict, then a line for each check that passed and for each problem."""
    lines = [f"{result.folder}: {'holds what it says' if result.ok else 'does NOT hold what it says'}"]
    if (measured := result.measured) is not None:
        lines[0] += f"; sparsity {measured.sparsity:.4f} (target {measured.target:.4f}), {len(measured.layers)} layers"
    failed = result.failed
    lines += [_line(finding) for finding in result.findings if finding.status in ("ok", "not applicable")]
    lines += [_line(finding) for finding in failed[:LINES]]
    if len(failed) > LINES:
        lines.append(f"  and {len(failed) - LINES} more (--json lists all)")
    notes = [finding for finding in result.findings if finding.status == "note"]
    lines += [_line(finding) for finding in notes[:LINES]]
    if len(notes) > LINES:
        lines.append(f"  and {len(notes) - LINES} more notes")
    return "\n".join(lines)


def _line(finding: Any) -> str:
    status = {"not applicable": "-", "failed": "FAILED"}.get(finding.status, finding.status)
    where = f"{finding.where}: " if finding.where else ""
    return f"  {status:<6}  {finding.check:<12}  {where}{finding.message}"
