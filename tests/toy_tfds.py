"""Small data sets that TensorFlow Datasets writes in array_record, without TensorFlow."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def png(number, size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number * 40 % 256, number % 256, 30)).save(buffer, "PNG")
    return buffer.getvalue()


# As coco_captions/2014 has them (object_detection/coco.py and coco_captions.py of TFDS).
COCO_CAPTIONS = {
    "image": tfds.features.Image(encoding_format="jpeg"),
    "image/filename": tfds.features.Text(),
    "image/id": np.int64,
    "objects": tfds.features.Sequence({
        "id": np.int64,
        "area": np.int64,
        "bbox": tfds.features.BBoxFeature(),
        "label": tfds.features.ClassLabel(num_classes=80),
        "is_crowd": np.bool_,
    }),
    "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
}  # fmt: skip


def coco_example(number):
    box = tfds.features.BBox(ymin=0.1, xmin=0.1, ymax=0.5, xmax=0.6)
    thing = {"id": 1, "area": 9, "bbox": box, "label": 3, "is_crowd": False}
    return {
        "image": io.BytesIO(png(number)),
        "image/filename": f"COCO_{number}.jpg",
        "image/id": 1000 + number,
        "objects": [thing] * (number % 2),
        "captions": [{"text": f"eine Katzé {number} {i}", "id": i} for i in range(1 + number % 3)],
    }


def write(data_dir, features, examples, *, name="toy", config="", version="1.0.0", shards=1,
          file_format="array_record"):  # fmt: skip
    """Prepares `examples`, by split, in their order; returns the folder of the version."""

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in examples}

        def _generate_examples(self, split):
            yield from enumerate(examples[split])

    Toy.name = name
    builder = Toy(data_dir=str(data_dir), file_format=file_format)
    download_config = tfds.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(download_config=download_config)
    return str(builder.data_dir)
