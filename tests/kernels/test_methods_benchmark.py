"""The methods benchmark on a tiny configuration: what a cell is, its cache, and the table that comes out."""

import numpy as np
import pytest
from concept_atelier.benchmarks.methods import __main__ as command
from concept_atelier.benchmarks.methods import cell as cells
from concept_atelier.benchmarks.methods.cell import QUICK, TABLES, Cell, Result, make, scores
from concept_atelier.benchmarks.methods.statistics import bootstrap

ACTIONS = TABLES["actions"]


def numbered(name: str) -> int:
    return [row.name for row in ACTIONS.rows].index(name)


def test_a_cell_is_made_once_and_found_again(tmp_path, monkeypatch):
    cell = Cell("actions", numbered("ADI"), "tpose", 0, 0.02, QUICK)
    file = make(cell, tmp_path)
    result = Result.load(file)
    assert result.pictures.shape == (QUICK.questions, 64, 64, 3)
    assert set(scores(cell, result)[0]) == set(ACTIONS.columns)
    monkeypatch.setattr(cells, "studio", lambda: pytest.fail("the cell was made again"))
    assert make(cell, tmp_path) == file


def test_the_same_cell_gives_the_same_pictures(tmp_path):
    cell = Cell("actions", numbered("Textual Inversion"), "dab", 1, 0.02, QUICK)
    first, second = (Result.load(make(cell, tmp_path / name)) for name in ("a", "b"))
    assert np.array_equal(first.pictures, second.pictures)


def test_whatever_decides_a_cell_is_in_its_name(tmp_path):
    base = Cell("actions", numbered("ADI"), "tpose", 0, 0.02, QUICK)
    others = [
        Cell("actions", numbered("ADI, union"), "tpose", 0, 0.02, QUICK),
        Cell("actions", numbered("ADI"), "dab", 0, 0.02, QUICK),
        Cell("actions", numbered("ADI"), "tpose", 1, 0.02, QUICK),
        Cell("actions", numbered("ADI"), "tpose", 0, 0.01, QUICK),
        Cell("actions", numbered("ADI"), "tpose", 0, 0.02, cells.Effort()),
    ]
    assert len({cell.file(tmp_path) for cell in (base, *others)}) == 6


def test_new_weights_are_new_cells(tmp_path, monkeypatch):
    cell = Cell("actions", numbered("ADI"), "tpose", 0, 0.02, QUICK)
    before = cell.file(tmp_path)
    monkeypatch.setattr(cells, "weights_digest", lambda: "others")
    assert cell.file(tmp_path) != before


@pytest.mark.parametrize("name", TABLES)
def test_the_command_prints_a_table_and_resumes(name, tmp_path, monkeypatch, capsys):
    arguments = ["methods", "--table", name, "--quick", "--processes", "1", "--cache", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    first = capsys.readouterr().out
    for row in TABLES[name].rows:
        assert f"| {row.name} |" in first
    assert (tmp_path / f"{name}_quick.png").exists()
    command.main()
    again = capsys.readouterr().out
    assert " 0 to make" in again
    assert first.split("runs a row")[1] == again.split("runs a row")[1]


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_of_the_full_table_has_a_name(name, tmp_path):
    table, effort = TABLES[name], cells.Effort()
    by_row = command.tuning_cells(table, effort).values()
    tuning = [cell for rates in by_row for candidates in rates.values() for cell in candidates]
    assert len({cell.file(tmp_path) for cell in tuning}) == len(tuning) > 0


def test_a_targets_learning_rate_is_chosen_on_the_other_targets(tmp_path, monkeypatch):
    best = dict(zip(ACTIONS.targets, (0.04, 0.01, 0.01, 0.01, 0.01)))
    monkeypatch.setattr(command, "answers", lambda cell, _: [{"total": cell.learning_rate == best[cell.target]}])
    rates = command.choose_rates(ACTIONS, cells.Effort(), tmp_path)
    assert rates["ADI", ACTIONS.targets[0]] == 0.01
    monkeypatch.setitem(best, ACTIONS.targets[1], 0.02)
    monkeypatch.setitem(best, ACTIONS.targets[2], 0.02)
    rates = command.choose_rates(ACTIONS, cells.Effort(), tmp_path)
    assert rates["ADI", ACTIONS.targets[3]] == 0.02 and rates["ADI", ACTIONS.targets[1]] == 0.01
    assert rates["ADI, union", ACTIONS.targets[3]] == 0.02
    for row in ACTIONS.rows:
        assert not row.tuned_as or row.tuned_as in [other.name for other in ACTIONS.rows if not other.tuned_as]


def test_the_full_table_is_as_thorough_as_promised():
    effort = cells.Effort()
    for table in TABLES.values():
        runs = effort.seeds * len(table.targets)
        assert effort.seeds >= 3
        assert runs * len(table.questions(table.targets[0])) >= 200


def test_questions_show_subjects_that_no_exemplar_shows():
    for target in ACTIONS.targets:
        asked = {question.wanted["subject"] for question in ACTIONS.questions(target)}
        shown = " ".join(exemplar.caption for exemplar in ACTIONS.exemplars(ACTIONS.rows[numbered("ADI")], target, 0))
        assert not any(subject in shown.split() for subject in asked)


def test_subjects_are_shown_in_one_place_and_asked_for_in_others():
    subjects = TABLES["subjects"]
    for target in subjects.targets:
        assert len({exemplar.caption for exemplar in subjects.exemplars(subjects.rows[1], target, 0)}) == 6
        assert all(question.wanted["background"] != "on the beach" for question in subjects.questions(target))


def test_an_interval_over_few_alike_runs_is_wider_than_one_over_their_pictures():
    split = [[True] * 24] * 5 + [[False] * 24] * 5
    mixed = [[True, False] * 12] * 10
    mean, low, high = bootstrap(split)
    assert mean == 0.5 and high - low > 0.4
    mean, low, high = bootstrap(mixed)
    assert mean == 0.5 and high - low < 0.2
