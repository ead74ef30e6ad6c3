"""Tables: coloured on a terminal, columns of plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any

import typer


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], bad: Collection[int] = ()) -> None:
    """Print a table; a header of empty names is left out. `bad` are the numbers of the rows that stand out."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*header, show_header=any(header), box=None, pad_edge=False)
        for i, row in enumerate(rows):
            table.add_row(*(Text(str(cell)) for cell in row), style="red" if i in bad else None)
        Console().print(table)
        return
    lines = [tuple(map(str, row)) for row in ([header] if any(header) else []) + list(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
