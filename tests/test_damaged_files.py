"""Damaged, foreign and half-written files by random seeds: a sample of what `attack_files.py` does by the thousand."""

import random
from pathlib import Path

import attack_files
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BY_SEED = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def results(monkeypatch):
    monkeypatch.setattr(attack_files, "LIMIT_S", 10.0)  # of a process that others slow down
    monkeypatch.setattr(attack_files, "RESULTS", attack_files.Results())


def unharmed(attack, folder, seed, tries):
    attack(random.Random(seed), folder, tries)
    assert attack_files.RESULTS.outcomes and attack_files.RESULTS.wrong == []


@given(SEEDS)
@BY_SEED
def test_damaged_contents_are_read_or_refused_by_name(tmp_path_factory, seed):
    unharmed(attack_files.attack_contents, tmp_path_factory.mktemp("damaged"), seed, 0.006)


@given(SEEDS)
@BY_SEED
def test_outputs_destroy_nothing(tmp_path_factory, seed):
    unharmed(attack_files.attack_targets, tmp_path_factory.mktemp("targets"), seed, 0.01)


@given(SEEDS)
@BY_SEED
def test_journals_keep_whole_lines_and_others_are_untouched(tmp_path_factory, seed):
    unharmed(attack_files.attack_journals, tmp_path_factory.mktemp("journals"), seed, 0.006)


def test_a_full_disk_loses_nothing(tmp_path):
    unharmed(attack_files.attack_full_disk, tmp_path, 0, 0.05)


def test_a_kill_leaves_a_whole_file(tmp_path):
    unharmed(attack_files.attack_by_kills, tmp_path, 0, 0.05)


def test_writers_and_locks_of_several_processes(tmp_path):
    unharmed(lambda _, folder, tries: attack_files.attack_by_races(folder, tries), tmp_path, 0, 0.1)


def test_the_attacks_see_what_is_wrong(tmp_path, monkeypatch):
    """An attack that can't fail would say nothing."""
    monkeypatch.setattr(attack_files.files, "write_whole", lambda path, content, kind: Path(path).write_bytes(content))
    attack_files.attack_targets(random.Random(0), tmp_path, 0.02)
    monkeypatch.setattr(attack_files.journal, "mend", lambda path: path.write_bytes(b""))
    (tmp_path / "other").mkdir()
    attack_files.attack_journals(random.Random(0), tmp_path / "other", 0.01)
    attack_files.refused_or_read("x", tmp_path / "x", lambda: int("no name of a file"))
    attack_files.refused_or_read("x", tmp_path / "x", lambda: {}["key"])
    wrong = " ".join(attack_files.RESULTS.wrong)
    for said in ("isn't ours: changed", "crash: lines lost", "x: unnamed", "KeyError"):
        assert said in wrong
