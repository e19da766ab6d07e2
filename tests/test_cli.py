"""The command line: what was meant is named, by its own words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxblip.cli import main
from jaxblip.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [(["trian"], "train"), (["evalute", "--step=1"], "evaluate"), (["data", "inspct"], "inspect")],
)
def test_a_mistyped_verb(arguments, meant, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_word_like_no_verb_gets_the_list(capsys):
    with pytest.raises(SystemExit):
        main(["xyzzy"])
    assert "choose from 'train', 'evaluate'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("decoding top_p=1.5 must be above 0.", "--top-p=1.5 must be above 0."),
        ("sample=True and num_beams=5 exclude each other.", "--sample and --num-beams=5 exclude "),
        ("needs 9 positions: lower max_new_tokens.", "needs 9 positions: lower --max-new-tokens."),
        ("config.eval.num_beams=0 must be at least 1.", "config.eval.num_beams=0 must be"),
        ("The image 'a.png' cannot be read.", "The image 'a.png' cannot be read."),
    ],
)
def test_generate_names_its_options(message, shown, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise UserError(message)

    monkeypatch.setattr("jaxblip.training.restore.check_overrides", fail)
    assert main(["generate", "--checkpoint=run", "--image", "a.png"]) == 2
    assert capsys.readouterr().err.startswith(f"jaxblip: error: {shown}")


def test_captions_of_any_script_on_a_terminal_of_ascii(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "pairs.jsonl").write_text('{"image": "1.png", "caption": "猫"}', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "jaxblip.cli", "data", "inspect", str(tmp_path / "pairs.jsonl")],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\\u732b" in done.stdout
