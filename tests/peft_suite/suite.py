"""Run HF PEFT's own tests against slimtune: `make peft-suite`.

    python tests/peft_suite/suite.py                                    all files, about 25 minutes on two cores
    python tests/peft_suite/suite.py tests/test_mixed.py -k merge       other arguments go to pytest
    python tests/peft_suite/suite.py --src ~/other/checkout --out /tmp/results

The tests see a package `peft` whose names are slimtune's (`shim/peft`). It prints, by file and in total, how many of
the tests that real PEFT passes slimtune passes, then the most frequent causes of failure. `EXCLUDED` lists the tests
where slimtune differs on purpose, each with the reason; the share is printed with and without them.

The first run makes an environment without peft, fetches PEFT's source package, which has the tests (they stay outside
this repository), and writes tiny random models in place of the Hub's. `--baseline` runs
real PEFT and rewrites the entries of these files in `peft_passes.txt.gz`: the tests that it passes under the same
conditions, those of methods that slimtune lacks left out.
"""

import argparse
import ast
import gzip
import json
import os
import re
import subprocess
import sys
import venv
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
PEFT = "peft==0.21.2"
PASSES = HERE / "peft_passes.txt.gz"
SLOW = "gpu_examples common_gpu gptqmodel torch_compile"  # they need a GPU or hours
METHODS_OF_PEFT = (
    "arrow bdlora boft cartridge cpt deft frod multitask_prompt_tuning osf pvera randlora riemannian_lora shadow "
    "supertuning unilora vblora velora xlora"
)  # files that test one method alone; one that slimtune has gained runs
MISSING_METHODS = [name for name in METHODS_OF_PEFT.split() if not (ROOT / "src/slimtune/methods" / name).exists()]
ALL_TESTS = ["tests", *(f"--ignore=tests/test_{name}.py" for name in [*SLOW.split(), *MISSING_METHODS])]
RANKS = ("passed", "skipped", "hub", "failed", "error")  # a test counts as the worst of its set-up, call and teardown


def set_up(work: Path) -> None:
    """Make what is missing of the work folder: environment, PEFT and its tests, and the models."""
    env, tests, real, hub = (work / name for name in ("peftenv", "peft_tests", "peft_real", "hub"))
    python = env / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not env.is_dir():
        venv.create(env, with_pip=True)
        extra = ["parameterized", "diffusers", "scikit-learn"]
        subprocess.run([*pip, "install", f"{ROOT}[test]", *extra], check=True)
        subprocess.run([*pip, "uninstall", "--yes", "peft", "slimtune"], check=True)
    if not real.is_dir():
        subprocess.run([*pip, "install", "--no-deps", "--target", str(real), PEFT], check=True)
    if not tests.is_dir():
        subprocess.run(
            [*pip, "download", "--no-deps", "--no-binary", "peft", "-d", str(work / "sdist"), PEFT], check=True
        )
        tests.mkdir()
        archive = next((work / "sdist").glob("peft-*.tar.gz"))
        subprocess.run(["tar", "xzf", str(archive), "-C", str(tests), "--strip-components=1"], check=True)
        (tests / "tests" / "__init__.py").touch()  # the source package leaves it out
        subprocess.run(["rm", "-r", str(tests / "src")], check=True)
    if not hub.is_dir():
        settings = {**os.environ, "PYTHONPATH": str(real), "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"}
        subprocess.run([str(python), str(HERE / "build_hub.py"), str(hub)], env=settings, check=True)


def run_tests(work: Path, src: Path, rows: Path, arguments: list[str], skip: Path | None = None) -> None:
    """Run pytest on slimtune, or on real PEFT without the tests in `skip`; write `rows` and, beside it, the log."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    tests = work / "peft_tests"
    settings = {
        **os.environ,
        "PEFT_SUITE_PATH": str(work / "peft_real" if skip else HERE / "shim"),
        "PEFT_SUITE_OUT": str(rows),
        "PEFT_SUITE_SKIP": str(skip or ""),
        "PEFT_SUITE_TESTS": str(tests / "tests"),
        "PYTHONPATH": f"{src}:{HERE}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HOME": str(work / "hf"),
        "HF_HUB_CACHE": str(work / "hub"),
        **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["nice", "-n", "5", str(work / "peftenv/bin/python"), "-m", "pytest", "-c", os.devnull]
    command += ["--rootdir", str(tests), "-p", "plugin", "-p", "no:cacheprovider", "-q", "--no-header", "-W", "ignore"]
    command += ["--tb=short", "--timeout=120", "--continue-on-collection-errors", *(arguments or ALL_TESTS)]
    with rows.with_suffix(".log").open("w") as log:
        subprocess.run(command, cwd=tests, env=settings, stdout=log, stderr=subprocess.STDOUT)


def write_passes(work: Path, src: Path, out: Path, arguments: list[str]) -> None:
    """Run real PEFT and replace the entries of the files that were run in the list of its passes."""
    collected, skip, rows = out / "collected.jsonl", out / "no_method.jsonl", out / "peft.jsonl"
    run_tests(work, src, collected, [*(arguments or ALL_TESTS), "--collect-only"])
    lines = collected.read_text().splitlines(keepends=True)
    skip.write_text("".join(line for line in lines if json.loads(line)["outcome"] == "no method"))
    run_tests(work, src, rows, arguments, skip)
    # Real PEFT numbers some tests otherwise, because its lists of methods are longer.
    same = {json.loads(line)["id"] for line in lines}
    found = {test: row for test, row in read_rows(rows).items() if test in same}
    files = {test.partition("::")[0] for test in found}
    kept = [test for test in read_passes() if arguments and test.partition("::")[0] not in files]
    passes = sorted([*kept, *(test for test, row in found.items() if row["outcome"] == "passed")])
    PASSES.write_bytes(gzip.compress("\n".join(passes).encode(), mtime=0))
    print(f"{PASSES}: real PEFT passes {len(passes)} tests")


def read_passes() -> list[str]:
    """Return the ids of the tests that real PEFT passes."""
    return gzip.decompress(PASSES.read_bytes()).decode().splitlines()


def read_rows(path: Path) -> dict[str, dict]:
    """Return a run's rows by the tests' ids."""
    rows: dict[str, dict] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        old = rows.get(row["id"], row)
        worse = row["outcome"] in RANKS and RANKS.index(row["outcome"]) > RANKS.index(old["outcome"])
        rows[row["id"]] = row if worse else old
    return rows


def read_exclusions() -> dict[str, str]:
    """Return the reasons of the patterns in EXCLUDED; a line is `pattern  # reason`."""
    lines = [x for x in (HERE / "EXCLUDED").read_text().splitlines() if x.strip() and not x.startswith("#")]
    return {pattern.strip(): reason.strip() for pattern, _, reason in (line.partition(" # ") for line in lines)}


def find_public_names(work: Path) -> list[str]:
    """Return `peft.__all__`, read without importing PEFT."""
    tree = ast.parse((work / "peft_real/peft/__init__.py").read_text())
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return ast.literal_eval(lists[0])


def shorten_cause(text: str) -> str:
    """Return an error's first line without what varies from test to test."""
    text = re.sub(r"/tmp/\S+|0x[0-9a-f]+|\b\w+Config\b", "…", text.split("\n")[0][:200])
    return re.sub(r"\d+\.\d+(e-?\d+)?|\b\d+\b", "N", text)


