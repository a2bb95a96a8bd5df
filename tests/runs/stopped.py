"""Run experiments and stop them at named points, as a kill would.

Each line of standard input is a JSON list `[LOG, POINT, ARGUMENT, ...]`. What it asks for runs in a process of its own,
forked behind the imports, which take most of a start; standard error goes to the file LOG, and a line on standard
output tells how it ended.

A point is `SIGNAL@PLACE`, where PLACE is one of the functions below with a count: `KILL@step:pretrain:3` kills the
process with SIGKILL when step 3 of pretrain has been written down, `INT@step:instruct:2` sends SIGINT instead.
"""

import json
import os
import signal
import sys
from pathlib import Path

LONGEST = 600  # seconds that a run may take


def main() -> int:
    """Serve standard input; in a process that was forked, the exit status of its run."""
    sys.modules["torch"] = None  # pyright: ignore  # no run may need it

    from ain_jax.stages import registry  # noqa: F401

    for line in sys.stdin:
        log, point, *arguments = json.loads(line)
        process = os.fork()
        if not process:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(file, descriptor)
            signal.alarm(LONGEST)
            return run(point, arguments)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return 0


def run(point: str, arguments: list[str]) -> int:
    name, _, place = point.partition("@")
    what, stage, count = [*place.split(":"), "", ""][:3]
    number = getattr(signal, f"SIG{name}") if name else None

    from ain_jax import run as runner
    from ain_jax.data import examples, pack_plan
    from ain_jax.data.builders import sample as builder
    from ain_jax.stages import common
    from ain_jax.tokenizer import folder
    from ain_jax.train import checkpoint, metrics, reference
    from ain_jax.weights import export

    def stop() -> None:
        print(f"stopping at {point}", file=sys.stderr, flush=True)
        assert number is not None
        os.kill(os.getpid(), number)

    def here(path: object) -> bool:
        return not stage or stage in Path(str(path)).parts

    def before(module, function, wanted=lambda *a, **k: True):
        original = getattr(module, function)

        def stopped(*args, **kwargs):
            if wanted(*args, **kwargs):
                stop()
            return original(*args, **kwargs)

        setattr(module, function, stopped)

    def after(module, function, wanted=lambda *a, **k: True):
        original = getattr(module, function)

        def stopped(*args, **kwargs):
            result = original(*args, **kwargs)
            if wanted(*args, **kwargs):
                stop()
            return result

        setattr(module, function, stopped)

    if what == "step":
        after(metrics.Log, "write", lambda log, step, *_: here(log.path) and step == int(count))
    elif what == "saving":  # the save has begun in the background and is not finished
        after(checkpoint.Checkpoints, "save", lambda self, *_, **__: here(self.folder))
    elif what == "saved":
        after(checkpoint.Checkpoints, "wait", lambda self: here(self.folder) and self.latest() is not None)
    elif what == "result":  # the stage is done, and nothing says so yet
        before(runner, "_write_text", lambda path, _: here(path) and path.name == "result.json")
    elif what == "between":
        after(runner, "_write_text", lambda path, _: here(path) and path.name == "result.json")
    elif what == "tokenizer":
        before(folder, "fingerprint")
    elif what == "data":
        before(builder.Sample, "_generate_examples")
    elif what == "tokenise":
        before(examples, "_tokenise_batch")
    elif what == "plan":
        before(pack_plan, "save", lambda made, path: here(path))
    elif what == "reference":
        before(reference, "params_fingerprint")
    elif what == "model":  # one model of the evaluation is written down
        after(common, "write_json", lambda path, _: path.name == f"{count}.json")
    elif what == "weights":  # the export has its weights and is not renamed
        after(export, "write_weights")
    elif what:
        raise SystemExit(f"no such place: {what}")
    return runner.main(arguments, experiments=Path(__file__).resolve().parents[2] / "experiments")


if __name__ == "__main__":
    sys.exit(main())
