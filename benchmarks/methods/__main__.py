"""Compare methods in the toy world: `python -m concept_atelier.benchmarks.methods --table actions [--quick]`.

Teaches every target with every row and seed, paints the questions, lets the judge read, prints the table in Markdown
and writes a contact sheet. Interrupted, the same command goes on; what is made already is not made again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import numpy as np

from ..comfyui import PACK
from .cell import QUICK, TABLES, Cell, Effort, Result, make, scores
from .pictures import contact_sheet
from .statistics import bootstrap
from .table import Table

SHEET_QUESTIONS = 4


def tuning_cells(table: Table, effort: Effort) -> dict[int, dict[float, list[Cell]]]:
    """For each row with a learning rate of its own, one cell of every target for each candidate."""
    return {
        number: {
            rate: [Cell(table.name, number, target, 0, rate, effort) for target in table.targets]
            for rate in effort.learning_rates
        }
        for number, row in enumerate(table.rows)
        if row.layout is not None and not row.tuned_as and len(effort.learning_rates) > 1
    }


def choose_rates(table: Table, effort: Effort, folder: Path) -> dict[tuple[str, str], float]:
    """By row name and target, the learning rate that is best on the other targets; the lower of equals."""
    rates = {(row.name, target): effort.learning_rates[0] for row in table.rows for target in table.targets}
    for number, candidates in tuning_cells(table, effort).items():
        name = table.rows[number].name
        for target in table.targets:
            means = {
                rate: column_mean([cell for cell in cells if cell.target != target], table.tuning_column, folder)
                for rate, cells in candidates.items()
            }
            rates[name, target] = max(means, key=means.get)
        over_all = {rate: column_mean(cells, table.tuning_column, folder) for rate, cells in candidates.items()}
        shares = ", ".join(f"{rate:g}: {mean:.0%}" for rate, mean in over_all.items())
        print(f"{name}, {table.tuning_column} by learning rate, all targets, seed 0: {shares}")
    shared = {(row.name, t): rates[row.tuned_as, t] for row in table.rows if row.tuned_as for t in table.targets}
    return rates | shared


def column_mean(cells: list[Cell], column: str, folder: Path) -> float:
    """The mean share of right pictures in a column."""
    return float(np.mean([[score[column] for score in answers(cell, folder)] for cell in cells]))


def answers(cell: Cell, folder: Path) -> list[dict[str, bool]]:
    """The scores of a cell that is made."""
    return scores(cell, Result.load(cell.file(folder)))


def make_all(cells: list[Cell], folder: Path, processes: int) -> None:
    """Make what is not there yet, several at a time."""
    missing = [cell for cell in cells if not cell.file(folder).exists()]
    print(f"{len(cells)} cells, {len(missing)} to make", flush=True)
    start = time.monotonic()
    if processes == 1:
        made = map(partial(make, folder=folder), missing)
    else:
        pool = multiprocessing.get_context("spawn").Pool(processes)
        made = pool.imap_unordered(partial(make, folder=folder), missing)
    for number, file in enumerate(made, 1):
        print(f"  {number}/{len(missing)} after {time.monotonic() - start:.0f} s: {file.stem}", flush=True)


def print_table(table: Table, cells: dict[str, list[Cell]], folder: Path) -> None:
    """Markdown: rows with their learning rates and intervals, then one column by target."""
    row_answers = {name: [answers(cell, folder) for cell in row_cells] for name, row_cells in cells.items()}
    runs, pictures = (len(next(iter(row_answers.values()))), len(next(iter(row_answers.values()))[0]))
    print(f"\n{runs} runs a row, {pictures} pictures a run; mean of the runs (95 % interval over runs and pictures)\n")
    print("| row | learning rate |", " | ".join(table.columns), "|")
    print("|---|---|" + "---|" * len(table.columns))
    for row in table.rows:
        columns = [
            bootstrap([[score[column] for score in run] for run in row_answers[row.name]]) for column in table.columns
        ]
        shares = " | ".join(f"{mean:.1%} ({low:.1%} to {high:.1%})" for mean, low, high in columns)
        rates = sorted({cell.learning_rate for cell in cells[row.name]}) if row.layout else []
        print(f"| {row.name} | {', '.join(f'{rate:g}' for rate in rates)} | {shares} |")
    targets = list(dict.fromkeys(cell.target for cell in next(iter(cells.values()))))
    print(f"\n{table.tuning_column} by target\n")
    print("| row |", " | ".join(targets), "|")
    print("|---|" + "---|" * len(targets))
    for name, row_cells in cells.items():
        means = (
            column_mean([cell for cell in row_cells if cell.target == target], table.tuning_column, folder)
            for target in targets
        )
        print(f"| {name} |", " | ".join(f"{mean:.0%}" for mean in means), "|")


def sheet(cells: dict[str, list[Cell]], folder: Path) -> list[tuple[str, np.ndarray]]:
    """For each row a strip: the first seed's first pictures of every target."""
    strips = []
    for name, row_cells in cells.items():
        shown = [Result.load(cell.file(folder)).pictures[:SHEET_QUESTIONS] for cell in row_cells if cell.seed == 0]
        strips.append((name, np.concatenate(shown)))
    return strips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", choices=list(TABLES), required=True)
    parser.add_argument("--quick", action="store_true", help="a look at whether it runs; its figures mean nothing")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, default=PACK / "benchmarks" / "runs")
    arguments = parser.parse_args()
    table = TABLES[arguments.table]
    effort = QUICK if arguments.quick else Effort()
    folder = arguments.cache

    candidates = [cell for rates in tuning_cells(table, effort).values() for cells in rates.values() for cell in cells]
    make_all(candidates, folder, arguments.processes)
    rates = choose_rates(table, effort, folder)
    cells = {
        row.name: [
            Cell(table.name, number, target, seed, rates[row.name, target], effort)
            for seed in range(effort.seeds)
            for target in table.targets[: effort.targets]
        ]
        for number, row in enumerate(table.rows)
    }
    make_all([cell for row_cells in cells.values() for cell in row_cells], folder, arguments.processes)
    print_table(table, cells, folder)
    picture = folder / f"{table.name}{'_quick' if arguments.quick else ''}.png"
    contact_sheet(sheet(cells, folder)).save(picture)
    print(f"\nWrote {picture}")


if __name__ == "__main__":
    main()
