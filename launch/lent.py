"""Run an experiment on a machine that is lent for minutes and reaches nothing but small copies.

    python launch/local.py --exp ain_135m --prepare                 here: extend the tokenizer, tokenise, pack
    python launch/lent.py pack parcels data/ain_135m models/SmolLM2-135M-Seeing runs/ain_135m wheels
    ... copy this repository and what lies in parcels/ over; then there, in its root, again and again until it is done:
    python launch/lent.py run parcels --exp ain_135m --minutes 8 --out out --then "benchmarks/ain_135m.py
        --kit data/ain_135m --model runs/ain_135m/export --out out/figures --dtype bfloat16"
    ... copy out/ back; here:
    python launch/lent.py unpack out/ain_135m from_there

wheels/ holds the packages that the machine lacks, as `pip download` brings them; leave it out where it lacks none. Each
`run` unpacks what is not unpacked yet, installs the wheels among it, and goes on with the experiment; when its minutes
are over it saves and ends with status 75. When the experiment is finished the exported model is packed into OUT, and
the program after --then gets what is left of the minutes. Status 0: all of that is done.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AGAIN = 75  # the status that asks for another run of the same command
GRACE = 90  # seconds that are left for a save


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 all done, 75 the same command again, else what failed."""
    from ain_jax.launching import parcels

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    pack = verbs.add_parser("pack", help="files and folders below this one, as parts of a bounded size")
    pack.add_argument("into", type=Path)
    pack.add_argument("paths", type=Path, nargs="+")
    pack.add_argument("--mib", type=int, default=60, help="of a part, at most (default: 60)")
    unpack = verbs.add_parser("unpack", help="what was packed, checked part by part")
    unpack.add_argument("parcels", type=Path)
    unpack.add_argument("into", type=Path)
    run = verbs.add_parser("run", help="unpack, go on with the experiment, and end in time")
    run.add_argument("parcels", type=Path)
    run.add_argument("--exp", required=True, help="as launch/local.py takes it")
    run.add_argument("--run_dir", type=Path, help="default: runs/NAME")
    run.add_argument("--minutes", type=float, required=True, help="after which it has ended")
    run.add_argument("--then", default="", help="a Python program and its arguments, run when the experiment is done")
    run.add_argument("--out", type=Path, required=True, help="where the model is packed")
    run.add_argument("--mib", type=int, default=16, help="of a part of the model, at most (default: 16)")
    asked, rest = parser.parse_known_args(argv)
    if rest and asked.verb != "run":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if asked.verb == "run" and 60 * asked.minutes <= GRACE:
        parser.error(f"--minutes {asked.minutes:g}: of these {GRACE} s are left for a save; give more")
    try:
        if asked.verb == "pack":
            made = parcels.pack(asked.paths, asked.into, asked.mib)
            print(f"{len(made)} parts in {asked.into}, {sum(part.stat().st_size for part in made):,} bytes")
        elif asked.verb == "unpack":
            print("unpacked" if parcels.unpack(asked.parcels, asked.into) else "unpacked before")
        else:
            return go(asked, rest)
    except (ValueError, OSError, subprocess.CalledProcessError) as fault:
        print(f"{Path(__file__).name}: {fault}", file=sys.stderr)
        return 1
    return 0


def go(asked: argparse.Namespace, rest: list[str]) -> int:
    """One stay on the machine."""
    from ain_jax.launching import parcels

    end = time.monotonic() + 60 * asked.minutes
    parcels.unpack(asked.parcels, Path())
    wheels, installed = sorted(map(str, Path("wheels").glob("*.whl"))), Path("wheels/.installed")
    if wheels and (not installed.is_file() or installed.read_text("utf-8").split("\n") != wheels):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--force-reinstall"]
        subprocess.run([*pip, *wheels], check=True)
        installed.write_text("\n".join(wheels), "utf-8")
    root = asked.run_dir or Path("runs") / Path(asked.exp).stem
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root.with_name("compiled").absolute()))  # for the next stay
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    train = ["launch/local.py", "--exp", asked.exp, "--run_dir", str(root), *rest]
    if status := _until(end, train):
        return status
    export, out = root / "export", asked.out / root.name
    if not (out / parcels.SUMS).is_file() or (out / parcels.SUMS).stat().st_mtime < export.stat().st_mtime:
        parcels.pack([export], out, asked.mib)
    print(f"the model: {len(list(out.glob('*.part')))} parts in {out}", flush=True)
    return _until(end, shlex.split(asked.then)) if asked.then else 0


def _until(end: float, program: list[str]) -> int:
    """The status of a Python program; 75 where it had to be asked to stop because the time was over."""
    process = subprocess.Popen([sys.executable, *program], cwd=Path())
    try:
        return process.wait(max(end - GRACE - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        status = process.wait(max(end - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.kill()  # the checkpoint before is what the next run goes on from
        status = process.wait()
    if status not in (0, 130) and status > 0:
        return status  # a fault, which another stay would meet again
    print(f"the time is over: the same command goes on; {shlex.join(program)}")
    return AGAIN


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # nothing is installed there
    sys.exit(main())
