"""Where Beam runs: processes of this machine, or whatever its options name."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import shlex
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence

from jaxblip.data.prepare import worker
from jaxblip.errors import UserError

_NEEDED = ("apache_beam", "imagehash", "tensorflow_datasets", "array_record")
_LOCAL = ("DirectRunner", "FnApiRunner")
_WORKER_THREAD = "run_worker"  # of Beam's, which waits for a worker process


def check_installed() -> None:
    """Raises UserError where a package is missing that preparations need."""
    for name in _NEEDED:
        try:
            with _quiet():
                importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"preparing data needs the package {error.name}: pip install 'jaxblip[prepare]'."
            ) from error
    # What it has to say of a process that died comes from threads that outlive the pipeline.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)


def option_names() -> set[str]:
    """The options that Beam knows, as they are written."""
    check_installed()
    from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

    parser = _BeamArgumentParser(allow_abbrev=False)
    for group in PipelineOptions.__subclasses__():
        group._add_argparse_args(parser)
    return set(parser._option_string_actions)


class Engine:
    """Runs pipelines.

    Args:
      workers: processes of this machine.
      flags: options of Beam's; with a `--runner` in it they say all, and `workers` is not used.

    Raises:
      UserError: Beam knows no such option or runner, or a package is missing.
    """

    def __init__(self, workers: int, flags: Sequence[str] = ()):
        if workers < 1:
            raise UserError(f"--workers={workers} must be 1 or more.")
        self._workers, self._flags = workers, list(flags)
        check_installed()
        from apache_beam.options.pipeline_options import StandardOptions

        options = self._options(self._flags)
        runner = options.view_as(StandardOptions).runner
        self.is_local = runner is None or runner in _LOCAL
        self.name = f"{workers} process{'es' * (workers > 1)}" if self.is_local else runner

    def run(self, build: Callable, *, doing: str, tasks: int) -> None:
        """Runs the pipeline that `build(pipeline)` makes, to its end.

        Args:
          doing: what is said where it fails.
          tasks: pieces of work that it has: fewer than two need no processes.

        Raises:
          UserError: it failed, for the reason of a worker's own UserError where there is one.
        """
        from apache_beam.runners.portability.fn_api_runner import fn_runner

        try:
            with _quiet():
                if not self.is_local:
                    self._run(build)
                elif min(tasks, self._workers) < 2:
                    # Not `DirectRunner`, which would try to download another runner first.
                    self._run(build, fn_runner.FnApiRunner())
                else:
                    self._run_in_processes(build, min(tasks, self._workers))
        except KeyboardInterrupt:
            raise
        except UserError as error:  # in this process, with Beam's word for the place behind it
            raise UserError(str(error).partition(" [while running")[0]) from error
        except BaseException as error:  # of any runner, and of anything that it started
            raise self._failure(error, doing) from error

    def _run(self, build: Callable, runner=None, flags: Sequence[str] = ()) -> None:
        import apache_beam as beam

        own = [flag for flag in self._flags if not (runner and flag.startswith("--runner"))]
        pipeline = beam.Pipeline(runner=runner, options=self._options([*own, *flags]))
        build(pipeline)
        pipeline.run().wait_until_finish()

    def _run_in_processes(self, build: Callable, workers: int) -> None:
        """Beam would wait forever for a worker that was killed: here it is an error."""
        import grpc
        from apache_beam.runners.portability.fn_api_runner import fn_runner
        from apache_beam.transforms.environments import SubprocessSDKEnvironment

        ended, failures = threading.Event(), []
        say_elsewhere = threading.excepthook

        def run() -> None:
            try:
                self._run(build, runner, [f"--direct_num_workers={workers}"])
            except BaseException as error:
                failures.append(error)
            ended.set()

        def failed(thread) -> None:
            if thread.thread.name == _WORKER_THREAD:
                failures.append(UserError(
                    "a worker process died, perhaps for lack of memory: run the same command "
                    "again, what is finished stays, perhaps with fewer --workers."
                ))  # fmt: skip
                ended.set()
            elif not issubclass(thread.exc_type, grpc.RpcError):  # of connections to it
                say_elsewhere(thread)

        threading.excepthook = failed
        with tempfile.NamedTemporaryFile(prefix="jaxblip-workers-") as lifeline:
            command = f"exec {shlex.quote(sys.executable)} -m {worker.__name__} {lifeline.name}"
            environment = SubprocessSDKEnvironment.from_command_string(command)
            runner = fn_runner.FnApiRunner(default_environment=environment)
            threading.Thread(target=run, daemon=True).start()
            ended.wait()
        for thread in threading.enumerate():  # the workers that are left end without the file
            if thread.name == _WORKER_THREAD:
                thread.join()
        if failures:
            raise failures[0]
        threading.excepthook = say_elsewhere

    def _options(self, flags: Sequence[str]):
        from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
        from apache_beam.runners.runner import create_runner

        said = io.StringIO()
        try:
            with _quiet(), contextlib.redirect_stderr(said):
                options = PipelineOptions(list(flags))
                if runner := options.view_as(StandardOptions).runner:
                    create_runner(runner)  # which may bring options of its own
                known = options.get_all_options()
                extra = options.get_all_options(retain_unknown_options=True).keys() - known.keys()
        except SystemExit as error:
            reason = said.getvalue().strip().rpartition("error: ")[2]
            raise UserError(f"Beam refuses its options: {reason}.") from error
        except (ValueError, ImportError, AttributeError) as error:
            raise UserError(f"Beam cannot be started so: {_first_line(error)}") from error
        if extra:
            raise UserError(
                f"Beam has no option --{min(extra)}: `jaxblip data prepare --help` lists those of "
                "the preparation, and Beam's are in its documentation."
            )
        return options

    def _failure(self, error: BaseException, doing: str) -> UserError:
        """Runners hand on a worker's error as text, with its traceback and their own around it."""
        if own := re.findall(r"UserError: (.+?)(?: \[while running.*)?$", str(error), re.MULTILINE):
            return UserError(own[-1])
        return UserError(
            f"{doing} failed on {self.name}: {type(error).__name__}: {_first_line(error)}"
        )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else "no reason given"


@contextlib.contextmanager
def _quiet():
    """Beam logs what it does, and what it lacks, to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
