"""The tables that a matrix has published (table.md), as parts of a report: the numbers are made in one place."""

from __future__ import annotations

import itertools

from eclipse_ray.reports.blocks import Block, Heading, Table, Text


def parse_tables(markdown: str) -> list[Block]:
    """Return headings, paragraphs and tables of what reports/tables.py writes; no other Markdown is known."""
    blocks: list[Block] = []
    caption = ""
    for is_table, group in itertools.groupby(markdown.splitlines(), lambda line: line.startswith("| ")):
        lines = [line for line in group if line.strip()]
        if is_table:
            head, *rows = [_cells(line) for line in lines if not line.startswith("| ---")]
            blocks.append(Table(caption, head, rows))
            continue
        for line in lines:
            if line.startswith("### "):
                caption = line.removeprefix("### ")
            elif line.startswith("## "):
                blocks.append(Heading(line.removeprefix("## ")))
            else:
                blocks.append(Text(line))
    return blocks


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
