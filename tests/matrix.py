"""The suite on as many machines as one can be: other products, no compiled code, other threads, dtypes and versions.

    python tests/matrix.py                       # every row
    python tests/matrix.py other-blas kernels-off -- tests/test_solvers.py

A line a row, with its counts; what each one printed is in runs/matrix.  It goes on after a row that fails, and ends with
the number of those as its exit status.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "runs" / "matrix"
VERSIONS = "import platform, torch; print('Python', platform.python_version() + ', torch', torch.__version__)"


@dataclass(frozen=True)
class Row:
    """Variables of the environment and options of pytest; `made` is the target of make that builds the interpreter."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    made: str | None = None

    def python(self) -> str:
        return str(ROOT / Path(self.made).parent / "bin" / "python") if self.made else sys.executable


ROWS = [
    Row("plain"),
    Row("other-blas", options=("-p", "other_blas", "--timeout=1200")),
    Row("kernels-off", {"IMPLICITDL_KERNELS": "0"}),
    Row("two-threads", {"OMP_NUM_THREADS": "2"}),
    Row("aten-default", {"ATEN_CPU_CAPABILITY": "default"}),
    Row("mkl-compatible", {"MKL_CBWR": "COMPATIBLE"}),
    Row("mkl-avx2", {"MKL_CBWR": "AVX2"}),
    Row("mkl-avx512", {"MKL_CBWR": "AVX512,STRICT"}),
    Row("float32", options=("--default-dtype", "float32")),
    Row("oldest", made=".venv-oldest/ready"),
    Row("newest", made=".venv-newest/ready"),
]


def processor() -> str:
    """The name in /proc/cpuinfo, with the instructions that decide how products are summed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    has = [
        name
        for name in ("avx2", "avx512f", "amx_tile", "asimd", "sve")
        if name in facts.get("flags", facts.get("Features", "")).split()
    ]
    return f"{facts.get('model name', 'unnamed processor')} ({os.cpu_count()} cores; {', '.join(has)})"


def run(row: Row, wanted: list[str]) -> bool:
    """Whether it ran without a failure; prints its line, and what failed."""
    if row.made and subprocess.run(["make", row.made], cwd=ROOT, stdout=sys.stderr).returncode:
        print(f"{row.name:15} was not run: make {row.made} failed", flush=True)
        return False
    paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        **row.environment,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    LOGS.mkdir(parents=True, exist_ok=True)
    log, figures = LOGS / f"{row.name}.log", LOGS / f"{row.name}.xml"
    figures.unlink(missing_ok=True)
    command = [
        row.python(),
        "-m",
        "pytest",
        "-n",
        "2",
        "-m",
        "not long",
        f"--junit-xml={figures}",
        *row.options,
        *wanted,
    ]
    with log.open("w", encoding="utf-8") as out:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT).returncode
    of = subprocess.run([row.python(), "-c", VERSIONS], capture_output=True, text=True).stdout.strip()
    print(f"{row.name:15} {counts(figures) or f'ended with status {code}, without a report'}; {of}", flush=True)
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            print(f"    {line}", flush=True)
    return code == 0


def counts(figures: Path) -> str | None:
    """Of a report in JUnit's format."""
    if not figures.exists():
        return None
    (suite,) = ElementTree.parse(figures).getroot()
    tests, failed, errors, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    return f"{tests - failed - errors - skipped} passed, {failed} failed, {errors} errors, {skipped} skipped"


def main(words: list[str]) -> int:
    names, wanted = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        sys.exit(f"matrix: expected rows of {', '.join(row.name for row in ROWS)}; got {', '.join(sorted(unknown))}.")
    print(processor(), flush=True)
    return sum(not run(row, wanted) for row in ROWS if not names or row.name in names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
