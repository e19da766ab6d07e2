"""Results that outlive the process that made them."""

from __future__ import annotations

import pytest

from jaxblip.evaluation.kept import Kept

BATCHES = [[1, 2], [3, 4], [5]]


class Killed(Exception):
    pass


def made(calls, dies_after=None):
    def batches(start):
        calls.append(start)
        for number, batch in enumerate(BATCHES):
            if sum(map(len, BATCHES[:number])) < start:
                continue
            if number == dies_after:
                raise Killed
            yield batch

    return batches


@pytest.mark.parametrize("dies_after", [0, 1, 2])
def test_what_was_made_is_not_made_again(tmp_path, dies_after):
    path, calls = tmp_path / "folder" / "kept.jsonl", []
    with pytest.raises(Killed):
        Kept(path, {"step": 3}).collect("texts", made(calls, dies_after))
    with path.open("ab") as file:  # it was writing, and then the power failed
        file.write(b'\0\0\n{"part": "texts", "values": [9]}\n{"part": "texts", "val')
    assert Kept(path, {"step": 3}).collect("texts", made(calls)) == [1, 2, 3, 4, 5]
    assert calls == [0, 2 * dies_after]
    kept = Kept(path, {"step": 3})
    assert kept.collect("others", made(calls)) == [1, 2, 3, 4, 5]
    assert kept.collect("texts", made(calls)) == [1, 2, 3, 4, 5] and calls[2:] == [0, 5]
    kept.remove()
    assert not path.exists()


def test_results_of_another_step_are_dropped(tmp_path):
    path, calls = tmp_path / "kept.jsonl", []
    Kept(path, {"step": 3}).collect("texts", made(calls))
    Kept(path, {"step": 4}).collect("texts", made(calls))
    assert calls == [0, 0]


def test_without_a_file_nothing_is_kept():
    calls = []
    assert Kept().collect("texts", made(calls)) == [1, 2, 3, 4, 5] and calls == [0]
