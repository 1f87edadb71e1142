"""``retrodiff credit``: which references a picture was made from."""

from __future__ import annotations

import argparse
from typing import Any

from retrodiff.cli import options as types
from retrodiff.text import printable

COLUMNS = ("license", "credit", "author", "creator", "url", "source")
"""Columns of a record that say whose a picture is, in the order in which they are printed."""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("credit", help="show which references a picture was made from")
    parser.add_argument("picture", type=types.path, nargs="+", help="a picture; several are taken")
    parser.add_argument("--json", action="store_true", help="print all that is known, as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints similarity, name, license and credit of each reference."""
    import json

    from retrodiff.bridges.credited import read_credit

    for path in options.picture:
        credit = read_credit(path)
        if options.json:
            print(json.dumps({"picture": str(path), **credit}, ensure_ascii=True))
            continue
        asked = credit["prompt"]
        name = credit["made_by"].get("name")
        made = "" if name is None else f", made by {printable(name)[:80]}"
        print(f"{printable(path)}: {printable(asked)[:200]!r}{made}")
        if credit["same_pixels"] is False:
            print("  its pixels have changed since this was written")
        for one in credit["references"]:
            print(f"  {line(one)}")
        if not credit["references"]:
            print("  no references")
    return 0


def line(reference: dict[str, Any]) -> str:
    """One reference: similarity, name, and whose it is."""
    from retrodiff.bridges.chosen import name_of

    record = reference["record"]
    parts = [f"{reference['similarity']:.3f}", printable(name_of(record, reference["row"]))[:120]]
    parts += [printable(record[name])[:120] for name in COLUMNS if record.get(name) is not None]
    return "  ".join(parts)
