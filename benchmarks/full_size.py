"""A checkpoint of BLIP-2's full size through `jaxblip convert`, there and back.

    python benchmarks/full_size.py --size=opt-2.7b --folder=/tmp

writes random weights with the names, shapes and files of `Salesforce/blip2-opt-2.7b`, imports them,
says a caption with them, exports them, and compares every tensor of the export with the written
one, bit for bit. Each phase is a process of its own, whose seconds and peak memory are printed.
Nothing is downloaded. Needs torch and transformers (`pip install -e ".[test]"`), and about three
times the checkpoint on disk: 24 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# No import of torch or jax up here: the peak of a child counts from its parent's size.

VOCAB, IMAGE_TOKEN = 50304, 50265
SIZES = {
    # As its config.json on the Hub; what is left out are transformers' defaults.
    "opt-2.7b": dict(
        text_config=dict(
            model_type="opt", vocab_size=VOCAB, hidden_size=2560, word_embed_proj_dim=2560,
            ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32,
        ),
        image_token_index=IMAGE_TOKEN,
    ),
    "tiny": dict(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=28,
        ),
        qformer_config=dict(
            hidden_size=32, encoder_hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48,
        ),
        text_config=dict(
            model_type="opt", vocab_size=104, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
            num_hidden_layers=2, num_attention_heads=2,
        ),
        image_token_index=100,
    ),
}  # fmt: skip
SHARD_BYTES = {"opt-2.7b": 1 << 30, "tiny": 1 << 16}
MAX_NEW_TOKENS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="opt-2.7b")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--folder", help="where the files go; by default the system's for such")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        PHASES[args.phase](Path(args.folder), args.size, args.dtype)
        return
    folder = Path(tempfile.mkdtemp(prefix="full_size_", dir=args.folder))
    try:
        run(folder, args.size, args.dtype)
    finally:
        if args.keep:
            print(f"The files are in {folder}.")
        else:
            shutil.rmtree(folder)


def run(folder: Path, size: str, dtype: str) -> None:
    """All phases, and a line of the table for each."""
    this = [sys.executable, __file__, f"--size={size}", f"--dtype={dtype}", f"--folder={folder}"]
    convert = [sys.executable, "-m", "jaxblip.cli", "convert"]
    theirs, ours, again = (folder / name for name in ("hf", "run", "again"))
    commands = {
        "write": ([*this, "--phase=write"], theirs),
        "import": ([*convert, f"--from={theirs}", f"--to={ours}"], ours),
        "caption": ([*this, "--phase=caption"], None),
        "export": ([*convert, f"--from={ours}", f"--to={again}"], again),
        "compare": ([*this, "--phase=compare"], None),
    }
    rows = []
    for phase, (command, made) in commands.items():
        print(f"== {phase}", flush=True)
        seconds, peak = measured(command)
        disk = f"{size_of(made) / 1e9:.2f}" if made else ""
        rows.append(f"| {phase} | {seconds:.0f} | {peak / 2**30:.2f} | {disk} |")
    print("| phase | seconds | peak memory, GiB | on disk, GB |\n|---|---|---|---|")
    print("\n".join(rows))


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds and largest resident memory in bytes of a process; its output is shown."""
    begin = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"The phase failed: {' '.join(command)}")
    return time.monotonic() - begin, usage.ru_maxrss * 1024


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write(folder: Path, size: str, dtype: str) -> None:
    """The checkpoint as transformers publishes it, a file at a time."""
    import numpy as np
    import torch
    import transformers
    from safetensors.torch import save_file

    folder /= "hf"
    config = transformers.Blip2Config(**SIZES[size])
    config.architectures, config.dtype = ["Blip2ForConditionalGeneration"], dtype
    with torch.device("meta"):  # names and shapes only
        model = transformers.Blip2ForConditionalGeneration(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    del shapes["language_model.lm_head.weight"]  # is the word embedding, which is written once
    kind = getattr(torch, dtype)

    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        nbytes = shape.numel() * kind.itemsize
        if shards[-1] and used + nbytes > SHARD_BYTES[size]:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    folder.mkdir()
    generator, files = np.random.default_rng(0), {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: random_tensor(name, shapes[name], kind, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    total = sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total * kind.itemsize}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    write_processor(folder, config)
    print(f"{total:,} parameters in {len(shards)} files")


def random_tensor(name: str, shape, dtype, generator):
    """Values between 1/64 and 1/32 of either sign: every bit of the mantissas is random."""
    import numpy as np
    import torch

    exponent, free = {torch.bfloat16: (121 << 7, 0x807F), torch.float16: (9 << 10, 0x83FF)}[dtype]
    bits = np.frombuffer(generator.bytes(2 * shape.numel()), np.uint16) & free | exponent
    values = torch.from_numpy(bits).view(dtype).reshape(shape)
    if "norm" in name.lower() and name.endswith("weight"):
        values = values + 1
    if name.endswith("qkv.bias"):  # published checkpoints have no key bias
        width = len(values) // 3
        values[width : 2 * width] = 0
    return values


def write_processor(folder: Path, config) -> None:
    """A tokenizer of numbered words with OPT's special tokens, and the image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from jaxblip.interop.processors import ImageProcessing

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [f"w{i}" for i in range(config.image_token_index - len(special))]
    vocabulary = {word: i for i, word in enumerate([*special, *words, "<image>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    content = ImageProcessing(config.vision_config.image_size).to_hf()
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def caption(folder: Path, size: str, dtype: str) -> None:
    """One caption of a random image."""
    import numpy as np

    import jaxblip

    model = jaxblip.load(folder / "run")
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    begin = time.monotonic()
    (text,) = model.caption(image, max_new_tokens=MAX_NEW_TOKENS)
    print(f"{len(text.split())} words in {time.monotonic() - begin:.1f} s: {text}")


def compare(folder: Path, size: str, dtype: str) -> None:
    """Every tensor of the export with the written one."""
    import torch
    from safetensors import safe_open

    def places(name: str) -> dict[str, Path]:
        found = {}
        for file in (folder / name).glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        return found

    theirs, ours = places("hf"), places("again")
    if theirs.keys() != ours.keys():
        sys.exit(f"The names differ: {sorted(theirs.keys() ^ ours.keys())[:5]}")

    def bits(file: Path, key: str):
        with safe_open(file, "pt") as opened:
            tensor = opened.get_tensor(key)
        return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.int16)

    for key, file in theirs.items():
        *expected, expected_bits = bits(file, key)
        *found, found_bits = bits(ours[key], key)
        if found != expected or not torch.equal(found_bits, expected_bits):
            sys.exit(f"{key} differs.")
    print(f"{len(theirs)} tensors are the same, bit for bit.")


PHASES = {"write": write, "caption": caption, "compare": compare}

if __name__ == "__main__":
    main()
