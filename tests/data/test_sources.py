from pathlib import Path

import pytest

from jaxblip.config import load_config
from jaxblip.data.sources import open_source
from jaxblip.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "openmoji"


@pytest.mark.parametrize("name", ["vision", "stage1", "stage2"])
def test_a_missing_data_set_that_jaxblip_makes_names_the_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(str(CONFIGS / f"{name}.py"))
    for spec in (config.data.train, config.eval.source):
        with pytest.raises(UserError, match=f"{spec} does not exist yet") as error:
            open_source(spec, image_size_px=8)
        assert "`jaxblip data openmoji --out=datasets/openmoji`" in str(error.value)


def test_of_other_missing_files_the_path_is_said(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        open_source(str(tmp_path / "mine" / "train.jsonl"), image_size_px=8)
