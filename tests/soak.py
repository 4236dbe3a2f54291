"""Run the tests marked `soak` at their full size: python -m tests.soak [names…] [--scale X] [--seed N].

Each test has a process of its own. What is done is noted, and not done again for the same seed and scale: after an
interruption the same command goes on where it stopped. A table of what was reached comes at the end, in any case.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

STATE: Final = Path(".soak-state.jsonl")
TIMEOUT: Final = 6 * 3600
COLLECTED_NOTHING: Final = 5

Figures = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """How one test ended, at which seed and scale, and the lines it reported."""

    test: str
    seed: int
    scale: float
    ok: bool
    seconds: float
    lines: list[Figures] = field(default_factory=list)


def pytest(arguments: Sequence[str], variables: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and output of pytest. When interrupted, it is interrupted too, and clears away what it started."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "soak", *arguments]
    environment = {**os.environ, "SOAK": "1", **variables}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.communicate()
            raise
    return process.returncode, output


def collect(names: Sequence[str]) -> list[str]:
    """The ids of the tests to run; `names` are matched as `pytest -k` does, any of them. Raises SystemExit."""
    chosen = ["-k", " or ".join(names)] if names else []
    status, output = pytest(["--collect-only", "-q", "-p", "no:randomly", *chosen], {})
    if status not in (0, COLLECTED_NOTHING):
        raise SystemExit(output)
    found = [line for line in output.splitlines() if "::" in line]
    if not found:
        raise SystemExit(f"no soak test matches {' or '.join(names) or 'the marker'}")
    return found


def remembered(state: Path, seed: int | None, scale: float) -> dict[str, Result]:
    """What was finished before at this seed (None: the last one) and scale."""
    lines = state.read_text(encoding="utf-8").splitlines() if state.exists() else []
    results = [Result(**json.loads(line)) for line in lines if line.endswith("}")]
    results = [result for result in results if result.scale == scale]
    if seed is None:
        seed = results[-1].seed if results else None
    return {result.test: result for result in results if result.ok and result.seed == seed}


def run(test: str, seed: int, scale: float) -> Result:
    """One test in a process of its own; what it prints is shown when it fails."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report"
        variables = {"SOAK_SEED": str(seed), "SOAK_SCALE": str(scale), "SOAK_REPORT": str(report)}
        begun = time.monotonic()
        status, output = pytest(["-q", "-s", f"--timeout={TIMEOUT}", test], variables)
        seconds = round(time.monotonic() - begun, 1)
        text = report.read_text(encoding="utf-8") if report.exists() else ""
    if status != 0:
        print(output, flush=True)
    return Result(test, seed, scale, status == 0, seconds, [json.loads(line) for line in text.splitlines()])


def note(state: Path, result: Result) -> None:
    with state.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def rows_of(result: Result) -> Iterable[tuple[str, str, str]]:
    """The lines of one test; one that failed, or reported nothing, has a line of its own."""
    taken = f"{result.seconds:.0f} s"
    for line in result.lines:
        figures = (f"{name} {shown(value)}" for name, value in line.items() if name not in ("line", "seed"))
        yield str(line["line"]), ", ".join(figures), taken
    if not result.ok or not result.lines:
        yield result.test.rpartition("/")[2], "passed" if result.ok else "FAILED", taken


def table(results: Iterable[Result]) -> str:
    """Lines × figures, ordered by line."""
    rows = [("line", "reached", "time"), *sorted(row for result in results for row in rows_of(result))]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{line:<{first}}  {reached:<{second}}  {taken}" for line, reached, taken in rows)


def shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", help="only tests whose name matches one of these, as pytest -k does")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every full figure")
    parser.add_argument("--seed", type=int, help="of all that is random; else that of the last run, if unfinished")
    parser.add_argument("--state", type=Path, default=STATE, help="where it is noted what is done")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet; 0 when everything passed."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tests = collect(options.names)
    before = remembered(options.state, options.seed, options.scale)
    seed = options.seed
    if seed is None and before and not before.keys() >= set(tests):
        seed = next(iter(before.values())).seed
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    results = {test: before[test] for test in tests if test in before and before[test].seed == seed}
    print(f"seed {seed}, scale {options.scale:g}: {len(tests)} tests, {len(results)} of them done before", flush=True)
    whole = False
    try:
        for test in tests:
            if test not in results:
                results[test] = run(test, seed, options.scale)
                note(options.state, results[test])
                said = "ok" if results[test].ok else "FAILED"
                print(f"{said:<6} {results[test].seconds:7.1f} s  {test}", flush=True)
        whole = True
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", flush=True)
    finally:
        print(f"\n{table(results.values())}\n\nseed {seed}, scale {options.scale:g}", flush=True)
    return 0 if whole and all(result.ok for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
