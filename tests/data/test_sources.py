import json
from pathlib import Path

import pytest
from PIL import Image

from jaxblip.config import default_config, load_config
from jaxblip.data.run_sources import read_eval_set
from jaxblip.data.sources import open_source
from jaxblip.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "openmoji"


@pytest.mark.parametrize("name", ["vision", "stage1", "stage2"])
def test_a_missing_data_set_that_jaxblip_makes_names_the_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(str(CONFIGS / f"{name}.py"))
    for spec in (config.data.train.source, config.eval.source):
        with pytest.raises(UserError, match=f"{spec} does not exist yet") as error:
            open_source(spec, image_size_px=8)
        assert "`jaxblip data openmoji --out=datasets/openmoji`" in str(error.value)


def test_of_other_missing_files_the_path_is_said(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        open_source(str(tmp_path / "mine" / "train.jsonl"), image_size_px=8)


@pytest.mark.parametrize("spec", ["shapes:test", "openmoji:", "easy_vqa", "no such thing"])
def test_the_known_sources_are_named(spec):
    known = "shapes:train, shapes:heldout, openmoji:train, openmoji:heldout, easy_vqa:train"
    with pytest.raises(UserError, match=f"no data source is called '{spec}'.* are {known}"):
        open_source(spec, image_size_px=8)


def test_a_folder_of_images_has_no_splits(tmp_path):
    with pytest.raises(UserError, match="has no splits such as 'train': it is no data set of TFDS"):
        open_source(f"{tmp_path}:train", image_size_px=8)


def write_pair(folder, colour, line):
    folder.mkdir()
    Image.new("RGB", (4, 4), colour).save(folder / "1.png")
    (folder / "data.jsonl").write_text(json.dumps(line))
    return str(folder / "data.jsonl")


def test_evaluation_has_columns_and_an_image_folder_of_its_own(tmp_path):
    # The path of a picture is the same in both, so that its colour says the folder.
    line = {"image": "1.png", "caption": "plain", "title": "of the map", "other": "of its own"}
    source = write_pair(tmp_path / "one", (255, 0, 0), line)
    write_pair(tmp_path / "two", (0, 0, 255), line)
    config = default_config("clip")
    config.data.image_size_px = 4
    config.eval.source = source

    def found():
        read = read_eval_set(config)
        return read.captions, read.images[0, 0, 0].tolist()

    red, blue = [255, 0, 0], [0, 0, 255]
    assert found() == ([["plain"]], red)
    config.data.fields.captions = "title"
    config.data.image_folder = str(tmp_path / "two")
    assert found() == ([["of the map"]], blue)
    config.eval.fields.captions = "other"
    assert found() == ([["of its own"]], blue)
    config.eval.image_folder = str(tmp_path / "one")
    assert found() == ([["of its own"]], red)
    config.eval.fields.captions = ""
    config.eval.fields.image = "image"  # a map of its own, which leaves the texts as usual
    assert found() == ([["plain"]], red)
