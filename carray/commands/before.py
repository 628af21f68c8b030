"""The commands before a job: is everything in order, and what will it take."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from carray.core.errors import SettingsError

__all__ = ["doctor"]

_COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}


def doctor(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]...", help="Places to read: folders, s3:// prefixes, tables, bundles."),
    ] = None,
    out: Annotated[
        list[str] | None,
        typer.Option("--out", metavar="PLACE", help="Place for results; a small object is written there. Repeatable."),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Let every machine of RAY_ADDRESS's cluster examine itself.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every finding as one JSON document instead.")] = False,
) -> None:
    """Look whether this machine, or a whole cluster, can do carray's jobs; each line says what to do about trouble.

    Reads the first image of each source, the machine's limits and the installed software; tries the decoders,
    onnxruntime and torch in processes of their own. Writes nothing but, with --out, a small object under
    PLACE/_carray/, and deletes it. The last line of output is one JSON document.

    Exit code: 0 when nothing failed, 4 when only storage did, else 2. A machine without torch is in order: it scores
    and does not search.

    Cost: 5 to 25 s, with --cluster up to 2 minutes; some ten requests for each place on S3.

    Example: `carray doctor s3://photos/2026 --out s3://results/2026`
    """
    from carray.core.progress import print_result
    from carray.core.storage import absolute
    from carray.doctor.examine import examine, examine_cluster
    from carray.doctor.findings import as_json as plain
    from carray.doctor.findings import exit_code, finding_text, summary

    if cluster:
        _check_address()
    places = [[absolute(uri) for uri in uris or ()] for uris in (sources, out)]
    findings = []
    for found in (examine_cluster if cluster else examine)(*places):
        findings.append(found)
        if not as_json:
            status, rest = finding_text(found)[:4], finding_text(found)[4:]
            typer.echo(typer.style(status, fg=_COLOURS[found.status]) + rest)
    print_result(summary(findings) | ({"findings": plain(findings)} if as_json else {}))
    if code := exit_code(findings):
        raise typer.Exit(code)


def _check_address() -> None:
    if os.environ.get("RAY_ADDRESS", "") in ("", "local"):
        raise SettingsError(
            "--cluster is given, but RAY_ADDRESS names no cluster; set it to HOST:6379 of the head node, or submit the "
            "command as a job."
        )