def report(work: Path, src: Path, rows: dict[str, dict], *, everything: bool, most_causes: int) -> None:
    """Print the counts, by file and in total, and the most frequent causes of failure."""
    counted = [test for test in read_passes() if everything or test in rows]
    exclusions = read_exclusions()
    hits: Counter[str] = Counter()
    files: defaultdict[str, Counter[str]] = defaultdict(Counter)
    causes: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for test in counted:
        row = rows.get(test, {"outcome": "not collected", "text": "not collected"})
        excluded = next((p for p in exclusions if re.search(p, test)), None)
        file = files[test.partition("::")[0].removeprefix("tests/")]
        passed = row["outcome"] == "passed"
        file.update(of=1, passed=passed, excluded=excluded is not None, passed_excluded=passed and excluded is not None)
        if excluded is not None:
            hits[excluded] += 1
        elif not passed:
            causes[shorten_cause(row.get("text", row["outcome"])), row.get("tests", "")].append(test)
    total: Counter[str] = sum(files.values(), Counter())
    print(f"{'file':40} {'passed':>7} {'of':>7} {'excluded':>9}")
    for name, count in sorted(files.items(), key=lambda item: -item[1]["of"]):
        print(f"{name:40} {count['passed']:7} {count['of']:7} {count['excluded']:9}")
    for (cause, where), tests in sorted(causes.items(), key=lambda item: -len(item[1]))[:most_causes]:
        print(f"{len(tests):6} {cause}\n       at {where}\n       such as {tests[0]}")
    for row in rows.values():
        if row["outcome"] == "not collected":
            print(f"not collected: {row['id']}: {row['text'].strip().splitlines()[-1]}")
    if everything:
        print(*(f"EXCLUDED: no test matches {pattern}" for pattern in exclusions if not hits[pattern]), sep="\n")
    names = find_public_names(work)
    code = "import sys, slimtune; print(*(n for n in sys.argv[1:] if n not in slimtune.__all__))"
    settings = {**os.environ, "PYTHONPATH": str(src)}
    python = [str(work / "peftenv/bin/python"), "-c", code, *names]
    missing = subprocess.run(python, env=settings, capture_output=True, text=True, check=True).stdout.split()
    print(f"missing of peft.__all__: {' '.join(missing)}")
    print(f"peft.__all__: {len(names) - len(missing)} of {len(names)} names exist")
    kept, kept_passed = total["of"] - total["excluded"], total["passed"] - total["passed_excluded"]
    print(f"passed {format_share(total['passed'], total['of'])} tests that PEFT passes")
    print(f"without the {total['excluded']} in EXCLUDED: {format_share(kept_passed, kept)}")


def format_share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / max(1, whole):.1f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".venv-peft-suite", help="environment, tests and models")
    parser.add_argument("--src", type=Path, default=ROOT, help="the checkout of slimtune to test")
    parser.add_argument("--out", type=Path, help="folder of the log and the JSON lines; default: WORK/out")
    parser.add_argument("--causes", type=int, default=12, help="how many causes of failure to print")
    parser.add_argument("--baseline", action="store_true", help="run real PEFT and rewrite the list of its passes")
    known, arguments = parser.parse_known_args()
    work, out = known.work.resolve(), (known.out or known.work / "out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    set_up(work)
    src = known.src.resolve() / "src"
    if known.baseline:
        write_passes(work, src, out, arguments)
    else:
        run_tests(work, src, out / "slimtune.jsonl", arguments)
        rows = read_rows(out / "slimtune.jsonl")
        report(work, src, rows, everything=not arguments, most_causes=known.causes)


if __name__ == "__main__":
    sys.exit(main())
