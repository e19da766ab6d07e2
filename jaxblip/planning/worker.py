"""One compilation in a process of its own: `python -m jaxblip.planning.worker < request.json`.

Which compiler JAX has, and for which platform, is settled when it starts, and libtpu ends the
process where it fails. The request has `config`, `topology` and `mesh`; the last line of the output
is the `Compilation` as JSON, or `{"error": …}` for bad input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

from ml_collections import ConfigDict

from jaxblip.errors import UserError


def compile_apart(config: ConfigDict, topology):
    """`compilation.compile_step` in another process.

    Raises:
      UserError: as there.
      RuntimeError: the process ended otherwise; the message has the end of what it said.
    """
    from jaxblip.planning import topologies
    from jaxblip.planning.compilation import Compilation

    request = json.dumps({"config": config.to_dict(), "topology": topology.name})
    done = subprocess.run(
        [sys.executable, "-m", "jaxblip.planning.worker"],
        input=request,
        text=True,
        capture_output=True,
        env={**os.environ, **topologies.environment(topology)},
    )
    lines = done.stdout.strip().splitlines()
    answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if "error" in answer:
        raise UserError(answer["error"])
    if done.returncode or not answer:
        raise RuntimeError(f"The compilation for {topology.name} failed: {done.stderr[-3000:]}")
    return Compilation.from_dict(answer)


def main() -> None:
    from jaxblip.config import config_from_dict
    from jaxblip.planning import compilation, topologies

    request = json.load(sys.stdin)
    try:
        topology = topologies.parse(request["topology"])
        found = compilation.compile_step(config_from_dict(request["config"]), topology)
        print(json.dumps(dataclasses.asdict(found)))
    except UserError as error:
        print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main()
