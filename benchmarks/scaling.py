"""The table of docs/scaling.md: full-size training steps planned for one machine after another.

`python benchmarks/scaling.py --cache=DIR` compiles what DIR does not have yet, a minute or two
each, and prints the table; `--only=stage1,v5e` takes the rows whose name has all of these words.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from ml_collections import ConfigDict

from jaxblip.config import load_config
from jaxblip.errors import UserError
from jaxblip.planning import report, topologies
from jaxblip.planning.plan import plan

ROOT = Path(__file__).parents[1] / "configs" / "blip2"
# name -> (config, batch, other overrides)
RUNS = {
    "stage1 ViT-g 1680": ("stage1_vit_g.py", 1680, ()),
    "stage1 ViT-g 16384": ("stage1_vit_g.py", 16_384, ()),
    "stage2 OPT-6.7B 1920": ("stage2_vit_g_opt_6_7b.py", 1920, ()),
    "stage2 FlanT5-XXL 1520": ("stage2_flan_t5_xxl.py", 1520, ()),
}
MACHINES = ("v5e:16x16", "v5e:4x4", "v5p:4x4x8", "v6e:16x16", "a100-40g:2x8", "h100:1x8")
# As many examples a chip on 16 chips and on 256: how a run grows with the machine.
GROWTH = [
    (f"growth {name} {rows} a chip", file, rows * chips, (), machine)
    for name, file, rows in (
        ("stage1 ViT-g", "stage1_vit_g.py", 8),
        ("stage2 OPT-6.7B", "stage2_vit_g_opt_6_7b.py", 8),
    )
    for machine, chips in (("v5e:4x4", 16), ("v5e:8x8", 64), ("v5e:16x16", 256))
]
# As one batch on one machine grows.
BATCH = [
    (f"batch stage2 OPT-6.7B {batch}", "stage2_vit_g_opt_6_7b.py", batch, (), "v5p:4x4x8")
    for batch in (1024, 2048, 4096)
]
LARGE = [
    ("contrast 32768 in blocks", "stage1_vit_g.py", 32_768, ("config.loss.itc_block_size=512",), m)
    for m in ("v5p:4x4x4",)
]


def rows() -> list[tuple]:
    """(name, config, batch, overrides, machine) of all that is planned."""
    table = [
        (name, file, batch, overrides, machine)
        for machine in MACHINES
        for name, (file, batch, overrides) in RUNS.items()
    ]
    return [*table, *LARGE, *GROWTH, *BATCH]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", required=True, metavar="DIR", help="of one JSON file a row")
    parser.add_argument("--only", default="", metavar="WORD,WORD", help="rows with all these words")
    parser.add_argument("--tries", type=int, default=3, metavar="N", help="as of `jaxblip plan`")
    parser.add_argument("--print", action="store_true", help="only the rows that are there")
    options = parser.parse_args()
    cache = Path(options.cache)
    cache.mkdir(parents=True, exist_ok=True)
    print(HEADER)
    for name, file, batch, overrides, machine in rows():
        if not all(word in f"{name} {machine}" for word in options.only.split(",")):
            continue
        path = cache / f"{name} {machine}.json".replace(" ", "_").replace(":", "_")
        if not path.exists() and not options.print:
            config = load_config(str(ROOT / file), [f"config.batch_size={batch}", *overrides])
            path.write_text(json.dumps(planned(config, machine, options.tries), indent=2))
        if path.exists():
            print(markdown(name, json.loads(path.read_text())), flush=True)


def planned(config: ConfigDict, machine: str, tries: int) -> dict:
    """A plan as JSON; what cannot be planned with its reason."""
    try:
        return report.as_json(plan(config, topologies.parse(machine), tries=tries))
    except (UserError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return {"topology": machine, "tried": [], "best": None, "note": str(error)}


COLUMNS = (
    "run", "machine", "mesh, rematerialisation, batch", "GiB a chip: state + rest",
    "PFLOP a step", "GB moved a chip", "seconds a step (computation, memory, network)",
    "images/s a chip", "days", "chip-hours", "compiled in",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def markdown(name: str, found: dict) -> str:
    """One row of the table: the best that was found."""
    tried = found["tried"]
    if not tried:
        why = f"not planned: {found['note'].splitlines()[0]}"
        return f"| {name} | {found['topology']} | {why} |" + " |" * (len(COLUMNS) - 3)
    if found["best"] is None:
        least = min(tried, key=lambda each: each["memory"]["total"], default=None)
        why = "nothing that was tried fits"
        if least:
            why += f"; least {least['memory']['total'] / 2**30:.1f} GiB a chip ({_setting(least)})"
        return f"| {name} | {found['topology']} | {why} |" + " |" * (len(COLUMNS) - 3)
    best = tried[found["best"]]
    memory, modelled = best["memory"], best["modelled"]
    state = memory["trainable"] + memory["optimizer"] + memory["frozen"]
    cells = [
        name,
        found["topology"],
        _setting(best),
        f"{state / 2**30:.1f} + {(memory['total'] - state) / 2**30:.1f}",
        f"{best['operations'] / 1e15:.2f}",
    ]
    if not modelled:  # XLA cannot read the program back
        return f"| {' | '.join([*cells, *['?'] * 5])} | {best['compile_s']:.0f} s |"
    times = ", ".join(f"{seconds:.2f}" for seconds in modelled["times_s"].values())
    cells += [
        f"{sum(best['collectives'].values()) / 1e9:.1f}",
        f"**{modelled['step_s']:.2f}** ({times})",
        f"{modelled['images_per_second'] / found['num_chips']:.1f}",
        f"{modelled['days']:.1f}",
        f"{modelled['chip_hours']:,.0f}",
        f"{best['compile_s']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def _setting(each: dict) -> str:
    remat = "" if each["remat"] == "none" else f", {each['remat']}"
    return f"{topologies.sizes_shown(each['mesh'])}{remat}, {each['batch_size']:,}"


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
